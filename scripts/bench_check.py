"""Times `mlxtune data check` on 100,000 short rows, with and without the search for near-duplicates.

    python scripts/bench_check.py --data FOLDER_WITH_TRAIN_CSV [--rows 100000] [--repeats 3] [--json]

The rows are made from banking77's train.csv by a seed: each is a question of it in which about one word in four is
another word of the same questions, so that they are as long and as varied as the real ones and about as often nearly
the same. Whole processes are measured, start of Python included: seconds of the wall and of the processor, and the
most memory that was resident. Medians are printed.
"""

import argparse
import csv
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MODES = {"fast": ["--fast"], "full": []}
CHANGED = 0.25  # share of words


def rows(data: Path, count: int, seed: int) -> list[dict[str, str]]:
    """`count` questions with their intents."""
    with (data / "train.csv").open(encoding="utf-8", newline="") as file:
        real = [(row["text"].split(), row["category"]) for row in csv.DictReader(file)]
    words = [word for text, _ in real for word in text]  # as often as in the questions
    rng = random.Random(seed)
    found = []
    for _ in range(count):
        text, label = rng.choice(real)
        changed = [rng.choice(words) if rng.random() < CHANGED else word for word in text]
        found.append({"prompt": " ".join(changed), "completion": label})
    return found


def measured(file: Path, flags: list[str]) -> dict[str, float]:
    """Seconds and peak memory of one process."""
    command = [sys.executable, "-m", "mlxtune", "data", "check", str(file), "--json", *flags]
    started = time.perf_counter()
    with tempfile.TemporaryFile() as out:
        process = subprocess.Popen(command, stdout=out, env=os.environ | {"OMP_NUM_THREADS": "1"})
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - started
        out.seek(0)
        text = out.read()
    if process.returncode:
        sys.exit(f"{' '.join(command)} ended with {process.returncode}")
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    counts = {f"{each['kind']} {each['severity']}": each["count"] for each in json.loads(text)["findings"]}
    return {
        "seconds": seconds,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_memory_gb": peak / 1e9,
        "near_duplicates": counts.get("near_duplicate info", 0),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of banking77's train.csv")
    parser.add_argument("--rows", type=int, default=100_000, help="rows of the file")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each mode; the medians are shown")
    parser.add_argument("--seed", type=int, default=0, help="seed of the rows")
    parser.add_argument("--json", action="store_true", help="print every figure of every run")
    args = parser.parse_args()
    runs: dict[str, list[dict[str, float]]] = {mode: [] for mode in MODES}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "rows.jsonl")
        lines = (json.dumps(row) + "\n" for row in rows(args.data, args.rows, args.seed))
        file.write_text("".join(lines), encoding="utf-8")
        for turn in range(args.repeats):
            for mode, flags in MODES.items():
                runs[mode].append(measured(file, flags))
                print(f"turn {turn + 1}: {mode} {runs[mode][-1]['seconds']:.1f} s", file=sys.stderr)
    if args.json:
        print(json.dumps(runs))
        return
    print(f"{args.rows:,} rows" + "".join(f"{mode:>12}" for mode in MODES))
    for figure in runs["fast"][0]:
        cells = (statistics.median(run[figure] for run in runs[mode]) for mode in MODES)
        print(f"{figure:<16}" + "".join(f"{cell:>12.2f}" for cell in cells))


if __name__ == "__main__":
    main()
