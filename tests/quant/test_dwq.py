"""Learned scales and biases: closer to the source, on rows that were not learned from too."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlxtune import model
from mlxtune.metrics import divergence
from mlxtune.quant import dwq, own_text, rtn
from mlxtune.quant.packing import Packed, Packing, dequantized
from tests import zoo


def test_held_out_predictions_come_closer(tiny: Path) -> None:
    source, copy = model.load(tiny).net, model.load(tiny).net
    layers = {name: each for name, each in source.named_modules() if hasattr(each, "to_quantized")}
    packings = {name: Packing(3, 64) for name in layers}
    packed = {name: rtn.pack(each.weight, packings[name]) for name, each in layers.items()}
    held_out = own_text.write(source, 8, 48, 0, seed=1)
    of_copy = dict(copy.named_modules())

    def kl(packed: dict[str, Packed]) -> float:
        for name, each in packed.items():
            of_copy[name].weight = dequantized(each, packings[name])
        return divergence.measure(source, copy, held_out).kl_mean

    before = kl(packed)
    seen: list[tuple[int, int, float]] = []
    rows = own_text.write(source, 24, 48, 0, seed=2)
    learned = dwq.learn(source, copy, packed, packings, rows, epochs=2, on_step=lambda *each: seen.append(each))
    left = {name: np.array(each.weight) for name, each in of_copy.items() if name in packed}
    assert [each[:2] for each in seen] == [(step, 6) for step in range(1, 7)]
    assert seen[0][2] == pytest.approx(before, rel=0.5)
    assert kl(learned) < 0.95 * before
    for name, each in learned.items():
        assert mx.array_equal(each.weight, packed[name].weight)  # codes stay
        np.testing.assert_allclose(np.array(dequantized(each, packings[name])), left[name], atol=1e-5)


def test_the_gradient_is_that_of_the_kl() -> None:
    """One small step lowers KL by learning rate times the sum of |gradient|, as the first step of Adam does."""
    source, copy = zoo.build("llama"), zoo.build("llama")
    copy.update(source.parameters())
    name = "model.layers.0.mlp.up_proj"
    packings = {name: Packing(2, 32)}
    weight = dict(source.named_modules())[name].weight
    packed = {name: rtn.pack(weight, packings[name])}
    rows = own_text.write(source, 4, 20, 1, seed=0)
    of_copy = dict(copy.named_modules())[name]

    def kl_of(each: Packed) -> float:
        of_copy.weight = dequantized(each, packings[name])
        return divergence.measure(source, copy, rows).kl_mean

    rate = 1e-4
    moved = dwq.learn(source, copy, packed, packings, rows, epochs=1, learning_rate=rate)[name]
    first = packed[name]
    assert first.biases is not None and moved.biases is not None
    steps = np.array((moved.scales - first.scales) / first.scales)
    assert np.abs(np.abs(steps) - rate).max() < 0.1 * rate  # each moved by the learning rate, whatever its size
    back = Packed(first.weight, 2 * first.scales - moved.scales, 2 * first.biases - moved.biases)
    assert kl_of(moved) < kl_of(first) < kl_of(back)


def test_modes_without_biases_stay() -> None:
    source, copy = zoo.build("llama"), zoo.build("llama")
    name = "model.layers.0.mlp.up_proj"
    packing = Packing(4, 32, "mxfp4")
    packed = {name: rtn.pack(dict(source.named_modules())[name].weight, packing)}
    rows = own_text.write(source, 2, 8, 1, seed=0)
    assert dwq.learn(source, copy, packed, {name: packing}, rows, epochs=1) == packed
