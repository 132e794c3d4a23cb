"""Attention to train with: its weights, a number for each pair of tokens, are computed again instead of being kept.

MLX's own keeps them for the backward pass on a CPU and on Metal, also those that a causal mask makes 0. Knows arrays;
`lean` gives it to the networks that run inside, and leaves nothing patched.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import mlx.core as mx

from mlxtune.machine import power_of_two

LEAST = -100.0  # log2 of the least weight beside a largest of 1; far lower, a CPU computes powers slowly
Block = tuple[int, int, int]  # queries from, to, and the number of keys that they may see


def attention(
    queries: mx.array, keys: mx.array, values: mx.array, scale: float, mask: mx.array | str | None, size: int
) -> mx.array:
    """softmax(scale·Q·Kᵀ, where `mask` is true)·V (B, H, T, E), about `size` queries after the other.

    queries (B, H, T, D), keys (B, K, S, D), values (B, K, S, E), where K divides H; mask: none, `causal`, whose last
    query sees all keys, or booleans that broadcast to (B, H, T, S).

    Kept for the backward pass are these, the output O and, of each query, log2 of the sum of its weights, L. With
    scores S to the base of 2, P = 2^(S - L); of a gradient dO, dV = Pᵀ·dO, and the scores' is
    P∘(dO·Vᵀ - sum(dO∘O)). After "FlashAttention-2" (Dao 2023, https://arxiv.org/abs/2307.08691, section 3.1).
    """
    batch, heads, length, _ = queries.shape
    groups = keys.shape[1]
    causal = isinstance(mask, str)
    blocks = _blocks(length, keys.shape[2], size, causal)
    hidden = _hidden(blocks, mask)
    log2 = scale * math.log2(math.e)

    def in_groups(each: mx.array, start: int, end: int) -> mx.array:
        """(B, H, T, X) -> of `end - start` queries (B, K, H/K·(end - start), X)"""
        return each[:, :, start:end].reshape(batch, groups, -1, each.shape[-1])

    def scores(queries: mx.array, keys: mx.array, number: int) -> mx.array:
        """scale · log2 e · Q·Kᵀ (B, K, N, S') of the block with that number, in float32, -max where hidden"""
        start, end, seen = blocks[number]
        made = (in_groups(queries, start, end) * log2) @ keys[:, :, :seen].swapaxes(-1, -2)
        made = made.astype(mx.float32)
        added = hidden[number]
        if added is None:
            return made
        return (made.reshape(batch, heads, end - start, seen) + added).reshape(made.shape)

    def heads_again(parts: Sequence[mx.array]) -> mx.array:
        """of each block (B, K, N, X) -> (B, H, T, X)"""
        return mx.concatenate([part.reshape(batch, heads, -1, part.shape[-1]) for part in parts], axis=2)

    @mx.custom_function
    def both(queries: mx.array, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        outputs: list[mx.array] = []
        sums: list[mx.array] = []
        for number, (_, _, seen) in enumerate(blocks):
            (asked,) = mx.depends([queries], outputs[-1:])  # else MLX could make all blocks at once
            found = scores(asked, keys, number)
            most = found.max(axis=-1, keepdims=True)
            weights = power_of_two(mx.maximum(found - most, LEAST))
            total = weights.sum(axis=-1, keepdims=True)
            outputs.append((weights.astype(values.dtype) @ values[:, :, :seen]) / total.astype(values.dtype))
            sums.append(most + mx.log2(total))
        return heads_again(outputs), heads_again(sums)

    @both.vjp
    def slopes(
        primals: Sequence[mx.array], cotangents: Sequence[mx.array], made: Sequence[mx.array]
    ) -> tuple[mx.array, ...]:
        queries, keys, values = primals
        slope, (output, sums) = cotangents[0], made
        inner = (slope * output).astype(mx.float32).sum(axis=-1, keepdims=True)
        of_queries: list[mx.array] = []
        of_keys, of_values = _Tails(), _Tails()
        for number in reversed(range(len(blocks))):
            start, end, seen = blocks[number]
            (given,) = mx.depends([slope], of_queries[-1:])
            of_output = in_groups(given, start, end)
            exponents = scores(queries, keys, number) - in_groups(sums, start, end)
            weights = power_of_two(mx.maximum(exponents, LEAST))
            of_weights = of_output @ values[:, :, :seen].swapaxes(-1, -2)
            of_scores = (weights * (of_weights - in_groups(inner, start, end))).astype(queries.dtype) * scale
            of_queries.append(of_scores @ keys[:, :, :seen])
            of_keys.add(of_scores.swapaxes(-1, -2) @ in_groups(queries, start, end))
            of_values.add(weights.astype(slope.dtype).swapaxes(-1, -2) @ of_output)
        return heads_again(of_queries[::-1]), of_keys.whole(), of_values.whole()

    output, _ = cast(tuple[mx.array, mx.array], both(queries, keys, values))
    return output


class _Tails:
    """The sum of arrays (B, K, S', X), each no longer than the one before, over their common beginnings."""

    def __init__(self) -> None:
        self.sum: mx.array | None = None
        self.tails: list[mx.array] = []

    def add(self, part: mx.array) -> None:
        if self.sum is None:
            self.sum = part
            return
        length = part.shape[2]
        if length < self.sum.shape[2]:
            self.tails.append(self.sum[:, :, length:])
        self.sum = self.sum[:, :, :length] + part

    def whole(self) -> mx.array:
        assert self.sum is not None
        return mx.concatenate([self.sum, *self.tails[::-1]], axis=2) if self.tails else self.sum


def _blocks(length: int, keys: int, size: int, causal: bool) -> list[Block]:
    """Blocks of like length, about `size`."""
    count = max(1, round(length / size))
    bounds = [length * i // count for i in range(count + 1)]
    before = keys - length
    return [(start, end, before + end if causal else keys) for start, end in itertools.pairwise(bounds)]


def _hidden(blocks: Sequence[Block], mask: mx.array | str | None) -> list[mx.array | None]:
    """What is added to the scores of each block (…, N, S')."""
    if mask is None:
        return [None] * len(blocks)
    least = mx.array(mx.finfo(mx.float32).min)
    if isinstance(mask, str):
        return [
            mx.where(mx.arange(seen - (end - start), seen)[:, None] >= mx.arange(seen), 0.0, least)
            for start, end, seen in blocks
        ]
    added = mx.where(mask, 0.0, least)
    return [added if added.shape[-2] == 1 else added[..., start:end, :] for start, end, _ in blocks]


@contextmanager
def lean(size: int | None, shortest: int = 0) -> Iterator[None]:
    """Inside, networks attend as above, `size` queries at a time, of rows with `shortest` tokens or more.

    With sinks, with a mask of numbers, or where no size is given, they use MLX's own attention as always.
    """
    own = mx.fast.scaled_dot_product_attention

    def chosen(queries: mx.array, keys: mx.array, values: mx.array, *, scale: float, **others: Any) -> mx.array:
        mask = others.get("mask")
        known = mask is None or (mask.dtype == mx.bool_ if isinstance(mask, mx.array) else mask == "causal")
        plain = any(value is not None for name, value in others.items() if name != "mask")
        if size is None or plain or not known or queries.shape[2] < shortest:
            return own(queries, keys, values, scale=scale, **others)
        return attention(queries, keys, values, scale, mask, size)

    mx.fast.scaled_dot_product_attention = chosen  # type: ignore[assignment]
    try:
        yield
    finally:
        mx.fast.scaled_dot_product_attention = own
