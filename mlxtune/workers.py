"""The workers of one training run: processes that `mlx.launch` starts, each with its share of every batch.

Knows arrays and numbers, not training. The first worker alone writes to the run folder. Whatever a worker decides, all
decide, since sums are the same on each of them.
"""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map

from mlxtune.errors import InputError, WorkerLost
from mlxtune.machine import worker_rank


@dataclass(frozen=True, slots=True)
class Workers:
    """This process among those of a run; `rank` counts from 0. All must call the same methods in the same order.

    Each method raises WorkerLost where another process is gone.
    """

    rank: int = 0
    size: int = 1
    group: Any = None

    @property
    def first(self) -> bool:
        return self.rank == 0

    def share(self, rows: Sequence[Any]) -> list[Any]:
        """This worker's rows: every `size`-th one."""
        return list(rows[self.rank :: self.size])

    def summed(self, values: Sequence[float]) -> list[float]:
        """The sums over all workers, in float32 where there are several."""
        return list(values) if self.size == 1 else _numbers(mx.distributed.all_sum, values, self.group)

    def highest(self, value: float) -> float:
        """The largest value of any worker."""
        return value if self.size == 1 else _numbers(mx.distributed.all_max, [value], self.group)[0]

    def summed_gradient(self, gradient: Any) -> Any:
        """The sum of the workers' gradients, evaluated."""
        if self.size == 1:
            return gradient
        with _watched():
            mean = nn.average_gradients(gradient, self.group)
            total = tree_map(lambda each: each * self.size, mean)
            mx.eval(total)
        return total

    def from_first(self, arrays: Mapping[str, mx.array]) -> dict[str, mx.array]:
        """The first worker's `arrays`; each worker gives arrays of the same names, shapes and types."""
        if self.size == 1:
            return dict(arrays)
        with _watched():
            given = {name: value if self.first else mx.zeros_like(value) for name, value in sorted(arrays.items())}
            found = {name: mx.distributed.all_sum(value, group=self.group) for name, value in given.items()}
            mx.eval(found)
        return found

    def value_from_first(self, value: Any) -> Any:
        """The first worker's `value`, which JSON can hold."""
        if self.size == 1:
            return value
        written = json.dumps(value).encode()
        length = int(self.highest(len(written) if self.first else 0))
        text = np.zeros(length, dtype=np.int32)
        if self.first:
            text[:] = list(written)
        told = self.from_first({"text": mx.array(text)})["text"]
        return json.loads(bytes(np.array(told).astype(np.uint8)))

    def agree(self, digest: bytes, what: str) -> None:
        """Raises InputError on every worker where not all have the same `digest` of `what`."""
        number = int.from_bytes(digest[:3], "big")  # float32 holds it exactly
        if self.highest(number) != -self.highest(-number):
            raise InputError(f"the workers have different {what}", hint="give each of them the same files and versions")


def _numbers(reduce: Any, values: Sequence[float], group: Any) -> list[float]:
    with _watched():
        found: list[float] = reduce(mx.array(list(values), dtype=mx.float32), group=group).tolist()
    return found


@contextlib.contextmanager
def _watched() -> Iterator[None]:
    """Turns MLX's error for a lost peer into ours."""
    try:
        yield
    except RuntimeError as error:
        raise WorkerLost(f"another worker of this run has ended ({error})", hint="see what it said") from None


ALONE = Workers()


def join() -> Workers:
    """Meets the other workers where `mlx.launch` or its like started this process; else this one works alone.

    Raises WorkerLost where they don't meet, InputError where MLX finds none though this is to be a later one.
    """
    rank = worker_rank(os.environ)
    if rank is None:
        return ALONE
    try:
        group = mx.distributed.init()
    except RuntimeError as error:
        raise WorkerLost(f"the workers of this run do not meet: {error}", hint="start them with mlx.launch") from None
    if group.rank() != rank:
        raise InputError(f"was started as worker {rank}, but MLX meets no others", hint="start them with mlx.launch")
    return Workers(rank, group.size(), group)
