"""What training changes in a network, as one vector for each kind of LoRA's factors, or array by array.

An optimizer's update takes some ten operations for each array that it is given, and the factors of a network are
hundreds of small arrays. Knows networks, not training.
"""

import itertools
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

# optimizers that treat each number by itself, so that it doesn't matter which array it is in
ELEMENTWISE = {"adamw", "adam", "sgd", "lion", "adamax", "adagrad", "adadelta", "rmsprop"}
MOST_JOINED = 2**22  # numbers; above, their arrays are large enough, and each copy of them takes memory


def joining_pays(arrays: Mapping[str, mx.array], optimizer: str, method: str) -> bool:
    """Whether to train these arrays, by a method of `lora.method`, as vectors: many small ones of one type."""
    return (
        method != "full"
        and optimizer in ELEMENTWISE
        and sum(each.size for each in arrays.values()) <= MOST_JOINED
        and len({each.dtype for each in arrays.values()}) == 1
    )


@dataclass(frozen=True, slots=True)
class Place:
    """Where a parameter is: `module[key]`, its full name, and its shape."""

    module: Any
    key: str
    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Vectors:
    """The places of each vector, one behind the other, by its name: the last part of theirs; or a place each."""

    places: Mapping[str, list[Place]]
    joined: bool

    @classmethod
    def of(cls, net: nn.Module, *, joined: bool) -> "Vectors":
        """Those of what `net` trains. joined: all of a kind in one vector; they are of one type then."""
        places: dict[str, list[Place]] = {}
        for name, value in tree_flatten(net.trainable_parameters()):
            path, _, key = name.rpartition(".")
            module: Any = net
            for step in path.split(".") if path else []:
                module = module[int(step) if isinstance(module, list) else step]
            places.setdefault(key if joined else name, []).append(Place(module, key, name, value.shape))
        return cls(places, joined)

    def now(self) -> dict[str, mx.array]:
        """The parameters that the network has, by their names."""
        return {each.name: each.module[each.key] for some in self.places.values() for each in some}

    def join(self, arrays: Mapping[str, mx.array]) -> dict[str, mx.array]:
        """Arrays by parameter -> by vector."""
        if not self.joined:
            return {name: arrays[name] for name in self.places}
        return {
            name: mx.concatenate([arrays[each.name].reshape(-1) for each in some]) for name, some in self.places.items()
        }

    def apart(self, vectors: Mapping[str, mx.array]) -> dict[str, mx.array]:
        """Arrays by vector -> by parameter."""
        arrays: dict[str, mx.array] = {}
        for name, some in self.places.items():
            ends = itertools.accumulate(math.prod(each.shape) for each in some[:-1])
            parts = mx.split(vectors[name], list(ends)) if self.joined else [vectors[name]]
            arrays |= {each.name: part.reshape(each.shape) for each, part in zip(some, parts, strict=True)}
        return arrays

    def put(self, arrays: Mapping[str, mx.array]) -> None:
        """Gives the network these arrays, by parameter."""
        for some in self.places.values():
            for each in some:
                each.module[each.key] = arrays[each.name]

    @contextmanager
    def inside(self, arrays: Mapping[str, mx.array]) -> Iterator[None]:
        """Inside, the network has these arrays."""
        before = self.now()
        self.put(arrays)
        try:
            yield
        finally:
            self.put(before)
