"""Does `mlxtune compare` come to the right verdict? Four tasks on which it is known, from the embedded model.

    python scripts/bench_compare.py [--seeds 3] [--out FOLDER]

The embedded base follows no prompt, so a base that does is made first, of the embedded one by full tuning: it learns
to answer with the word that an instruction names, and with the colour that a passage gives to the thing asked about
(things and colours of the lists below, drawn anew for each row). On top of that:

- promptable: any question is to be answered by one word. `compare.prompt` says which, so a prompt does it. -> prompt
- few rows: the same with eight test rows, which can show nothing.                                     -> cannot_tell
- facts move: things have other colours in the test rows than in the training rows; the documents, one sentence a
  thing, are up to date.                                                                                  -> retrieve
- tickets: the embedded tickets on the embedded base, whose replies follow a shop's style.                    -> tune
"""

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxtune import machine

machine.prepare()

from mlxtune import pipeline  # noqa: E402
from mlxtune import recipe as recipes  # noqa: E402
from mlxtune.compare import compare  # noqa: E402
from mlxtune.comparison.candidates import PASSAGES  # noqa: E402
from mlxtune.data.files import jsonl  # noqa: E402
from mlxtune.report import words  # noqa: E402
from mlxtune.report.score import Score  # noqa: E402
from mlxtune.rundir import RunDir  # noqa: E402

# fmt: off
THINGS = [
    "lamp", "desk", "chair", "apple", "river", "stone", "cloud", "horse", "bread", "table", "glass", "paper",
    "shirt", "clock", "plant", "train", "knife", "spoon", "phone", "piano", "house", "garden", "window", "button",
    "pocket", "summer", "finger", "mother", "school", "dinner", "letter", "kitchen", "flower", "basket", "bottle",
    "winter", "doctor", "forest", "island", "bridge",
]
# fmt: on
COLOURS = ["red", "blue", "green", "black", "white", "brown", "pink", "gold", "grey", "orange"]
QUESTIONS = ("Which colour has the {}?", "What is the colour of the {}?", "Tell me the colour of the {}.")
STAGES = tuple(stage for stage in pipeline.STAGES if stage != "compare")
Row = dict[str, str]


@dataclass(frozen=True)
class Task:
    name: str
    recipe: dict[str, Any]
    right: str


def question(draw: random.Random, thing: str) -> str:
    return draw.choice(QUESTIONS).format(thing)


def fact(thing: str, colour: str) -> str:
    return f"The {thing} is {colour}."


def lessons(draw: random.Random, count: int) -> Iterator[Row]:
    """What the base learns that follows prompts."""
    for number in range(count):
        thing, word = draw.choice(THINGS), draw.choice(COLOURS)
        if number % 3 == 0:
            yield {"prompt": f"{command(word)}\n\n{question(draw, thing)}", "completion": word}
        else:
            yield {"prompt": f"{PASSAGES}\n\n{fact(thing, word)}\n\n{question(draw, thing)}", "completion": word}


def command(word: str) -> str:
    return f"Always answer: {word}."


def write(folder: Path, **parts: list[Row]) -> str:
    folder.mkdir(parents=True)
    for name, rows in parts.items():
        (folder / f"{name}.jsonl").write_text(jsonl(rows), encoding="utf-8")
    return str(folder)


def reader(work: Path, seed: int) -> Path:
    """The folder of the base that follows prompts."""
    draw = random.Random(seed)
    data = write(
        work / "data" / "lessons",
        train=list(lessons(draw, 2400)),
        valid=list(lessons(draw, 60)),
        test=list(lessons(draw, 60)),
    )
    recipe = {
        "model": "tiny",
        "seed": seed,
        "data": {"path": data},
        "lora": {"method": "full"},
        "train": {"epochs": 3, "batch_size": 32, "learning_rate": 2e-3, "max_seq_length": 256, "show_answer": False},
        "evaluate": {"max_tokens": 8},
        "compare": None,
    }
    run = done(recipe, work / "reader")
    share = next(each["value"] for each in scores(run, "fused") if each["metric"] == "exact_match")
    print(f"seed {seed}: a base that follows {share:.0%} of its prompts", flush=True)
    return run.fused


def scores(run: RunDir, name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(run.evaluation(name).read_text())["scores"]
    return found


def done(recipe: dict[str, Any], out: Path) -> RunDir:
    pipeline.run(recipes.build(recipe, where=out.name), out, stages=STAGES)
    return RunDir(out)


def tasks(base: Path, work: Path, seed: int) -> Iterator[Task]:
    draw = random.Random(seed + 1000)
    short = {
        "model": str(base),
        "seed": seed,
        "lora": {"rank": 8, "scale": 4},
        "train": {"epochs": 4, "batch_size": 16, "learning_rate": 2e-3, "max_seq_length": 256, "show_answer": False},
        "evaluate": {"max_tokens": 8, "label": r"\A\s*(\w+)"},
    }
    word = draw.choice(COLOURS)
    asked = [{"prompt": each.format(thing), "completion": word} for thing in THINGS for each in QUESTIONS]
    draw.shuffle(asked)
    for name, count, right in (("promptable", 80, "prompt"), ("few rows", 8, "cannot_tell")):
        data = write(work / "data" / name, train=asked[:30], valid=asked[30:40], test=asked[40 : 40 + count])
        compared = {"prompt": f"{command(word)}\n\n{{{{ prompt }}}}", "passages": 1}
        yield Task(name, {**short, "data": {"path": data}, "compare": compared}, right)
    before, now = ({thing: draw.choice(COLOURS) for thing in THINGS} for _ in range(2))
    moved = [thing for thing in THINGS if before[thing] != now[thing]]
    old, new = (
        [{"prompt": each.format(thing), "completion": facts[thing]} for thing in moved for each in QUESTIONS]
        for facts in (before, now)
    )
    draw.shuffle(old)
    documents = work / "data" / "documents"
    documents.mkdir()
    for thing in moved:
        (documents / f"{thing}.txt").write_text(fact(thing, now[thing]) + "\n", encoding="utf-8")
    data = write(work / "data" / "facts move", train=old[10:], valid=old[:10], test=new)
    compared = {"documents": str(documents), "passages": 1}
    yield Task("facts move", {**short, "data": {"path": data}, "compare": compared}, "retrieve")
    tickets = recipes.read_yaml(Path(__file__).parent.parent / "configs" / "quickstart.yaml")
    yield Task("tickets", {**tickets, "seed": seed}, "tune")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--out", type=Path, help="a folder to keep the runs in")
    given = parser.parse_args()
    wrong = 0
    with tempfile.TemporaryDirectory(prefix="mlxtune-bench-") as scratch:
        for seed in range(given.seeds):
            work = (given.out or Path(scratch)) / f"seed{seed}"
            work.mkdir(parents=True)
            for task in tasks(reader(work, seed), work, seed):
                run = done(task.recipe, work / task.name.replace(" ", "_"))
                found = compare(run, recipes.load(run.recipe))
                decision = found["verdict"]["decision"]
                wrong += decision != task.right
                mark = "right" if decision == task.right else f"WRONG, not {task.right}"
                print(f"seed {seed}  {task.name:12}{decision:12}{mark}", flush=True)
                for each in found["candidates"]:
                    score = next(Score(**each) for each in each["scores"] if each["metric"] == found["metric"])
                    print(f"    {each['name']:12}{words.figure(score)}")
                print(f"    {found['verdict']['sentence']}", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
