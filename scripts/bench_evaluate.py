"""Speed of greedy answers behind a shared few-shot prompt, and row by row the loss, mlxtune beside mlx-lm.

    python scripts/bench_evaluate.py --model MODEL_FOLDER --data FOLDER_OF_DATA_SETS [--rows 200] [--repeats 3] [--json]

Answers: --rows questions of banking77's test file, each behind the same --shots answered ones, as many as its context
of 512 tokens takes. Contenders take turns, each a process of its own; shown are medians of the seconds from the first
prompt to the last answer, the model loaded and one prompt answered before. mlxtune answers in batches; mlx-lm is a
plain loop over `mlx_lm.generate`, in two ways: "same BLAS" with the OpenBLAS that mlxtune loads by itself and without
`mx.compile`, and "as installed". A process that takes longer than --limit is stopped and its contender left out.

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


def by_mlxtune(model: Path, asked: list[Tokens]) -> Callable[[list[Tokens]], list[str]]:
    from mlxtune import generate
    from mlxtune.model import load

    machine.prepare()
    lm = load(model)
    return lambda some: [each.text for each in generate.answers(lm, some, max_tokens=ANSWER_TOKENS, batch_size=BATCH)]


def by_mlx_lm(model: Path, asked: list[Tokens]) -> Callable[[list[Tokens]], list[str]]:
    from mlx_lm import generate, load

    net, tokenizer = load(str(model))
    return lambda some: [generate(net, tokenizer, tokens, max_tokens=ANSWER_TOKENS) for tokens in some]


WAYS = {"mlxtune": by_mlxtune, "mlx_lm": by_mlx_lm}


def once(way: str, model: Path, file: Path) -> None:
    """One turn of one contender: prints its seconds and answers."""
    asked = json.loads(file.read_text())
    answer = WAYS[way](model, asked)
    answer(asked[:1])
    started = time.perf_counter()
    answers = answer(asked)
    print(json.dumps({"seconds": time.perf_counter() - started, "answers": answers}))


def turns(model: Path, asked: list[Tokens], repeats: int, limit: float) -> dict[str, Any]:
    """Each contender's seconds, a turn after the other, and the answers of its last one."""
    openblas = ctypes.util.find_library("openblas") if sys.platform == "linux" else None
    same = {"MLX_DISABLE_COMPILE": "1"} | ({"LD_PRELOAD": openblas} if openblas else {})
    contenders: dict[str, tuple[str, dict[str, str]]] = {
        "mlxtune": ("mlxtune", {}),
        "mlx-lm, same BLAS": ("mlx_lm", same),
        "mlx-lm, as installed": ("mlx_lm", {}),
    }
    found: dict[str, Any] = {name: {"seconds": [], "answers": None} for name in contenders}
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "prompts.json"
        file.write_text(json.dumps(asked))
        for _ in range(repeats):
            for name, (way, environment) in list(contenders.items()):
                command = [sys.executable, __file__, "--once", way, str(model), str(file)]
                env = os.environ | {"HF_HUB_OFFLINE": "1"} | environment
                try:
                    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=limit, check=True)
                except subprocess.TimeoutExpired:
                    found[name]["gave_up"] = f"stopped after {limit:.0f} s"
                    del contenders[name]
                    continue
                value = json.loads(done.stdout)
                found[name]["seconds"].append(value["seconds"])
                found[name]["answers"] = value["answers"]
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--once", nargs=3, metavar=("WAY", "MODEL", "PROMPTS"), help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--shots", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--limit", type=float, default=900, help="seconds of a process")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.once:
        return once(args.once[0], Path(args.once[1]), Path(args.once[2]))
    asked = prompts(args.model, args.data, args.rows, args.shots)
    found = turns(args.model, asked, args.repeats, args.limit)
    loss = losses(args.model, args.data)
    first = found["mlxtune"]
    median = {name: statistics.median(each["seconds"]) for name, each in found.items() if each["seconds"]}
    same = {
        name: sum(one == other for one, other in zip(each["answers"], first["answers"], strict=True))
        for name, each in found.items()
        if each["answers"] is not None
    }
    if args.json:
        print(json.dumps({"rows": len(asked), "seconds": median, "same_answers": same, "loss": loss}))
        return None
    mean = sum(map(len, asked)) / len(asked)
    print(f"{len(asked)} questions, {mean:.0f} tokens on average; {ANSWER_TOKENS} tokens at most are answered\n")
    for name, each in found.items():
        if name not in median:
            print(f"{name:<22} {each['gave_up']}")
            continue
        share = f"{median[name] / median['mlxtune']:5.1f} x" if name != "mlxtune" else "       "
        spread = f"{min(each['seconds']):.1f} to {max(each['seconds']):.1f}"
        print(f"{name:<22} {median[name]:7.1f} s  {share}  ({spread})  {same[name]} answers as mlxtune's")
    print(f"\nloss of {loss['rows']} rows, nats per token: largest difference {loss['largest']:.1e}")
    print(f"with the token of padding that mlx-lm counts: {loss['with_padding']:.1e}")
    return None


if __name__ == "__main__":
    main()
