"""What goes into the layers of a network while it reads samples. Knows networks and samples, not how these are used.

The blocks come one after the other: what goes into a block is kept in a file, and the next pass begins there. So no
more of a model is read at once than a block, and no block is computed more than twice. Nothing is left patched, and no
logits are made: MLX is lazy, so what no layer's input needs is never computed.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxtune.caches import measured
from mlxtune.data.render import Sample
from mlxtune.shards import as_numpy

MOST_TOKENS = 2048  # of a batch


@dataclass(frozen=True, slots=True)
class Inputs:
    """Of the inputs x (I,) of a layer: mean_square (I,) the mean of x², hessian (I, I) that of x·xᵀ or None, float32.

    Means over `count` vectors.
    """

    mean_square: mx.array
    hessian: mx.array | None
    count: int


Sums = dict[tuple[str, ...], tuple[mx.array, int]]  # by the layers that read the same: of x·xᵀ or x², and how many


def gathered(
    make: Callable[[], nn.Module],
    samples: Sequence[Sample],
    names: Sequence[str],
    hessian: bool,
    on_tokens: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[dict[str, Inputs | None]]:
    """The inputs of the layers called `names` over all tokens of `samples`, those of a block of the network at a time.

    `make` gives the network, for each block anew: what it reads of its weights is let go after the block. The order is
    that of `by_block`. A layer that got no inputs has None: an embedding that makes no logits, an expert layer that was
    never asked. Rows of the same length are read together, so no layer sees padding. Layers that read the same share
    one `Inputs`. `on_tokens` is told how many tokens of how many went through the network, counted for each block.
    """
    batches = list(_batches(samples))
    stages = by_block(make(), names)
    total, done = sum(each.size for each in batches) * len(stages), 0
    with tempfile.TemporaryFile() as one, tempfile.TemporaryFile() as other:
        before: _Kept | None = None
        for number, some in enumerate(stages):
            net = make()
            layers = dict(net.named_modules())
            after, sums = _Kept(other if number % 2 else one), Sums()
            with measured(net), _watched({name: layers[name] for name in some}) as seen, _entered(net, number) as entry:
                for tokens in batches:
                    seen.clear()
                    entry.given, entry.left = before.next() if before is not None else None, None
                    net(mx.array(tokens))
                    _add(sums, seen, hessian)
                    left = entry.left if number + 1 < len(stages) and isinstance(entry.left, mx.array) else None
                    mx.eval([total for total, _ in sums.values()], [] if left is None else left)
                    after.put(left)
                    done += tokens.size
                    on_tokens(done, total)
                seen.clear()
                entry.given = entry.left = None
            del net, layers
            before = after.whole()
            if some:
                yield _means(sums, some, hessian)


def by_block(net: nn.Module, names: Sequence[str]) -> list[list[str]]:
    """The names of the layers in each block, up to the last that has any; those outside all come with the last one."""
    paths = {id(each): path for path, each in net.named_modules()}
    blocks = [f"{paths[id(block)]}." for block in getattr(net, "layers", ()) if id(block) in paths]
    inside = [[name for name in names if name.startswith(block)] for block in blocks]
    outside = [name for name in names if not any(name.startswith(block) for block in blocks)]
    if outside or not inside:
        return [*inside[:-1], [*inside[-1], *outside]] if inside else [outside]
    return inside[: max(number for number, some in enumerate(inside, start=1) if some or number == 1)]


class _Kept:
    """What goes into a block for each batch, in a file; None from the first that cannot be kept on."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.file.seek(0)
        self.kinds: list[tuple[tuple[int, ...], mx.Dtype]] | None = []
        self.at = 0

    def put(self, hidden: mx.array | None) -> None:
        if hidden is None or self.kinds is None:
            self.kinds = None
            return
        self.kinds.append((tuple(hidden.shape), hidden.dtype))
        self.file.write(as_numpy(mx.contiguous(hidden)).tobytes())

    def whole(self) -> "_Kept | None":
        """Itself, to be read from the start, or None where something is missing."""
        self.file.seek(0)
        return self if self.kinds else None

    def next(self) -> mx.array:
        assert self.kinds is not None
        shape, dtype = self.kinds[self.at]
        self.at += 1
        raw = mx.array(np.frombuffer(self.file.read(int(np.prod(shape)) * dtype.size), dtype=np.uint8))
        return raw.view(dtype).reshape(shape)


@dataclass(slots=True)
class _Entry:
    """What a block is `given` in place of its input, if anything, and what is `left` to go into the next one."""

    given: mx.array | None = None
    left: Any = None


