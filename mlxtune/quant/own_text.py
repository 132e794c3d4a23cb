"""Rows that a network writes itself: something to calibrate on where a user has no data. Knows networks and tokens."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxtune.borrow import make_prompt_cache
from mlxtune.caches import measured
from mlxtune.data.render import Sample


def write(net: nn.Module, rows: int, length: int, start: int, seed: int) -> list[Sample]:
    """`rows` rows of `length` tokens from `start` on, each token drawn as `net` predicts it; pure in `seed`.

    They go on behind an end of text: what comes after it is another text.
    """
    key = mx.random.key(seed)
    with measured(net):
        cache = make_prompt_cache(net)
        token = mx.full((rows, 1), start, dtype=mx.int32)
        written = [token]
        for _ in range(length - 1):
            key, own = mx.random.split(key)
            logits = net(token, cache=cache)[:, -1].astype(mx.float32)
            token = mx.random.categorical(logits, key=own)[:, None].astype(mx.int32)
            mx.eval(token)
            written.append(token)
    tokens = np.array(mx.concatenate(written, axis=1)).tolist()
    return [Sample(f"own text:{row}", each, [True] * length, 0, None) for row, each in enumerate(tokens, 1)]
