"""The logits of a network at chosen positions only. Knows networks whose head is one layer; nothing is left patched.

A network may scale and cap what comes out of its head. So the network itself is run, and what goes into the head is
changed on its way; MLX is lazy, so what a result does not need is never computed.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

HALF_TOLERANCE, TOLERANCE = 2e-2, 1e-4  # of equal logits, relative to the largest


@dataclass(frozen=True, slots=True)
class Head:
    """The layers of `net` of which one makes the logits, by the number of their outputs."""

    net: nn.Module
    layers: tuple[nn.Module, ...]
    vocabulary: int

    @property
    def frozen(self) -> bool:
        """Whether training changes nothing but blocks, which lie before the head."""
        blocks = sum(len(tree_flatten(block.trainable_parameters())) for block in self.net.layers)
        return blocks == len(tree_flatten(self.net.trainable_parameters()))

    def hidden(self, tokens: mx.array, at: mx.array) -> mx.array:
        """tokens (B, T), at (N,) places among B·T -> what goes into the head there (N, D)."""
        kept = []

        def keep(hidden: mx.array) -> mx.array:
            kept.append(gathered(hidden, at)[None])
            return kept[0]

        with self._before(tokens.shape, keep):
            self.net(tokens)
        return kept[0][0]

    def logits(self, tokens: mx.array, at: mx.array) -> mx.array:
        """tokens (B, T), at (N,) places among B·T -> logits there (N, V)."""
        with self._before(tokens.shape, lambda hidden: gathered(hidden, at)[None]):
            made: mx.array = self.net(tokens)
        return made[0]

    def logits_of(self, hidden: mx.array, tokens: mx.array) -> mx.array:
        """What goes into the head (N, D) -> logits (N, V). Of `tokens` (B, T) only the shape counts."""
        with self._before(tokens.shape, lambda _: hidden[None]):
            made: mx.array = self.net(tokens)
        return made[0]

    @contextmanager
    def _before(self, shape: tuple[int, ...], change: Callable[[mx.array], mx.array]) -> Iterator[None]:
        """Inside, the first layer of `layers` that gets a vector for each of (B, T) tokens gets `change` of them."""
        changed = False

        def hooked(call: Any) -> Any:
            def run(layer: nn.Module, hidden: mx.array, *args: Any, **kwargs: Any) -> Any:
                nonlocal changed
                if not changed and hidden.ndim == 3 and hidden.shape[:2] == shape:
                    changed = True
                    hidden = change(hidden)
                return call(layer, hidden, *args, **kwargs)

            return run

        plain = [type(layer) for layer in self.layers]
        for layer, kind in zip(self.layers, plain, strict=True):
            method = "as_linear" if hasattr(kind, "as_linear") else "__call__"
            layer.__class__ = type(kind.__name__, (kind,), {method: hooked(getattr(kind, method))})
        try:
            yield
        finally:
            for layer, kind in zip(self.layers, plain, strict=True):
                layer.__class__ = kind


def gathered(each: mx.array, at: mx.array) -> mx.array:
    """(B, T, D), at (N,) places among B·T -> (N, D)"""
    return each.reshape(-1, each.shape[-1])[at]


def find(net: nn.Module) -> Head | None:
    """The head of `net`, or None unless random tokens get the same logits through it as without."""
    tokens = mx.array([[1, 2, 3, 4], [4, 3, 2, 1]])
    vocabulary = net(tokens).shape[-1]  # the shape is known without computing
    layers = {id(each): each for each in net.modules() if _outputs(each) == vocabulary}
    if not layers:
        return None
    found = Head(net, tuple(layers.values()), vocabulary)
    training = net.training
    net.eval()
    try:
        at = mx.array([6, 1, 3])
        expected = gathered(net(tokens), at)
        same = alike(found.logits(tokens, at), expected)
        return found if same and alike(found.logits_of(found.hidden(tokens, at), tokens), expected) else None
    except (ValueError, IndexError):  # what an architecture makes of hidden states that it doesn't expect
        return None
    finally:
        net.train(training)


def _outputs(layer: nn.Module) -> int | None:
    """The outputs of a linear layer or the vectors of an embedding, with an adapter or without."""
    weight = layer.get("linear", layer.get("embedding", layer)).get("weight")
    return weight.shape[0] if isinstance(weight, mx.array) and weight.ndim == 2 else None


def alike(found: mx.array, expected: mx.array) -> bool:
    """Whether logits are the same up to rounding in the precision that they were computed in."""
    if found.shape != expected.shape:
        return False
    tolerance = TOLERANCE if found.dtype == mx.float32 else HALF_TOLERANCE
    one, other = found.astype(mx.float32), expected.astype(mx.float32)
    return bool((mx.abs(one - other).max() <= tolerance * mx.abs(other).max()).item())
