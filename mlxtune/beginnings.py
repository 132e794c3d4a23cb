"""What many prompts begin with, computed once and copied into the cache of each. Knows networks and their caches.

Beginnings are found among tokens; that a copied cache changes nothing is tried with random ones before it is used.
"""

import heapq
import itertools
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from mlxtune.borrow import make_prompt_cache
from mlxtune.caches import tried
from mlxtune.head import alike, find

LEAST_ROWS, LEAST_TOKENS = 4, 8  # a beginning of fewer is not worth a cache
MOST = 4  # caches at once: each takes the memory of a row
STEP = 2048  # tokens computed at once, as mlx-lm does
PROBED = (5, 2)  # tokens behind a random beginning: rows of unequal length


def shared(prompts: Sequence[Sequence[int]]) -> list[int]:
    """How many tokens of each prompt are worth computing once, as at least 4 prompts begin with them.

    At most 4 different beginnings, those that save most; never a prompt's last token, whose logits begin the answer.
    """
    lengths = [0] * len(prompts)
    different = 0
    order = itertools.count()  # equal savings: the first one found
    waiting: list[tuple[int, int, list[int], int, int]] = []

    def consider(rows: list[int], known: int, granted: int) -> None:
        if len(rows) >= LEAST_ROWS:
            length = _common([prompts[row] for row in rows], known)
            heapq.heappush(waiting, (-len(rows) * (length - granted), next(order), rows, length, granted))

    consider([row for row, prompt in enumerate(prompts) if len(prompt) > 1], 0, 0)
    while waiting and different < MOST:
        _, _, rows, length, granted = heapq.heappop(waiting)
        if length - granted >= LEAST_TOKENS:
            different += 1
            granted = length
            for row in rows:
                lengths[row] = length
        longer: dict[int, list[int]] = {}
        for row in rows:
            if len(prompts[row]) > length + 1:
                longer.setdefault(prompts[row][length], []).append(row)
        for some in longer.values():
            consider(some, length + 1, granted)
    return lengths


def _common(prompts: Sequence[Sequence[int]], known: int) -> int:
    """The length that all prompts share, their last tokens aside; the first `known` tokens are the same."""
    first, length = prompts[0], min(map(len, prompts)) - 1
    for prompt in prompts[1:]:
        length = next((i for i in range(known, length) if prompt[i] != first[i]), length)
    return length


def computed(net: nn.Module, tokens: Sequence[int]) -> list[Any]:
    """The caches of `net` once it has read `tokens`."""
    caches: list[Any] = make_prompt_cache(net)
    feed(net, np.array([tokens], dtype=np.int32), caches)
    return caches


def feed(net: nn.Module, tokens: npt.NDArray[np.int32], caches: list[Any]) -> None:
    """Has `net` read `tokens` (B, T) behind what is in its `caches`, which then hold them too."""
    for start in range(0, tokens.shape[1], STEP):
        net(mx.array(tokens[:, start : start + STEP]), cache=caches)
        mx.eval([cache.state for cache in caches])


def copies_are_exact(net: nn.Module, length: int) -> bool:
    """Whether rows that begin in copies of one cache get the logits of whole rows, tried with random tokens.

    Two rows of unequal length behind `length` tokens, then two more tokens each, as a batch is fed. With a `length` of
    0 it is tried whether unequal rows can stand in one batch at all: in some architectures padding changes them.
    """

    def works() -> bool:
        vocabulary = net(mx.zeros((1, 1), dtype=mx.int32)).shape[-1]  # the shape is known without computing
        random = np.random.default_rng(0)
        begin = random.integers(0, vocabulary, length)
        rows = [random.integers(0, vocabulary, count) for count in PROBED]
        further = random.integers(0, vocabulary, (len(rows), 2))
        one = computed(net, begin.tolist())
        caches = [cache.merge([cache] * len(rows)) for cache in one]
        widest = max(PROBED)
        for cache in caches:
            cache.prepare(lengths=list(PROBED), right_padding=[widest - count for count in PROBED])
        fed = net(mx.array(np.stack([np.pad(row, (0, widest - len(row))) for row in rows])), cache=caches)
        for cache in caches:
            cache.finalize()
        last = net(mx.array(further), cache=caches)
        head = find(net)  # without it the logits of the whole beginning would be made
        for number, row in enumerate(rows):
            whole = mx.array(np.concatenate([begin, row, further[number]])[None])
            at = mx.arange(length, whole.size)
            expected = net(whole)[0, length:] if head is None else head.logits(whole, at)
            if not alike(mx.concatenate([fed[number, : len(row)], last[number]]), expected):
                return False
        return True

    return tried(net, works)
