"""Times the same chain of commands in mlxtune and in mlx-lm, side by side in one run: convert, train, evaluate, fuse.

    python scripts/bench_chain.py --model MODEL_FOLDER --data FOLDER_WITH_TRAIN_AND_TEST_CSV [--repeats 3]

Both get the same model folder, the same prompt/completion rows (four intents of banking77), 100 iterations of
batch 8, rank 16, the prompt masked. Whole-process wall times; the two take turns, so a change in the machine's speed
meets both. A third column runs mlx-lm with the OpenBLAS that mlxtune loads by itself. mlx-lm counts one padding token
a row among its trained tokens, which flatters its tokens per second; the figure is left as it reports it.
"""

import argparse
import csv
import ctypes.util
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

INTENTS = ("card_arrival", "exchange_rate", "top_up_failed", "verify_my_identity")
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}Customer: {{ m['content'] }}\nIntent:"
    "{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
ITERATIONS, BATCH, RANK, SCALE, RATE = 100, 8, 16, 4.0, 1e-3


def prepare(model: Path, data: Path, work: Path) -> None:
    """The model with a chat template, which mlx-lm needs for prompt/completion rows, and the rows as JSONL."""
    shutil.copytree(model, work / "model")
    config = work / "model" / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": TEMPLATE}))
    (work / "data").mkdir()
    rows: dict[str, list[dict[str, str]]] = {}
    for split in ("train", "test"):
        with (data / f"{split}.csv").open(encoding="utf-8", newline="") as file:
            rows[split] = [
                {"prompt": row["text"].strip(), "completion": row["category"]}
                for row in csv.DictReader(file)
                if row["category"] in INTENTS
            ]
    random.Random(0).shuffle(rows["train"])
    rows["valid"], rows["train"] = rows["train"][:48], rows["train"][48:]
    for split, values in rows.items():
        text = "".join(json.dumps(value) + "\n" for value in values)
        (work / "data" / f"{split}.jsonl").write_text(text)
    recipe = {"lora_parameters": {"rank": RANK, "scale": SCALE, "dropout": 0.0}}
    (work / "lora.yaml").write_text(json.dumps(recipe))


def mlxtune_chain(out: Path) -> list[tuple[str, list[str]]]:
    tune = [sys.executable, "-m", "mlxtune"]
    train = ["--batch-size", BATCH, "--iters", ITERATIONS, "--learning-rate", RATE, "--max-seq-length", 512]
    adapter = ["--adapter-path", out / "run" / "adapter"]
    return [
        ("convert", [*tune, "convert", "model", "--mlx-path", out / "model"]),
        ("train", [*tune, "train", "--model", out / "model", "--data", "data", "--out", out / "run", *train,
                   "--steps-per-eval", ITERATIONS, "--set", f"lora.rank={RANK}", "--set", f"lora.scale={SCALE}",
                   "--set", "train.schedule=constant", "--set", "train.warmup=0", "--json"]),
        ("evaluate", [*tune, "evaluate", "--model", out / "model", *adapter, "--data", "data/test.jsonl"]),
        ("fuse", [*tune, "fuse", "--model", out / "model", *adapter, "--save-path", out / "fused"]),
    ]  # fmt: skip


def mlx_lm_chain(out: Path) -> list[tuple[str, list[str]]]:
    lm = [sys.executable, "-m", "mlx_lm"]
    adapter = ["--adapter-path", out / "adapter"]
    lora = [*lm, "lora", "--model", out / "model", "--data", "data", *adapter, "-c", "lora.yaml", "--mask-prompt"]
    train = ["--batch-size", BATCH, "--iters", ITERATIONS, "--learning-rate", RATE, "--max-seq-length", 512]
    return [
        ("convert", [*lm, "convert", "--hf-path", "model", "--mlx-path", out / "model"]),
        ("train", [*lora, "--train", *train, "--num-layers", -1, "--val-batches", -1,
                   "--steps-per-eval", ITERATIONS, "--steps-per-report", ITERATIONS]),
        ("evaluate", [*lora, "--test", "--test-batches", -1, "--batch-size", BATCH, "--num-layers", -1]),
        ("fuse", [*lm, "fuse", "--model", out / "model", *adapter, "--save-path", out / "fused"]),
    ]  # fmt: skip


def timed(chain: list[tuple[str, list[str]]], work: Path, env: dict[str, str]) -> dict[str, float]:
    """Seconds of each step and of the whole, and the tokens per second that training reports."""
    figures = {}
    for name, command in chain:
        started = time.perf_counter()
        done = subprocess.run([str(part) for part in command], cwd=work, env=env, capture_output=True, text=True)
        figures[name] = time.perf_counter() - started
        if done.returncode:
            sys.exit(f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}")
        if name == "train":
            figures["tokens/s"] = tokens_per_second(done.stdout)
    figures["whole chain"] = sum(value for name, value in figures.items() if name != "tokens/s")
    return figures


def tokens_per_second(output: str) -> float:
    """Supervised tokens per second: mlxtune's JSON, or mlx-lm's last line of iteration, loss, tokens/s."""
    if output.lstrip().startswith("{"):
        return json.loads(output)["training"]["tokens_per_second"]
    plain = re.sub(r"\x1b\[[0-9;]*m", "", output)
    lines = re.findall(r"^\s*\d+\s+[\d.]+\s+\S\s+([\d,]+)\s+[\d.]+k", plain, re.MULTILINE)
    return float(lines[-1].replace(",", ""))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="folder of a small model, such as stories260K")
    parser.add_argument("--data", type=Path, required=True, help="folder of banking77's train.csv and test.csv")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each chain; the medians are shown")
    parser.add_argument("--json", action="store_true", help="print every figure of every run")
    args = parser.parse_args()
    env = dict(os.environ, HF_HUB_OFFLINE="1")
    openblas = ctypes.util.find_library("openblas")
    peers = {"mlxtune": (mlxtune_chain, env), "mlx-lm": (mlx_lm_chain, env)}
    if openblas and sys.platform == "linux":
        peers["mlx-lm + OpenBLAS"] = (mlx_lm_chain, env | {"LD_PRELOAD": openblas})
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in peers}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        prepare(args.model, args.data, work)
        for turn in range(args.repeats):
            for name, (chain, environment) in peers.items():
                out = work / f"{name.replace(' ', '')}-{turn}"
                out.mkdir()
                runs[name].append(timed(chain(out), work, environment))
                print(f"turn {turn + 1}: {name} {runs[name][-1]['whole chain']:.1f} s", file=sys.stderr)
    if args.json:
        print(json.dumps(runs))
        return
    show(runs)


def show(runs: dict[str, list[dict[str, float]]]) -> None:
    """Medians, and how many times faster mlxtune is: the median of the ratios of each turn."""
    names = list(runs)
    print("".join(f"{cell:>20}" for cell in ["", *names, *(f"faster than {n}"[:19] for n in names[1:])]))
    for figure in runs["mlxtune"][0]:
        cells = [statistics.median(run[figure] for run in runs[name]) for name in names]
        ratios = [
            statistics.median(
                ours[figure] / theirs[figure] if figure == "tokens/s" else theirs[figure] / ours[figure]
                for ours, theirs in zip(runs["mlxtune"], runs[name], strict=True)
            )
            for name in names[1:]
        ]
        print(f"{figure:>20}" + "".join(f"{cell:>20.1f}" for cell in cells) + "".join(f"{r:>18.2f} x" for r in ratios))


if __name__ == "__main__":
    main()
