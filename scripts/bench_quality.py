"""Held-out loss of mlxtune's and mlx-lm's LoRA at the same number of supervised tokens, on three public tasks.

    python scripts/bench_quality.py --model MODEL_FOLDER --data FOLDER_OF_DATA_SETS [--seeds 3] [--epochs 3] [--json]

The tasks, from folders of the data sets' names: banking77 (a question -> one of four intents), gsm8k (a question ->
its worked answer), wikisql (a table and a question -> SQL). Rows of more than 256 tokens are left out: even so, all
of it took 52 minutes on two busy cores. All train on the same rows, each row equally often, so that they see the same
supervised tokens; a row counts only if both packages learn the very same tokens of it. What is shown is the mean loss
in nats over exactly the supervised tokens of the test rows, measured by mlxtune for every adapter.

Contenders: both packages with their own defaults, and each with the other's settings as far as its YAML allows, which
tells the trainer from the settings. mlx-lm's --num-layers 16 is refused for a model of fewer blocks, so -1 (all of
them) stands for it, and its --iters follow from the rows and epochs. mlxtune keeps the adapter that was best on the
validation rows, mlx-lm the last. The seed chooses A, the order of rows and nothing else. mlx-lm's graphs are not
compiled here, which changes its speed only, and it gets the OpenBLAS that mlxtune loads by itself.
"""

import argparse
import csv
import ctypes.util
import itertools
import json
import math
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mlxtune import machine

machine.prepare()

from mlxtune import adapter, likelihood, model  # noqa: E402
from mlxtune.data import load  # noqa: E402
from mlxtune.data.render import Limit, Sample, render  # noqa: E402
from mlxtune.model import LanguageModel  # noqa: E402
from mlxtune.optimizer import DEFAULT_EPOCHS, peak_rate  # noqa: E402
from mlxtune.recipe import DataRecipe, LoraRecipe, TrainRecipe  # noqa: E402
from mlxtune.tokenizer import inner  # noqa: E402

from mlx_lm.lora import CONFIG_DEFAULTS  # noqa: E402  isort: skip
from mlx_lm.tuner.datasets import CompletionsDataset  # noqa: E402  isort: skip

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}"
    "{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
INTENTS = ("card_arrival", "exchange_rate", "top_up_failed", "verify_my_identity")
TRAIN_ROWS, VALID_ROWS, TEST_ROWS = 320, 48, 96  # a multiple of both batch sizes: mlx-lm leaves out the rest
LONGEST = 256  # tokens a row
Pairs = Iterator[dict[str, str]]


