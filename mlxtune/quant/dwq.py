"""Learns scales and biases so that a quantized network predicts what its source does. Knows networks and samples.

Distilled weight quantization, as mlx-lm has it: codes stay, and what is minimized is KL(P ‖ Q) between the predictions
P of the source and Q of the quantized network, by Adam over all scales and biases at once. Here they move relative to
where they begin, s · (1 + a) and b + s · d from a = d = 0, so that one learning rate suits layers of every size; and
weights are expanded to be multiplied, as a CPU has no quick product of quantized ones.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
import numpy as np

from mlxtune.caches import measured
from mlxtune.data.batches import epoch_order, make_batch
from mlxtune.data.render import Sample
from mlxtune.head import gathered
from mlxtune.quant.packing import Packed, Packing, codes_of

LEARNING_RATE = 1e-3  # at first; it falls as a cosine to 0
EPOCHS = 2
BATCH_ROWS = 8

Moves = dict[str, dict[str, mx.array]]


@dataclass(frozen=True, slots=True)
class _Codes:
    """A packed weight apart: codes (..., O, I/G, G) uint8, scales and biases (..., O, I/G, 1) float32."""

    codes: mx.array
    scales: mx.array
    biases: mx.array

    def values(self, moves: dict[str, mx.array], dtype: mx.Dtype) -> mx.array:
        """(..., O, I)"""
        scales = self.scales * (1 + moves["scale"])
        made = scales * self.codes.astype(mx.float32) + self.biases + self.scales * moves["bias"]
        return made.reshape(*made.shape[:-2], -1).astype(dtype)


def learn(
    source: nn.Module,
    copy: nn.Module,
    packed: Mapping[str, Packed],
    packings: Mapping[str, Packing],
    samples: Sequence[Sample],
    *,
    epochs: int = EPOCHS,
    learning_rate: float = LEARNING_RATE,
    seed: int = 0,
    on_step: Callable[[int, int, float], None] = lambda step, steps, kl: None,
) -> dict[str, Packed]:
    """`packed` with scales and biases learned on all positions of `samples`.

    `copy` is another network like `source`, with weights in full precision; its layers of these names end with what
    was learned, expanded. Layers of modes without biases stay as they are. `on_step` gets the step, their number and
    the KL of its rows in nats per position.
    """
    apart = {name: _apart(each, packings[name]) for name, each in packed.items() if each.biases is not None}
    if not apart:
        return dict(packed)
    layers = dict(copy.named_modules())
    dtypes = {name: layers[name].weight.dtype for name in apart}
    moves: Moves = {
        name: {"scale": mx.zeros_like(each.scales), "bias": mx.zeros_like(each.scales)} for name, each in apart.items()
    }

    def expand(moves: Moves) -> None:
        for name, each in apart.items():
            layers[name].weight = each.values(moves[name], dtypes[name])

    def loss(moves: Moves, tokens: mx.array, at: mx.array, log_p: mx.array) -> mx.array:
        expand(moves)
        logits = gathered(copy(tokens), at).astype(mx.float32)
        log_q = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        return (mx.exp(log_p) * (log_p - log_q)).sum(axis=-1).mean()

    rows = [sample for sample in samples if len(sample.tokens) > 1]
    lengths = [len(sample.tokens) for sample in rows]
    steps = epochs * math.ceil(len(rows) / BATCH_ROWS)
    optimizer = optimizers.Adam(optimizers.cosine_decay(learning_rate, max(1, steps)), bias_correction=True)
    step = 0
    with measured(source), measured(copy):
        for epoch in range(epochs):
            for some in epoch_order(lengths, BATCH_ROWS, seed, epoch):
                batch = make_batch(rows, some)
                real = np.arange(batch.tokens.shape[1]) < np.array([[lengths[row] - 1] for row in some])
                tokens, at = mx.array(batch.tokens), mx.array(np.flatnonzero(real).astype(np.int32))
                logits = gathered(source(tokens), at).astype(mx.float32)
                log_p = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
                mx.eval(log_p)
                kl, gradient = mx.value_and_grad(loss)(moves, tokens, at, log_p)
                moves = optimizer.apply_gradients(gradient, moves)
                mx.eval(moves, optimizer.state, kl)
                step += 1
                on_step(step, steps, float(np.array(kl)))
    expand(moves)
    mx.eval(copy.parameters())
    return {name: _together(each, apart.get(name), moves.get(name)) for name, each in packed.items()}


def _apart(packed: Packed, packing: Packing) -> _Codes:
    assert packed.biases is not None
    codes = codes_of(packed.weight, packing.bits).astype(mx.uint8)
    return _Codes(
        codes.reshape(*packed.scales.shape, packing.group_size),
        packed.scales.astype(mx.float32)[..., None],
        packed.biases.astype(mx.float32)[..., None],
    )


def _together(packed: Packed, apart: _Codes | None, moves: dict[str, mx.array] | None) -> Packed:
    if apart is None or moves is None:
        return packed
    scales = (apart.scales * (1 + moves["scale"]))[..., 0]
    biases = (apart.biases + apart.scales * moves["bias"])[..., 0]
    return Packed(packed.weight, scales.astype(packed.scales.dtype), biases.astype(packed.scales.dtype))
