"""Of tokens that a network predicts how unlikely they are, and whether it ranks them first. Knows networks."""

import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from mlxtune import machine
from mlxtune.attention import LEAST
from mlxtune.crossentropy import chunk_size
from mlxtune.head import Head, gathered


def row_figures(net: nn.Module, tokens: mx.array, wanted: mx.array, head: Head | None) -> mx.array:
    """Of each row's supervised tokens the summed nats, and how many of them the network ranks first: (B, 2) float32.

    tokens (B, T) int32, wanted (N,) int32 as `likelihood.wanted_at` has them. Logits are made as
    `likelihood.row_nats` makes them.
    """
    at = mx.maximum(wanted, 0)
    targets = tokens[:, 1:].reshape(-1)
    each = figures(net, tokens[:, :-1], at, np.arange(len(wanted)), targets[at], head)
    each = mx.where((wanted >= 0)[:, None], each, 0.0)
    return mx.zeros((targets.size, 2)).at[at].add(each).reshape(len(tokens), -1, 2).sum(axis=1)


def figures(
    net: nn.Module, tokens: mx.array, at: mx.array, which: npt.NDArray[np.integer], targets: mx.array, head: Head | None
) -> mx.array:
    """-log softmax(logits)[target] in nats, and 1 or 0 for ranked first or not: (M, 2) float32.

    The logits are those that tokens (B, T) give `at` (N,) places among B·T; which (M,), ascending: of which of these
    a target of `targets` (M,) is. With the `head` of `net` no other logits are made, and no more of them at once than
    `machine.chunk_bytes`.
    """
    if head is None:
        return _figures(gathered(net(tokens), at), mx.array(which), targets)
    size = chunk_size(head.vocabulary, machine.chunk_bytes(machine.device_kind()))
    if len(at) <= size:
        return _figures(head.logits(tokens, at), mx.array(which), targets)
    hidden = head.hidden(tokens, at)
    made: list[mx.array] = []
    for start in range(0, len(at), size):
        first, last = np.searchsorted(which, [start, start + size]).tolist()
        (some,) = mx.depends([hidden[start : start + size]], made[-1:])  # else MLX could make all logits at once
        made.append(_figures(head.logits_of(some, tokens), mx.array(which[first:last] - start), targets[first:last]))
    return mx.concatenate(made)


def _figures(logits: mx.array, which: mx.array, targets: mx.array) -> mx.array:
    """Logits (N, V), which (M,), targets (M,) -> (M, 2)"""
    wide = logits.astype(mx.float32)
    most = wide.max(axis=-1, keepdims=True)
    shares = machine.power_of_two(mx.maximum((wide - most) * math.log2(math.e), LEAST)).sum(axis=-1)
    nats = (most.squeeze(-1) + mx.log(shares))[which] - wide[which, targets]
    first = mx.argmax(logits, axis=-1)[which] == targets
    return mx.stack([nats, first.astype(mx.float32)], axis=-1)