def banking77(folder: Path, split: str) -> Pairs:
    with (folder / f"{split}.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["category"] in INTENTS:
                yield {"prompt": f"Customer: {row['text'].strip()}\nIntent:", "completion": row["category"]}


def gsm8k(folder: Path, split: str) -> Pairs:
    for line in (folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        yield {"prompt": f"Question: {row['question'].strip()}\nAnswer:", "completion": row["answer"].strip()}


def wikisql(folder: Path, split: str) -> Pairs:
    for line in (folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines():
        asked, answer = json.loads(line)["text"].split("\nA: ")
        yield {"prompt": f"{asked.strip()}\nA:", "completion": answer.strip()}


TASKS: dict[str, Callable[[Path, str], Pairs]] = {"banking77": banking77, "gsm8k": gsm8k, "wikisql": wikisql}


@dataclass(frozen=True, slots=True)
class Task:
    """A folder with train, valid and test.jsonl; the test rows' samples; supervised tokens of one epoch.

    `peak_rate` is mlxtune's default learning rate for the model.
    """

    name: str
    folder: Path
    epochs: int
    test: list[Sample]
    epoch_tokens: int
    peak_rate: float

    @property
    def tokens(self) -> int:
        """Supervised tokens of a whole run."""
        return self.epoch_tokens * self.epochs

    def updates(self, batch_size: int) -> int:
        return TRAIN_ROWS // batch_size * self.epochs


def with_template(source: Path, target: Path) -> Path:
    """A copy of a model, with a chat template where it has none: mlx-lm needs one for prompt/completion rows."""
    shutil.copytree(source, target)
    config = target / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": TEMPLATE} | json.loads(config.read_text())))
    return target


def samples_of(path: Path, lm: LanguageModel) -> list[Sample]:
    rows, ends = load.read_examples(path, DataRecipe()), set(lm.tokenizer.eos_token_ids)
    return render(rows, inner(lm.tokenizer), ends, DataRecipe(), Limit(TrainRecipe().max_seq_length)).samples


def agreed(pairs: list[dict[str, str]], lm: LanguageModel, scratch: Path) -> Pairs:
    """The rows that are short enough and of which both packages learn the same tokens, in a fixed random order."""
    peer = CompletionsDataset([], lm.tokenizer, "prompt", "completion", mask_prompt=True)
    random.Random(0).shuffle(pairs)
    for pair in pairs:
        tokens, offset = peer.process(pair)
        if len(tokens) <= LONGEST:
            scratch.write_text(json.dumps(pair) + "\n")
            (sample,) = samples_of(scratch, lm)
            learned = [place for place, trained in enumerate(sample.trained) if trained]
            if sample.tokens == tokens and learned == list(range(offset, len(tokens))):
                yield pair


def prepare(name: str, data: Path, epochs: int, lm: LanguageModel, out: Path) -> Task:
    """The same rows for all contenders."""
    out.mkdir()
    rows = {}
    for split, count in (("train", TRAIN_ROWS + VALID_ROWS), ("test", TEST_ROWS)):
        pairs = list(TASKS[name](data / name, split))
        rows[split] = list(itertools.islice(agreed(pairs, lm, out / "scratch.jsonl"), count))
        assert len(rows[split]) >= count or split == "test", f"{name} has only {len(rows[split])} {split} rows"
    (out / "scratch.jsonl").unlink()
    rows["valid"], rows["train"] = rows["train"][:VALID_ROWS], rows["train"][VALID_ROWS:]
    for split, pairs in rows.items():
        (out / f"{split}.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    tokens = sum(sample.trained_count for sample in samples_of(out / "train.jsonl", lm))
    rate = peak_rate(TrainRecipe(), LoraRecipe().method, model.width(lm.config))
    return Task(name, out, epochs, samples_of(out / "test.jsonl", lm), tokens, rate)


def mlxtune_own(task: Task, out: Path, seed: int) -> list[object]:
    """mlxtune's defaults."""
    return [*mlxtune_train(task, out, seed), "--epochs", task.epochs]


def mlxtune_as_peer(task: Task, out: Path, seed: int) -> list[object]:
    """mlxtune with mlx-lm's settings, which leave Adam's bias uncorrected."""
    parameters = CONFIG_DEFAULTS["lora_parameters"]
    batch, rate = CONFIG_DEFAULTS["batch_size"], CONFIG_DEFAULTS["learning_rate"]
    sets = {f"lora.{name}": value for name, value in parameters.items()} | {
        "train.optimizer": CONFIG_DEFAULTS["optimizer"], "train.optimizer_options": "{bias_correction: false}",
        "train.schedule": "constant", "train.warmup": 0, "train.max_grad_norm": "null",
    }  # fmt: skip
    flags = [part for key, value in sets.items() for part in ("--set", f"{key}={value}")]
    flags += ["--epochs", task.epochs, "--batch-size", batch, "--learning-rate", rate]
    return [*mlxtune_train(task, out, seed), *flags]


def mlxtune_train(task: Task, out: Path, seed: int) -> list[object]:
    command = [sys.executable, "-m", "mlxtune", "train", "--model", "model", "--data", task.folder]
    return [*command, "--out", out, "--seed", seed, "--set", "train.show_answer=false", "--json"]


def peer_own(task: Task, out: Path, seed: int) -> list[object]:
    """mlx-lm's defaults."""
    return [*peer_train(task, out, seed), "--iters", task.updates(CONFIG_DEFAULTS["batch_size"])]


def peer_as_mlxtune(task: Task, out: Path, seed: int) -> list[object]:
    """mlx-lm with mlxtune's settings, but for the clipping of gradients, which it has not."""
    lora, train = LoraRecipe(), TrainRecipe()
    iters = task.updates(train.batch_size)
    warmup = math.ceil(train.warmup * iters)
    recipe = {
        "lora_parameters": {"rank": lora.rank, "scale": lora.scale, "dropout": lora.dropout},
        "optimizer": train.optimizer,
        "optimizer_config": {train.optimizer: {"weight_decay": train.weight_decay, "bias_correction": True}},
        "lr_schedule": {
            "name": "cosine_decay", "arguments": [task.peak_rate, iters - warmup], "warmup": warmup,
        },
    }  # fmt: skip
    out.mkdir()
    (out / "lora.yaml").write_text(json.dumps(recipe))
    size = ["--iters", iters, "--batch-size", train.batch_size]
    return [*peer_train(task, out, seed), *size, "-c", out / "lora.yaml"]


def peer_train(task: Task, out: Path, seed: int) -> list[object]:
    command = [sys.executable, "-m", "mlx_lm", "lora", "--train", "--model", "model", "--data", task.folder]
    quiet = ["--steps-per-eval", 100_000, "--val-batches", 1]
    return [*command, "--adapter-path", out / "adapter", "--seed", seed, "--mask-prompt", "--num-layers", -1, *quiet]


CONTENDERS: dict[str, Callable[[Task, Path, int], list[object]]] = {
    "mlxtune": mlxtune_own,
    "mlx-lm": peer_own,
    "mlx-lm, our settings": peer_as_mlxtune,
    "mlxtune, their settings": mlxtune_as_peer,
}


def environment(name: str) -> dict[str, str]:
    env = dict(os.environ, HF_HUB_OFFLINE="1")
    openblas = ctypes.util.find_library("openblas")
    if name.startswith("mlx-lm") and sys.platform == "linux":
        env |= {"MLX_DISABLE_COMPILE": "1"} | ({"LD_PRELOAD": openblas} if openblas else {})
    return env


def trained(name: str, task: Task, seed: int, work: Path) -> Path:
    """Trains a contender's adapter and returns its folder; mlxtune's own count of tokens must be the expected one."""
    out = work / f"{task.name}-{name.replace(', ', '-').replace(' ', '-')}-{seed}"
    command = [str(part) for part in CONTENDERS[name](task, out, seed)]
    done = subprocess.run(command, cwd=work, env=environment(name), capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout}\n{done.stderr}")
    if name.startswith("mlxtune"):
        seen = json.loads(done.stdout)["training"]["trained_tokens"]
        assert seen == task.tokens, f"{name} saw {seen} supervised tokens, not {task.tokens}"
    return out / "adapter"


def held_out(base: Path, folder: Path | None, task: Task) -> float:
    """Nats per supervised token of the test rows."""
    lm = model.load(base)
    if folder is not None:
        adapter.load(lm, folder)
    return likelihood.mean_nats(lm.net, task.test)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="folder of a small model, such as stories260K")
    parser.add_argument("--data", type=Path, required=True, help="folder with banking77, gsm8k and wikisql in it")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each; the medians are shown")
    parser.add_argument("--epochs", type=int, default=DEFAULT_EPOCHS, help="passes over the rows")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=list(CONTENDERS))
    parser.add_argument("--json", action="store_true", help="print the loss of every run")
    args = parser.parse_args()
    machine.configure()
    results = {}
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        base = with_template(args.model, work / "model")
        lm = model.load(base)
        for name in args.tasks:
            task = prepare(name, args.data, args.epochs, lm, work / name)
            losses: dict[str, list[float]] = {each: [] for each in args.contenders}
            for seed in range(args.seeds):
                for each, found in losses.items():
                    started = time.perf_counter()
                    found.append(held_out(base, trained(each, task, seed, work), task))
                    seconds = time.perf_counter() - started
                    print(f"{name} seed {seed}: {each} {found[-1]:.4f} in {seconds:.0f} s", file=sys.stderr)
            results[name] = {
                "rows": TRAIN_ROWS, "epochs": task.epochs, "tokens": task.tokens, "test_rows": len(task.test),
                "test_tokens": sum(sample.trained_count for sample in task.test),
                "untuned": held_out(base, None, task), "losses": losses,
            }  # fmt: skip
    if args.json:
        print(json.dumps(results))
        return
    show(results)


def show(results: dict[str, dict]) -> None:
    """Medians in nats per supervised token, and the lowest and highest of the seeds."""
    print("Held-out loss, nats per supervised token: median (lowest to highest)")
    for name, each in results.items():
        print(
            f"\n{name}: {each['rows']} rows x {each['epochs']} epochs, {each['tokens']} supervised tokens; "
            f"test {each['test_rows']} rows, {each['test_tokens']} tokens"
        )
        print(f"  {'untuned':<24}{each['untuned']:>8.4f}")
        for contender, losses in each["losses"].items():
            middle = statistics.median(losses)
            print(f"  {contender:<24}{middle:>8.4f}  ({min(losses):.4f} to {max(losses):.4f})")


if __name__ == "__main__":
    main()
