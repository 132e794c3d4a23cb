"""Speed of greedy answers behind a shared few-shot prompt and of labels by probability, and the loss row by row.

    python scripts/bench_evaluate.py --model MODEL_FOLDER --data FOLDER_OF_DATA_SETS [--rows 200] [--repeats 3]
        [--only answers|labels|loss] [--json]

Answers: --rows questions of banking77's test file, each behind the same --shots answered ones, as many as its context
of 512 tokens takes. Contenders take turns, each a process of its own; shown are medians of the seconds from the first
prompt to the last answer, the model loaded and one prompt answered before. mlxtune answers in batches; mlx-lm is a
plain loop over `mlx_lm.generate`, in two ways: "same BLAS" with the OpenBLAS that mlxtune loads by itself and without
`mx.compile`, and "as installed". A process that takes longer than --limit is stopped and its contender left out.

Labels: --rows questions of the same file and the 77 intents, in words. mlxtune scores them with `choices.read`; the
others are a plain loop over mlx-lm's network, each label behind each question in full. Shown beside the seconds: the
largest difference of a label's nats, and the rows with the same likeliest label.

Loss: every row of banking77's test file, four intents, with the prompt masked. Theirs is what `mlx_lm lora --test`
computes, `iterate_batches` and `default_loss` at batch size 1, with the token of padding that it counts taken out;
beside it the same with that token.
"""

import argparse
import csv
import ctypes.util
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench_quality import banking77, samples_of, with_template

from mlxtune import machine

ANSWER_TOKENS, BATCH, CONTEXT = 24, 32, 512
Tokens = list[int]
Asked = list[Any]  # prompts, or for labels pairs of a prompt and its labels


def prompts(model: Path, data: Path, rows: int, shots: int) -> list[Tokens]:
    """The tokens of the questions, each behind the same answered ones."""
    from mlx_lm.utils import load_tokenizer

    tokenizer = load_tokenizer(model)
    read = [list(csv.DictReader((data / "banking77" / f"{name}.csv").open())) for name in ("train", "test")]
    for each in read:
        random.Random(0).shuffle(each)
    train, test = read
    short = [row for row in train if len(row["text"]) < 60][:shots]
    shown = "".join(f"Customer: {row['text']}\nIntent: {row['category'].replace('_', ' ')}\n" for row in short)
    made = [tokenizer.encode(f"{shown}Customer: {row['text'].strip()}\nIntent:") for row in test]
    return [tokens for tokens in made if len(tokens) + ANSWER_TOKENS <= CONTEXT][:rows]


def labelled(model: Path, data: Path, rows: int) -> Asked:
    """The tokens of the questions, each with those of all intents."""
    from mlx_lm.utils import load_tokenizer

    tokenizer = load_tokenizer(model)
    test = list(csv.DictReader((data / "banking77" / "test.csv").open()))
    random.Random(0).shuffle(test)
    start = tokenizer.encode("Intent:")
    labels = []
    for label in sorted({row["category"].replace("_", " ") for row in test}):
        tokens = tokenizer.encode(f"Intent: {label}")
        assert tokens[: len(start)] == start
        labels.append([*tokens[len(start) :], tokenizer.eos_token_id])
    return [[tokenizer.encode(f"Customer: {row['text'].strip()}\nIntent:"), labels] for row in test[:rows]]


def answers_by_mlxtune(model: Path) -> Callable[[Asked], list[str]]:
    from mlxtune import generate
    from mlxtune.model import load

    machine.prepare()
    lm = load(model)
    return lambda some: [each.text for each in generate.answers(lm, some, max_tokens=ANSWER_TOKENS, batch_size=BATCH)]


def answers_by_mlx_lm(model: Path) -> Callable[[Asked], list[str]]:
    from mlx_lm import generate, load

    net, tokenizer = load(str(model))
    return lambda some: [generate(net, tokenizer, tokens, max_tokens=ANSWER_TOKENS) for tokens in some]


