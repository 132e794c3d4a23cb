"""The weights of a model folder, read a few rows at a time. Knows files and networks, not what is done with the rows.

mlx-lm gives the weights names and shapes of its own. What it hands on as it lies in the file is read from there;
what it computes, such as experts stacked into one tensor, is computed whole and then given in
rows.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlxtune import headers, model
from mlxtune.errors import ModelError
from mlxtune.shards import NAMES, as_numpy

# as NumPy reads them; it has no bfloat16
STORED = {
    mx.bool_: np.bool_, mx.uint8: np.uint8, mx.int8: np.int8, mx.uint16: np.uint16, mx.int16: np.int16,
    mx.float16: np.float16, mx.bfloat16: np.uint16, mx.uint32: np.uint32, mx.int32: np.int32, mx.float32: np.float32,
    mx.uint64: np.uint64, mx.int64: np.int64,
}  # fmt: skip
# the bits of infinity, of a signed and of an unsigned integer that wide
SPECIAL = {mx.float16: (np.int16, 0x7C00), mx.bfloat16: (np.int16, 0x7F80), mx.float32: (np.int32, 0x7F800000)}

Read = Callable[[], mx.array]


@dataclass(frozen=True, slots=True)
class Place:
    """The first byte of a tensor in a file."""

    file: Path
    start: int


@dataclass(frozen=True, slots=True)
class Source:
    """A weight that is not read yet: `array` is lazy, and `place` is where it lies in a file as it is, or None."""

    array: mx.array
    place: Place | None

    @property
    def dtype(self) -> mx.Dtype:
        return self.array.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.array.shape)

    @property
    def width(self) -> int:
        """Weights of a row."""
        return self.shape[-1] if self.shape else 1

    @property
    def row_count(self) -> int:
        return self.array.size // self.width if self.width else 0

    def rows(self, count: int) -> Iterator[Read]:
        """What reads the rows, those of the last axis, `count` at a time: each returns an array (at most `count`, I).

        Each may be called in any thread. A weight without a place is computed when the first of them is asked for.
        """
        total, width = self.row_count, self.width
        if self.place is None:
            whole = mx.contiguous(self.array).reshape(total, width)
            mx.eval(whole)
            for start in range(0, total, count):
                yield _slice(whole, start, count)
        else:
            for start in range(0, total, count):
                yield self._reader(self.place, start, min(count, total - start), width)

    def _reader(self, place: Place, start: int, count: int, width: int) -> Read:
        dtype = self.dtype

        def read() -> mx.array:
            offset = place.start + start * width * dtype.size
            found: Any = np.fromfile(place.file, STORED[dtype], count * width, offset=offset)
            if found.size < count * width:
                raise ModelError("was cut while it was read", where=place.file, hint="download the model again")
            rows = mx.array(found.reshape(count, width))
            return rows.view(mx.bfloat16) if dtype == mx.bfloat16 else rows

        return read


def _slice(whole: mx.array, start: int, count: int) -> Read:
    return lambda: whole[start : start + count]


def is_finite(rows: mx.array) -> bool:
    """Whether no value is NaN or infinite. `rows` is contiguous."""
    if rows.dtype not in SPECIAL:
        return not mx.issubdtype(rows.dtype, mx.floating) or bool(mx.all(mx.isfinite(rows)).item())
    signed, infinity = SPECIAL[rows.dtype]
    bits = as_numpy(rows).view(signed)
    unsigned = bits.view(f"u{bits.itemsize}")
    # as integers, NaN and infinity are the largest of their sign; the sign's bit makes an unsigned integer large
    return bits.size == 0 or bool(bits.max() < infinity and unsigned.max() < infinity + (1 << (8 * bits.itemsize - 1)))


def opened(path: Path, config: dict[str, Any]) -> tuple[nn.Module, dict[str, Any], dict[str, Source]]:
    """The network of a folder of the checked `config`, the config that describes it, and its weights by name, in order.

    Reads no weights. The network holds them as well: whoever wants them let go lets the network go. Raises ModelError.
    """
    files: dict[int, tuple[str, mx.array]] = {}  # what the files gave, by its identity: while it is held, no other's
    net, config = model.network(
        path, config, lambda given: files.update({id(array): (name, array) for name, array in given.items()})
    )
    stored = {name: (file, each) for file in model.weight_files(path) for name, each in headers.read(file).items()}
    weights = {}
    for name, array in tree_flatten(net.parameters()):
        original, _ = files.get(id(array), ("", array))
        weights[name] = Source(array, _place(stored.get(original), array))
    return net, config, weights


def _place(stored: tuple[Path, headers.Tensor] | None, array: mx.array) -> Place | None:
    if stored is None or array.dtype not in STORED:
        return None
    file, tensor = stored
    as_it_is = tensor.dtype == NAMES[array.dtype] and tensor.shape == tuple(array.shape)
    return Place(file, tensor.start) if as_it_is else None
