"""What training changes in a network, as one vector for each kind of LoRA's factors, or array by array.

An optimizer's update takes some ten operations for each array that it is given, and the factors of a network are
hundreds of small arrays. Knows networks, not training.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
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
    """The places of what a network trains, in its order, and the names of those in each vector, one behind the other.

    `joined`: a vector has all places of a key, which names it; else one place each.
    """

    places: Sequence[Place]
    members: Mapping[str, list[str]]
    joined: bool

    @classmethod
    def of(cls, net: nn.Module, *, joined: bool) -> "Vectors":
        """Those of what `net` trains."""
        places: list[Place] = []
        members: dict[str, list[str]] = {}
        for name, value in tree_flatten(net.trainable_parameters()):
            path, _, key = name.rpartition(".")
            module: Any = net
            for step in path.split(".") if path else []:
                module = module[int(step) if isinstance(module, list) else step]
            places.append(Place(module, key, name, value.shape))
            members.setdefault(key if joined else name, []).append(name)
        return cls(places, members, joined)

    def now(self) -> dict[str, mx.array]:
        """The parameters that the network has, by their names."""
        return {each.name: each.module[each.key] for each in self.places}

    def put(self, arrays: Mapping[str, mx.array]) -> None:
        """Gives the network these arrays, by parameter."""
        for each in self.places:
            each.module[each.key] = arrays[each.name]

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Behind it, the network has the arrays that it had before, whatever it was given inside."""
        before = self.now()
        try:
            yield
        finally:
            self.put(before)

    def join(self, arrays: Mapping[str, mx.array]) -> dict[str, mx.array]:
        """Arrays by parameter -> by vector."""
        if not self.joined:
            return {name: arrays[name] for name in self.members}
        return {
            vector: mx.concatenate([arrays[name].reshape(-1) for name in names])
            for vector, names in self.members.items()
        }

    def apart(self, vectors: Mapping[str, mx.array]) -> dict[str, mx.array]:
        """Arrays by vector -> by parameter."""
        if not self.joined:
            return {name: vectors[name] for name in self.members}
        shapes = {each.name: each.shape for each in self.places}
        arrays: dict[str, mx.array] = {}
        for vector, names in self.members.items():
            ends = itertools.accumulate(math.prod(shapes[name]) for name in names[:-1])
            for name, part in zip(names, mx.split(vectors[vector], list(ends)), strict=True):
                arrays[name] = part.reshape(shapes[name])
        return arrays
