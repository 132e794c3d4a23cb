"""The gradient of an update by parameter, for tests."""

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxtune import gradient
from mlxtune.data.batches import Batch
from mlxtune.vectors import Vectors
from mlxtune.workers import ALONE, Workers


def loss_and_gradient(
    net: nn.Module, batches: Sequence[Batch], tokens: int, prefix: Sequence[int] = (), workers: Workers = ALONE
) -> tuple[float, dict[str, mx.array]]:
    """`gradient.token_weighted` of what `net` trains, each by its name."""
    vectors = Vectors.of(net, joined=False)
    function = gradient.value_and_grad(net, vectors, False, prefix)
    return gradient.token_weighted(function, vectors, batches, tokens, workers)


def difference(one: dict[str, mx.array], other: dict[str, mx.array]) -> float:
    """The norm of the difference of two gradients, relative to that of the other."""
    assert one.keys() == other.keys()
    pairs = [(np.array(one[name], dtype=np.float64), np.array(other[name], dtype=np.float64)) for name in one]
    norms = [(np.linalg.norm(mine - theirs), np.linalg.norm(theirs)) for mine, theirs in pairs]
    apart, whole = np.linalg.norm(np.array(norms), axis=0)
    return float(apart / whole)
