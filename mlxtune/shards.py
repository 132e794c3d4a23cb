"""Writes the weights of a model as safetensors shards, a few rows at a time. Knows tensors, not what they mean.

Names, types and shapes are known before anything is computed, so each file gets its header and its length first, and
every tensor has its place. Then the pieces come one after the other, are written there and let go: the memory needed
is that of the blocks at work, whatever the size of the model.
"""

import contextlib
import json
import math
import os
import shutil
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlxtune import machine
from mlxtune.folder import INDEX, WEIGHTS

# everything of a model folder but weights and config that a copy of it needs
BESIDE = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
    "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "chat_template.json", "generation_config.json",
)  # fmt: skip
SHARD_BYTES = 5_000_000_000
BLOCK = {"cpu": 1 << 19}  # weights that are computed at once: more is no faster on a CPU
BLOCK_ELSEWHERE = 1 << 23
CACHE_BYTES = 1 << 22  # of freed memory that MLX keeps for the next block
ALIGNMENT = 8  # of a file's first tensor, as the safetensors library writes it
WRITE_BYTES = 1 << 30  # Linux writes no more than 2 GB in one call
NAMES = {
    mx.bool_: "BOOL", mx.uint8: "U8", mx.int8: "I8", mx.uint16: "U16", mx.int16: "I16", mx.float16: "F16",
    mx.bfloat16: "BF16", mx.uint32: "U32", mx.int32: "I32", mx.float32: "F32", mx.uint64: "U64", mx.int64: "I64",
    mx.float64: "F64", mx.complex64: "C64",
}  # fmt: skip

Job = Callable[[], Sequence[mx.array]]


@dataclass(frozen=True, slots=True)
class Tensor:
    """What is known of a tensor before it is made."""

    name: str
    dtype: mx.Dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return int(math.prod(self.shape) * self.dtype.size)


@dataclass(frozen=True, slots=True)
class Piece:
    """Tensors that are made together, in jobs: each returns an array for each tensor, going on where the last ended.

    Jobs run on several threads, at most one more than there are cores ahead of what is written. Where a piece is
    `whole`, its jobs share something large, and no job of another piece runs beside them.
    """

    tensors: tuple[Tensor, ...]
    jobs: Callable[[], Iterable[Job]]
    whole: bool = False


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a tensor lies: its file and its first byte there."""

    file: str
    start: int


def of_array(name: str, array: mx.array) -> Piece:
    """The piece of one array, lazy or not, as it is. Whoever else holds the array keeps it in memory."""
    held = [array]

    def jobs() -> Iterator[Job]:
        made = held.pop()
        mx.eval(made)  # here: MLX lets only the thread that made a graph compute it
        yield lambda: [made]

    return Piece((Tensor(name, array.dtype, tuple(array.shape)),), jobs, whole=True)


def rows_at_once(width: int) -> int:
    """Rows of `width` weights for a job."""
    return max(1, BLOCK.get(machine.device_kind(), BLOCK_ELSEWHERE) // max(1, width))


def of_network(net: nn.Module) -> list[Piece]:
    """The pieces of a network's weights, in its order."""
    return [of_array(name, weight) for name, weight in tree_flatten(net.parameters())]


def write(
    folder: Path, pieces: Iterable[Piece], on_bytes: Callable[[int, int], None] = lambda done, total: None
) -> int:
    """Writes the shards and their index into `folder`; returns the bytes of all tensors.

    `folder` exists and is empty: use it inside `rundir.staged`. Pieces of an iterator are let go once written.
    `on_bytes(done, total)` is called as it goes on.
    """
    waiting = deque(pieces)
    tensors = {tensor.name: tensor for piece in waiting for tensor in piece.tensors}
    places = _lay_out(folder, list(tensors.values()))
    total, done = sum(each.nbytes for each in tensors.values()), 0
    written = dict.fromkeys(tensors, 0)
    with contextlib.closing(_made(waiting)) as made:
        for name, data in made:
            start = written[name]
            written[name] += len(data)
            if written[name] > tensors[name].nbytes:
                raise ValueError(f"{name} is larger than planned")
            with (folder / places[name].file).open("r+b", buffering=0) as file:
                _write_at(file.fileno(), data, places[name].start + start)
            done += len(data)
            on_bytes(done, total)
    if done < total:
        raise ValueError("a tensor is smaller than planned")
    return total


