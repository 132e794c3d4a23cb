"""Loss and gradient of one update, however its rows are batched. Knows networks and batches, not optimizers."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import cast

import mlx.core as mx
import mlx.nn as nn

from mlxtune import likelihood, machine
from mlxtune.attention import lean
from mlxtune.data.batches import Batch, epoch_order
from mlxtune.data.render import Sample
from mlxtune.head import find
from mlxtune.packing import packed
from mlxtune.prefix import shared
from mlxtune.recipe import Recipe
from mlxtune.vectors import Vectors
from mlxtune.workers import ALONE, Workers

Arrays = dict[str, mx.array]
ValueAndGrad = Callable[..., tuple[mx.array, Arrays]]


def value_and_grad(net: nn.Module, vectors: Vectors, compile: bool, prefix: Sequence[int] = ()) -> ValueAndGrad:
    """The function from what `net` trains and a batch's arrays to their summed nats and the gradient, by name.

    Each row begins with the tokens of `prefix`, which the arrays don't have.
    """
    head = find(net)

    def nats(trained: Arrays, tokens: mx.array, wanted: mx.array, segments: mx.array | None = None) -> mx.array:
        vectors.put(trained)
        with shared(net, prefix), packed(net, segments):
            return likelihood.row_nats(net, tokens, wanted, head, learn=True).sum()

    function: ValueAndGrad = mx.value_and_grad(nats)
    if compile:
        function = mx.compile(function, inputs=[mx.random.state], outputs=[mx.random.state])
    blocks = machine.attention_blocks(machine.device_kind())

    def leanly(trained: Arrays, *arrays: mx.array) -> tuple[mx.array, Arrays]:
        # around the backward pass too, where a block may be computed again, with what it then is given
        with lean(*blocks), vectors.kept():
            return function(trained, *arrays)

    return leanly


def update_order(samples: Sequence[Sample], recipe: Recipe) -> Iterator[list[list[int]]]:
    """Row indices of each batch of each update, epoch after epoch, without end. No update spans two epochs."""
    lengths = [len(sample.tokens) for sample in samples]
    accumulate = recipe.train.grad_accumulation_steps
    for epoch in itertools.count():
        batches = epoch_order(lengths, recipe.train.batch_size, recipe.seed, epoch)
        for start in range(0, len(batches), accumulate):
            yield batches[start : start + accumulate]


def token_weighted(
    function: ValueAndGrad, vectors: Vectors, batches: Sequence[Batch], tokens: int, workers: Workers = ALONE
) -> tuple[float, Arrays]:
    """Loss in nats per token and gradient of an update of `tokens` supervised tokens: those of the one big batch.

    `batches` are this worker's, which may have none; `function` is that of `value_and_grad`; the gradient is by vector.
    """
    trained = vectors.now()
    total = 0.0
    gradient: Arrays | None = None
    for batch in batches:
        most = machine.most_tokens(machine.device_kind())
        for nats, part in likelihood.in_parts(batch, partial(function, trained), most):
            joined = vectors.join(part)
            gradient = joined if gradient is None else {name: gradient[name] + joined[name] for name in joined}
            mx.eval(gradient)
            total += cast(float, nats.item())
    if gradient is None:
        gradient = {name: mx.zeros_like(each) for name, each in vectors.join(trained).items()}
    (total,) = workers.summed([total])
    return total / tokens, {name: each / tokens for name, each in workers.summed_gradient(gradient).items()}
