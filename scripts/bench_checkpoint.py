#!/usr/bin/env python
"""What a checkpoint costs against a plain save of the same tensors: `bench_checkpoint.py [--json] [--pairs N]`.

Plain: one `mx.save_safetensors` for each of the same three files, each followed by an fsync of it: no hashes, no
staging, no folder synced. Checkpoint: `checkpoint.save`, which hashes, stages, syncs files and folders, and renames.
What it also does once there are enough of them, removing the oldest, is timed apart. The two take turns in one process
and swap who is first; figures are medians, and each ratio is the median of the pairs' ratios.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlxtune import machine, rundir

machine.prepare()

import mlx.core as mx

from mlxtune import checkpoint

SIZES_MB = (1, 20, 200)
TENSORS = 48  # in each part: 24 layers' two factors
CONFIG = {"num_layers": 24}


def arrays_of(megabytes: float) -> dict[str, dict[str, mx.array]]:
    """As Adam's: the adapter, the best one, and two moments. Float32, `megabytes` in all."""
    numbers = int(megabytes * 1e6 / 4 / 4 / TENSORS)
    parts = {"adapters": 1, "best": 1, "optimizer": 2}
    arrays = {
        name: {f"layer.{n}": mx.random.normal((numbers,)) for n in range(TENSORS * times)}
        for name, times in parts.items()
    }
    mx.eval(arrays)
    return arrays


def plain(folder: Path, arrays: dict[str, dict[str, mx.array]]) -> None:
    folder.mkdir()
    for name, tensors in arrays.items():
        mx.save_safetensors(str(folder / name), tensors, metadata={"format": "mlx"})
        rundir.sync(folder / f"{name}.safetensors")


def seconds(action: Callable[[], Any]) -> float:
    os.sync()  # what went before, deletions too, is not charged to this one
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def measure(megabytes: float, pairs: int, folder: Path) -> dict[str, float]:
    """Medians over `pairs` of turns, after one that does not count. Milliseconds."""
    arrays = arrays_of(megabytes)
    times: list[tuple[float, float, float]] = []
    for turn in range(pairs + 1):
        plainly, point = folder / "plain", checkpoint.Checkpoint(turn, {"step": turn}, arrays)
        actions: dict[str, Callable[[], Any]] = {
            "plain": lambda plainly=plainly: plain(plainly, arrays),
            "checkpoint": lambda point=point: checkpoint.save(folder / "checkpoints", point, CONFIG),
        }
        names = sorted(actions, reverse=turn % 2 == 0)
        spent = {name: 1e3 * seconds(actions[name]) for name in names}
        removal = 1e3 * seconds(lambda: rundir.discard(*(folder / "checkpoints").iterdir()))
        times.append((spent["plain"], spent["checkpoint"], removal))
        shutil.rmtree(plainly)
    plains, saves, removals = zip(*times[1:], strict=True)
    return {
        "megabytes": megabytes,
        "plain_ms": statistics.median(plains),
        "checkpoint_ms": statistics.median(saves),
        "removal_ms": statistics.median(removals),
        "ratio": statistics.median(save / one for one, save, _ in times[1:]),
        "ratio_with_removal": statistics.median((save + gone) / one for one, save, gone in times[1:]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="the cost of a checkpoint against a plain save with fsync")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--pairs", type=int, default=15, help="pairs of turns for each size")
    parser.add_argument("--folder", type=Path, help="where to write  [the folder for temporary files]")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        rows = [measure(size, args.pairs, Path(folder)) for size in SIZES_MB]
    if args.json:
        json.dump({"pairs": args.pairs, "sizes": rows}, sys.stdout, indent=2)
        print()
        return
    line = "{megabytes:4.0f} MB {plain_ms:12.1f} ms {checkpoint_ms:9.1f} ms {ratio:7.2f}"
    more = " {removal_ms:11.1f} ms {ratio_with_removal:7.2f}"
    print("tensors   plain + fsync   checkpoint   ratio   + removing one   ratio")
    for row in rows:
        print((line + more).format(**row))


if __name__ == "__main__":
    main()