def labels_by_mlxtune(model: Path) -> Callable[[Asked], list[list[float]]]:
    from mlxtune.evaluation import choices
    from mlxtune.model import load

    machine.prepare()
    lm = load(model)

    def score(some: Asked) -> list[list[float]]:
        prompts, labels = zip(*some, strict=True)
        return [each.tolist() for each in choices.nats(lm.net, prompts, labels, BATCH)]

    return score


def labels_by_mlx_lm(model: Path) -> Callable[[Asked], list[list[float]]]:
    import mlx.core as mx
    import mlx.nn as nn
    from mlx_lm import load

    net, _ = load(str(model))

    def nats(prompt: Tokens, label: Tokens) -> float:
        logits = net(mx.array([[*prompt, *label[:-1]]]))[0, len(prompt) - 1 :]
        return float(nn.losses.cross_entropy(logits, mx.array(label), reduction="sum").item())

    return lambda some: [[nats(prompt, label) for label in labels] for prompt, labels in some]


WAYS: dict[str, dict[str, Callable[[Path], Callable[[Asked], list[Any]]]]] = {
    "answers": {"mlxtune": answers_by_mlxtune, "mlx_lm": answers_by_mlx_lm},
    "labels": {"mlxtune": labels_by_mlxtune, "mlx_lm": labels_by_mlx_lm},
}


def once(what: str, way: str, model: Path, file: Path) -> None:
    """One turn of one contender: prints its seconds and what it found."""
    asked = json.loads(file.read_text())
    find = WAYS[what][way](model)
    find(asked[:1])
    started = time.perf_counter()
    found = find(asked)
    print(json.dumps({"seconds": time.perf_counter() - started, "found": found}))


def turns(what: str, model: Path, asked: Asked, repeats: int, limit: float) -> dict[str, Any]:
    """Each contender's seconds, a turn after the other, and what it found in its last one."""
    openblas = ctypes.util.find_library("openblas") if sys.platform == "linux" else None
    same = {"MLX_DISABLE_COMPILE": "1"} | ({"LD_PRELOAD": openblas} if openblas else {})
    contenders: dict[str, tuple[str, dict[str, str]]] = {
        "mlxtune": ("mlxtune", {}),
        "mlx-lm, same BLAS": ("mlx_lm", same),
        "mlx-lm, as installed": ("mlx_lm", {}),
    }
    found: dict[str, Any] = {name: {"seconds": [], "found": None} for name in contenders}
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "prompts.json"
        file.write_text(json.dumps(asked))
        for _ in range(repeats):
            for name, (way, environment) in list(contenders.items()):
                command = [sys.executable, __file__, "--once", what, way, str(model), str(file)]
                env = os.environ | {"HF_HUB_OFFLINE": "1"} | environment
                try:
                    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=limit, check=True)
                except subprocess.TimeoutExpired:
                    found[name]["gave_up"] = f"stopped after {limit:.0f} s"
                    del contenders[name]
                    continue
                value = json.loads(done.stdout)
                found[name]["seconds"].append(value["seconds"])
                found[name]["found"] = value["found"]
    return found


