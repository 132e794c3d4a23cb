"""Loss and gradient of one update, however its rows are batched. Knows networks and batches, not optimizers."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from mlxtune import likelihood
from mlxtune.data.batches import Batch, epoch_order
from mlxtune.data.render import Sample
from mlxtune.head import find
from mlxtune.packing import packed
from mlxtune.prefix import shared
from mlxtune.recipe import Recipe
from mlxtune.workers import ALONE, Workers

ValueAndGrad = Callable[..., tuple[mx.array, Any]]


def value_and_grad(net: nn.Module, compile: bool, prefix: Sequence[int] = ()) -> ValueAndGrad:
    """The function from a batch's arrays to their summed nats and the gradient of what `net` trains.

    Each row begins with the tokens of `prefix`, which the arrays don't have.
    """
    head = find(net)

    def nats(tokens: mx.array, wanted: mx.array, segments: mx.array | None = None) -> mx.array:
        with shared(net, prefix), packed(net, segments):
            return likelihood.row_nats(net, tokens, wanted, head, learn=True).sum()

    function: ValueAndGrad = nn.value_and_grad(net, nats)
    if compile:
        # the network is an output too: tracing the gradient puts its parameters through `update`
        state = [net.state, mx.random.state]
        function = mx.compile(function, inputs=state, outputs=state)
    return function


def update_order(samples: Sequence[Sample], recipe: Recipe) -> Iterator[list[list[int]]]:
    """Row indices of each batch of each update, epoch after epoch, without end. No update spans two epochs."""
    lengths = [len(sample.tokens) for sample in samples]
    accumulate = recipe.train.grad_accumulation_steps
    for epoch in itertools.count():
        batches = epoch_order(lengths, recipe.train.batch_size, recipe.seed, epoch)
        for start in range(0, len(batches), accumulate):
            yield batches[start : start + accumulate]


def token_weighted(
    function: ValueAndGrad, net: nn.Module, batches: Sequence[Batch], tokens: int, workers: Workers = ALONE
) -> tuple[float, Any]:
    """Loss in nats per token and gradient of an update of `tokens` supervised tokens: those of the one big batch.

    `batches` are this worker's, which may have none; `function` is that of `value_and_grad`.
    """
    total = 0.0
    gradient = None
    for batch in batches:
        for nats, part in likelihood.in_parts(batch, function):
            gradient = part if gradient is None else tree_map(mx.add, gradient, part)
            total += cast(float, nats.item())
        mx.eval(gradient)
    if gradient is None:
        gradient = tree_map(mx.zeros_like, net.trainable_parameters())
    (total,) = workers.summed([total])
    return total / tokens, tree_map(lambda each: each / tokens, workers.summed_gradient(gradient))