@contextmanager
def _entered(net: nn.Module, number: int) -> Iterator[_Entry]:
    """Inside, the `number`-th block of `net` takes what it is given, and the input of the next one is noted.

    What came before the block is then needed by nothing, and so not computed, unless the architecture hands on more
    than the hidden states. A network that goes through its blocks several times is entered the first time.
    """
    entry = _Entry()
    blocks = list(getattr(net, "layers", ()))[number : number + 2]
    plain = [type(block) for block in blocks]

    def entering(call: Any) -> Any:
        def run(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if args and entry.given is not None:
                args, entry.given = (entry.given, *args[1:]), None
            return call(block, *args, **kwargs)

        return run

    def leaving(call: Any) -> Any:
        def run(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if args and entry.left is None:
                entry.left = args[0]
            return call(block, *args, **kwargs)

        return run

    for block, kind, hook in zip(blocks, plain, (entering, leaving), strict=False):
        block.__class__ = type(kind.__name__, (kind,), {"__call__": hook(kind.__call__)})
    try:
        yield entry
    finally:
        for block, kind in zip(blocks, plain, strict=True):
            block.__class__ = kind


def _add(sums: Sums, seen: dict[int, tuple[mx.array, list[str]]], hessian: bool) -> None:
    for inputs, readers in seen.values():
        flat = inputs.reshape(-1, inputs.shape[-1]).astype(mx.float32)
        total = flat.T @ flat if hessian else (flat * flat).sum(axis=0)
        before, count = sums.get(tuple(readers), (None, 0))
        sums[tuple(readers)] = (total if before is None else before + total, count + len(flat))


def _means(sums: Sums, names: Sequence[str], hessian: bool) -> dict[str, Inputs | None]:
    """Of each layer, evaluated, as threads compute no graphs of another; `sums` is emptied, its memory used again."""
    read_by = {name: tuple(key for key in sums if name in key) for name in names}
    means = {keys: _mean([sums[key] for key in keys], hessian) for keys in set(read_by.values()) if keys}
    sums.clear()
    mx.eval([(each.mean_square, [] if each.hessian is None else each.hessian) for each in means.values()])
    return {name: means.get(keys) for name, keys in read_by.items()}


def _mean(sums: list[tuple[mx.array, int]], hessian: bool) -> Inputs:
    count = sum(each for _, each in sums)
    total = sums[0][0] if len(sums) == 1 else mx.stack([each for each, _ in sums]).sum(axis=0)
    mean = total / count
    return Inputs(mx.diag(mean) if hessian else mean, mean if hessian else None, count)


def _batches(samples: Sequence[Sample]) -> Iterator[np.ndarray[Any, np.dtype[np.int32]]]:
    """Tokens (B, T) of rows of one length, at most MOST_TOKENS unless a single row has more."""
    by_length: dict[int, list[list[int]]] = {}
    for sample in samples:
        if sample.tokens:
            by_length.setdefault(len(sample.tokens), []).append(sample.tokens)
    for length, rows in sorted(by_length.items()):
        size = max(1, MOST_TOKENS // length)
        for start in range(0, len(rows), size):
            yield np.array(rows[start : start + size], dtype=np.int32)


@contextmanager
def _watched(layers: dict[str, nn.Module]) -> Iterator[dict[int, tuple[mx.array, list[str]]]]:
    """Inside, what the layers are called with is noted: by its identity, the array and the names of who got it.

    An embedding is watched where it makes logits.
    """
    seen: dict[int, tuple[mx.array, list[str]]] = {}

    def hooked(name: str, width: int, call: Any) -> Any:
        def run(layer: nn.Module, inputs: mx.array, *args: Any, **kwargs: Any) -> Any:
            if inputs.shape[-1] == width:
                seen.setdefault(id(inputs), (inputs, []))[1].append(name)
            return call(layer, inputs, *args, **kwargs)

        return run

    plain = {name: type(layer) for name, layer in layers.items()}
    for name, layer in layers.items():
        kind = plain[name]
        method = "as_linear" if hasattr(kind, "as_linear") else "__call__"
        hook = hooked(name, _inputs(layer), getattr(kind, method))
        layer.__class__ = type(kind.__name__, (kind,), {method: hook})
    try:
        yield seen
    finally:
        for name, layer in layers.items():
            layer.__class__ = plain[name]


def _inputs(layer: nn.Module) -> int:
    """How wide the vectors are that a layer reads, packed or not."""
    width: int = layer.weight.shape[-1]
    return width * 32 // layer.bits if "scales" in layer else width
