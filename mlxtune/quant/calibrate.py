"""What goes into the layers of a network while it reads samples. Knows networks and samples, not how these are used.

Nothing is left patched, and no logits are made: MLX is lazy, so what no layer's input needs is never computed.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxtune.caches import measured
from mlxtune.data.render import Sample

MOST_TOKENS = 4096  # of a batch


@dataclass(frozen=True, slots=True)
class Inputs:
    """Of the inputs x (I,) of a layer: mean_square (I,) the mean of x², hessian (I, I) that of x·xᵀ or None, float32.

    Means over `count` vectors.
    """

    mean_square: mx.array
    hessian: mx.array | None
    count: int


def gather(
    net: nn.Module,
    samples: Sequence[Sample],
    names: Sequence[str],
    hessian: bool,
    on_tokens: Callable[[int], None] = lambda done: None,
) -> dict[str, Inputs]:
    """The inputs of the layers called `names` over all tokens of `samples`.

    A layer that got none is left out: an embedding that makes no logits, an expert layer that was never asked.
    Rows of the same length are read together, so no layer sees padding. Layers that read the same share one `Inputs`.
    """
    layers = dict(net.named_modules())
    sums: dict[tuple[str, ...], tuple[mx.array, int]] = {}
    done = 0
    with measured(net), _watched({name: layers[name] for name in names}) as seen:
        for tokens in _batches(samples):
            seen.clear()
            net(mx.array(tokens))
            for inputs, readers in seen.values():
                flat = inputs.reshape(-1, inputs.shape[-1]).astype(mx.float32)
                total = flat.T @ flat if hessian else (flat * flat).sum(axis=0)
                key = tuple(readers)
                if key in sums:
                    total = sums[key][0] + total
                sums[key] = (total, len(flat) + (sums[key][1] if key in sums else 0))
            mx.eval([total for total, _ in sums.values()])
            done += tokens.size
            on_tokens(done)
        seen.clear()
    read_by = {name: tuple(key for key in sums if name in key) for name in names}
    means = {keys: _mean([sums[key] for key in keys], hessian) for keys in set(read_by.values()) if keys}
    return {name: means[keys] for name, keys in read_by.items() if keys}


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