def _lay_out(folder: Path, tensors: Sequence[Tensor]) -> dict[str, _Place]:
    """Makes the files, each with its header and as long as it will be, and the index; returns each tensor's place."""
    shards: list[list[Tensor]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.nbytes > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.nbytes
    count = len(shards)
    names = [WEIGHTS] if count == 1 else [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    places: dict[str, _Place] = {}
    for file, shard in zip(names, shards, strict=True):
        # the widest types first, so that each tensor begins at a multiple of its own width
        ordered = sorted(shard, key=lambda each: (-each.dtype.size, each.name))
        head, starts = header(ordered)
        places |= {name: _Place(file, start) for name, start in starts.items()}
        with (folder / file).open("wb") as opened:
            opened.write(head)
            opened.truncate(len(head) + sum(each.nbytes for each in shard))
    index = {
        "metadata": {"total_size": sum(each.nbytes for each in tensors)},
        "weight_map": {name: places[name].file for name in sorted(places)},
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return places


def describe(folder: Path, config: dict[str, Any], source: Path) -> None:
    """Writes the config beside the weights, and what else a model folder needs, as it is in `source`; never code."""
    text = json.dumps(_tagged(dict(sorted(config.items()))), indent=2, allow_nan=False)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")
    for name in BESIDE:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def _tagged(value: Any) -> Any:
    """A config with infinities and NaN as transformers writes them: JSON has none."""
    if isinstance(value, float) and not math.isfinite(value):
        return {"__float__": "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"}
    if isinstance(value, dict):
        return {key: _tagged(each) for key, each in value.items()}
    return [_tagged(each) for each in value] if isinstance(value, list) else value


def header(tensors: Sequence[Tensor]) -> tuple[bytes, dict[str, int]]:
    """The beginning of a safetensors file that holds the tensors in this order, and where in it each of them begins."""
    described: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
    at = 0
    for each in tensors:
        described[each.name] = {
            "dtype": NAMES[each.dtype], "shape": list(each.shape), "data_offsets": [at, at + each.nbytes],
        }  # fmt: skip
        at += each.nbytes
    text = json.dumps(described, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    head = len(text).to_bytes(8, "little") + text
    return head, {each.name: len(head) + described[each.name]["data_offsets"][0] for each in tensors}


def _made(waiting: deque[Piece]) -> Generator[tuple[str, memoryview]]:
    """The bytes of all tensors, part by part, each with its tensor's name; a piece is dropped when it is done."""
    cores = machine.own_cores() if machine.device_kind() == "cpu" else 1
    ahead: deque[tuple[Piece, Future[list[memoryview]]]] = deque()

    def finished(most: int) -> Iterator[tuple[str, memoryview]]:
        """What the oldest jobs made, until no more than `most` are at work."""
        while len(ahead) > most:
            piece, future = ahead.popleft()
            yield from zip((each.name for each in piece.tensors), future.result(), strict=True)

    cached = mx.set_cache_limit(CACHE_BYTES)  # what is let go would stay in memory
    pool = ThreadPoolExecutor(cores)
    try:
        while waiting:
            piece = waiting.popleft()
            yield from finished(0 if piece.whole else cores)
            for job in piece.jobs():
                yield from finished(cores)
                ahead.append((piece, pool.submit(_run, job) if cores > 1 else _done(job)))
                del job
            if piece.whole:
                yield from finished(0)
        yield from finished(0)
    finally:
        pool.shutdown(cancel_futures=True)
        mx.set_cache_limit(cached)


def _done(job: Job) -> Future[list[memoryview]]:
    future: Future[list[memoryview]] = Future()
    future.set_result(_run(job))
    return future


def _run(job: Job) -> list[memoryview]:
    arrays = [mx.contiguous(each) for each in job()]
    mx.eval(arrays)
    return [bytes_of(each) for each in arrays]


def bytes_of(array: mx.array) -> memoryview:
    """The bytes of a contiguous array, which are not copied."""
    return memoryview(as_numpy(array).reshape(-1).view(np.uint8))


def as_numpy(array: mx.array) -> Any:
    """A contiguous array for NumPy, not copied; bfloat16, which it lacks, as uint16."""
    return np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array, copy=False)


def _write_at(handle: int, data: memoryview, at: int) -> None:
    while data:
        count = os.pwrite(handle, data[:WRITE_BYTES], at)
        data, at = data[count:], at + count
