"""The tokens that all rows begin with, computed once for all rows of a batch. Knows networks and samples.

Its keys and values stand before those of each row, so losses and gradients are those of the whole rows.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxtune.borrow import create_attention_mask
from mlxtune.caches import given, tried
from mlxtune.data.render import Sample
from mlxtune.head import alike


class Recorder:
    """A cache that holds the keys and values that it gets."""

    offset = 0

    def __init__(self) -> None:
        self.held: list[mx.array] = []

    def make_mask(self, length: int, return_array: bool = False, window_size: int | None = None) -> Any:
        return create_attention_mask(length, self.offset, return_array, window_size)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        self.held = [keys, values]
        return keys, values


class Prefix(Recorder):
    """A cache that puts the keys and values (1, H, P, D) of a prefix before those that it gets, and keeps nothing."""

    def __init__(self, held: list[mx.array], length: int) -> None:
        self.held, self.offset = held, length

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        before_keys, before_values = self.held
        return _behind(before_keys, keys), _behind(before_values, values)


def _behind(prefix: mx.array, rows: mx.array) -> mx.array:
    """(1, H, P, D), (B, H, T, D) -> (B, H, P + T, D)"""
    return mx.concatenate([mx.broadcast_to(prefix, (len(rows), *prefix.shape[1:])), rows], axis=2)


@contextmanager
def shared(net: nn.Module, tokens: Sequence[int]) -> Iterator[None]:
    """Inside, `net` takes the rows to begin with `tokens`, which it computes once, at the start."""
    if not tokens:
        yield
        return
    with given(net, Recorder) as recorders:
        net(mx.array([tokens]))
    # others than those recorded, because a block may be computed again in the backward pass
    caches = iter([Prefix(each.held, len(tokens)) for each in recorders])
    with given(net, lambda: next(caches)):
        yield


def common(samples: Sequence[Sample]) -> list[int]:
    """The longest run of tokens that all samples begin with and learn nothing of, less its last token.

    That one begins what is left of each sample: it predicts the next token, which may be learned.
    """
    first = samples[0].tokens
    length = len(first)
    for sample in samples:
        length = min(length, len(sample.tokens) - 1)
        pairs = zip(first[:length], sample.tokens, strict=False)
        length = next((i for i, (one, other) in enumerate(pairs) if one != other), length)
        learned = (i for i, trained in enumerate(sample.trained[1:length], start=1) if trained)
        length = next(learned, length)
    return first[: max(0, length - 1)]


def without(samples: Sequence[Sample], length: int) -> list[Sample]:
    """The samples without their first `length` tokens."""
    return [
        replace(
            sample,
            tokens=sample.tokens[length:],
            trained=sample.trained[length:],
            prompt_length=max(0, sample.prompt_length - length),
        )
        for sample in samples
    ]


def begin_with(samples: Sequence[Sample], tokens: list[int]) -> bool:
    """Whether all samples begin with `tokens`, learn nothing of them or of the next one, and go on."""
    count = len(tokens)
    return all(
        sample.tokens[:count] == tokens and len(sample.tokens) >= count + 2 and not any(sample.trained[1 : count + 1])
        for sample in samples
    )


def supported(net: nn.Module, length: int, width: int, vocabulary: int) -> bool:
    """Whether rows of a `width` behind a prefix get the logits that they get as a whole, tried with random tokens."""
    random = np.random.default_rng(0)
    prefix = random.integers(0, vocabulary, length)
    rows = random.integers(0, vocabulary, (2, width))
    whole = np.concatenate([np.broadcast_to(prefix, (2, length)), rows], axis=1)

    def works() -> bool:
        with shared(net, prefix.tolist()):
            found = net(mx.array(rows))
        return alike(found, net(mx.array(whole))[:, length:])

    return tried(net, works)
