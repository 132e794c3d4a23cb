"""Cross-entropy of logits, at once or in chunks whose logits are gone before the next ones are made.

Knows arrays, not networks.
"""

from collections.abc import Callable
from typing import cast

import mlx.core as mx

Tail = Callable[[mx.array], mx.array]  # hidden states (N, D) -> logits (N, V), each from its own alone


def token_nats(logits: mx.array, targets: mx.array) -> mx.array:
    """-log softmax(logits)[target] (N,) of logits (N, V) and targets (N,), in float32 whatever the logits are in.

    Its slope, softmax(logits) less one at the target, is made at once, not by way of those of its parts (each (N, V)).
    """

    @mx.custom_function
    def nats(logits: mx.array) -> mx.array:
        wide = logits.astype(mx.float32)
        return mx.logsumexp(wide, axis=-1) - mx.take_along_axis(wide, targets[:, None], axis=-1).squeeze(-1)

    @nats.vjp
    def _(logits: mx.array, cotangent: mx.array, made: mx.array) -> mx.array:
        slope = mx.softmax(logits.astype(mx.float32), axis=-1) * cotangent[:, None]
        return slope.at[mx.arange(len(targets)), targets].subtract(cotangent).astype(logits.dtype)

    return cast(mx.array, nats(logits))


def chunk_size(vocabulary: int, most_bytes: int) -> int:
    """Positions whose float32 logits take `most_bytes`, at least one."""
    return max(1, most_bytes // (4 * vocabulary))


def chunked_nats(tail: Tail, hidden: mx.array, targets: mx.array, size: int) -> mx.array:
    """`token_nats(tail(hidden), targets)` (N,), `size` positions after the other. hidden (N, D), targets (N,)."""
    nats: list[mx.array] = []
    for some, wanted in _chunks(hidden, targets, size):
        (given,) = mx.depends([some], nats[-1:])  # else MLX could make all chunks at once
        nats.append(token_nats(tail(given), wanted))
    return mx.concatenate(nats)


def learned_nats(tail: Tail, hidden: mx.array, targets: mx.array, size: int) -> mx.array:
    """`chunked_nats` to take the gradient of by `hidden`, and by nothing else that `tail` computes with.

    A position's nats l(h) depend on its own hidden state alone, so dl/dh (N, D) is computed in the forward pass, with
    the logits still there, and the backward pass is a product. After "Cut Your Losses in Large-Vocabulary Language
    Models" (Wijmans et al. 2024, https://arxiv.org/abs/2411.09009) and Liger Kernel (Hsu et al. 2024,
    https://arxiv.org/abs/2410.10989), which do the same on a GPU.
    """

    @mx.custom_function
    def both(hidden: mx.array) -> tuple[mx.array, mx.array]:
        nats: list[mx.array] = []
        slopes: list[mx.array] = []
        for some, wanted in _chunks(hidden, targets, size):
            ones = mx.ones(wanted.shape)
            inputs = mx.depends([some], nats[-1:] + slopes[-1:])
            (made,), (slope,) = mx.vjp(lambda h, wanted=wanted: token_nats(tail(h), wanted), inputs, [ones])
            nats.append(made)
            slopes.append(slope)
        return mx.concatenate(nats), mx.concatenate(slopes)

    @both.vjp
    def _(hidden: mx.array, cotangents: tuple[mx.array, ...], made: tuple[mx.array, ...]) -> mx.array:
        return (cotangents[0][:, None] * made[1]).astype(hidden.dtype)

    return cast(list[mx.array], both(hidden))[0]


def _chunks(hidden: mx.array, targets: mx.array, size: int) -> list[tuple[mx.array, mx.array]]:
    return [(hidden[i : i + size], targets[i : i + size]) for i in range(0, len(targets), size)]