def losses(model: Path, data: Path) -> dict[str, Any]:
    """The largest difference of a row's loss in nats per token, without mlx-lm's token of padding and with it."""
    machine.prepare()
    import mlx.core as mx
    from mlx_lm.tuner.datasets import CompletionsDataset
    from mlx_lm.tuner.trainer import default_loss, iterate_batches

    from mlxtune.evaluate import evaluate
    from mlxtune.model import load
    from mlxtune.recipe import EvaluateRecipe

    with tempfile.TemporaryDirectory() as scratch:
        lm = load(with_template(model, Path(scratch) / "model"))
        pairs = list(banking77(data / "banking77", "test"))
        file = Path(scratch) / "test.jsonl"
        file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
        rows = samples_of(file, lm)
        ours = evaluate(lm, rows, EvaluateRecipe(metrics=["loss"]))
    peer = CompletionsDataset(pairs, lm.tokenizer, "prompt", "completion", mask_prompt=True)
    apart, padded = [], []
    for made, sample, pair in zip(ours.predictions, rows, pairs, strict=True):
        tokens, offset = peer.process(pair)
        assert tokens[: len(sample.tokens)] == sample.tokens and made.loss is not None
        (batch, lengths), *_ = iterate_batches([(tokens, offset)], 1, CONTEXT)
        true, _ = default_loss(lm.net, batch, lengths - mx.array([[0, 1]]))
        apart.append(abs(true.item() - made.loss))
        padded.append(abs(default_loss(lm.net, batch, lengths)[0].item() - made.loss))
    return {"rows": len(apart), "largest": max(apart), "with_padding": max(padded)}


def compared(what: str, found: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Of each contender that ended its median seconds, and how far it found the same as mlxtune."""
    first = found["mlxtune"]["found"]
    made: dict[str, dict[str, float]] = {}
    for name, each in found.items():
        if each["found"] is None:
            continue
        rows = list(zip(each["found"], first, strict=True))
        made[name] = {"seconds": statistics.median(each["seconds"])}
        if what == "labels":
            made[name]["largest"] = max(abs(a - b) for one, other in rows for a, b in zip(one, other, strict=True))
            rows = [(one.index(min(one)), other.index(min(other))) for one, other in rows]
        made[name]["same"] = sum(one == other for one, other in rows)
    return made


def show(what: str, found: dict[str, Any], made: dict[str, dict[str, float]]) -> None:
    for name, each in found.items():
        if name not in made:
            print(f"{name:<22} {each.get('gave_up', 'no turn ended')}")
            continue
        its = made[name]
        share = f"{its['seconds'] / made['mlxtune']['seconds']:5.1f} x" if name != "mlxtune" else "       "
        spread = f"{min(each['seconds']):.1f} to {max(each['seconds']):.1f}"
        same = f"{its['same']:.0f} {'answers' if what == 'answers' else 'likeliest labels'} as mlxtune's"
        apart = f", nats within {its['largest']:.1e}" if "largest" in its else ""
        print(f"{name:<22} {its['seconds']:7.1f} s  {share}  ({spread})  {same}{apart}")
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--once", nargs=4, metavar=("WHAT", "WAY", "MODEL", "FILE"), help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--only", choices=("answers", "labels", "loss"))
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--shots", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--limit", type=float, default=900, help="seconds of a process")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.once:
        return once(*args.once[:2], Path(args.once[2]), Path(args.once[3]))
    told: dict[str, Any] = {}
    for what in WAYS:
        if args.only not in (None, what):
            continue
        if what == "answers":
            asked: Asked = prompts(args.model, args.data, args.rows, args.shots)
            lengths, about = list(map(len, asked)), f"at most {ANSWER_TOKENS} tokens are answered"
        else:
            asked = labelled(args.model, args.data, args.rows)
            lengths, about = [len(prompt) for prompt, _ in asked], f"{len(asked[0][1])} labels"
        found = turns(what, args.model, asked, args.repeats, args.limit)
        told[what] = {"rows": len(asked)} | compared(what, found)
        if not args.json:
            print(f"{what}: {len(asked)} questions, {sum(lengths) / len(lengths):.0f} tokens on average; {about}")
            show(what, found, told[what])
    if args.only in (None, "loss"):
        told["loss"] = loss = losses(args.model, args.data)
        if not args.json:
            print(f"loss of {loss['rows']} rows, nats per token: largest difference {loss['largest']:.1e}")
            print(f"with the token of padding that mlx-lm counts: {loss['with_padding']:.1e}")
    if args.json:
        print(json.dumps(told))
    return None


if __name__ == "__main__":
    main()
