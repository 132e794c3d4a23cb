"""Several rows in one line of a batch, none of which sees another. Knows networks, not training.

A row in a line has its tokens side by side as before, but at later positions: the same where only distances count.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxtune.caches import given, tried
from mlxtune.head import alike


class Segments:
    """A cache that keeps nothing and lets a token see what comes before it in its own segment only.

    segments (B, T): the number of each token's segment.
    """

    offset = 0

    def __init__(self, segments: mx.array):
        self.segments = segments
        self.held: list[mx.array] = []

    def make_mask(self, length: int, return_array: bool = False, window_size: int | None = None) -> mx.array:
        """The mask (B, 1, T, T) of who sees whom."""
        place = mx.arange(length)
        distance = place[:, None] - place[None]
        seen = distance >= 0
        if window_size is not None:
            seen = seen & (distance < window_size)
        segments = self.segments[:, :length]
        return (seen & (segments[:, :, None] == segments[:, None, :]))[:, None]

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        return keys, values


@contextmanager
def packed(net: nn.Module, segments: mx.array | None) -> Iterator[None]:
    """Inside, a token sees only its own segment; segments (B, T), of which the network may get the first columns."""
    if segments is None:
        yield
        return
    with given(net, lambda: Segments(segments)):
        yield


def supported(net: nn.Module, width: int, vocabulary: int) -> bool:
    """Whether rows packed in lines of a `width` get the logits that they get alone, tried with random tokens."""
    tokens = mx.array(np.random.default_rng(0).integers(0, vocabulary, (2, width)))
    cuts = [width // 3, width // 2]
    segments = mx.array([[0] * cut + [1] * (width - cut) for cut in cuts])

    def works() -> bool:
        with packed(net, segments):
            together = net(tokens)
        return all(
            alike(together[line, rows], net(tokens[line : line + 1, rows])[0])
            for line, cut in enumerate(cuts)
            for rows in (slice(cut), slice(cut, width))
        )

    return tried(net, works)
