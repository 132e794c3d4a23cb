"""KL and what goes with it against float64 NumPy from the same logits."""

import math
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt
import pytest

from mlxtune import machine
from mlxtune.data.render import Sample
from mlxtune.errors import DataError, ModelError
from mlxtune.metrics import divergence
from tests import zoo

Matrix = npt.NDArray[np.float64]
RANDOM = np.random.default_rng(0)
LENGTHS = (9, 2, 17, 1, 5, 9)


def sample(length: int) -> Sample:
    tokens = RANDOM.integers(0, zoo.VOCABULARY, length).tolist()
    return Sample("rows:1", tokens, [False] * length, 0, None)  # learned or not makes no difference


SAMPLES = [sample(length) for length in LENGTHS]


def log_softmax(logits: Any) -> Matrix:
    logits = np.array(logits, dtype=np.float64)
    made: Matrix = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True)) - logits.max(-1, keepdims=True)  # fmt: skip  # noqa: E501
    return made


def changed(net: nn.Module, name: str, by: float) -> nn.Module:
    """A network as `zoo.build` makes it, its weights off by noise."""
    other = zoo.build(name)
    other.update(net.parameters())
    noise = mx.random.key(1)
    other.apply(lambda weight: weight + by * weight.std() * mx.random.normal(weight.shape, key=noise))
    return other


@pytest.mark.parametrize("name", ["llama", "talkie"])  # with a head that is found, and without
@pytest.mark.parametrize("chunk", [1, 7 * 4 * zoo.VOCABULARY, 10**9])
def test_against_float64(name: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "chunk_bytes", lambda device: chunk)
    source = zoo.build(name)
    other = changed(source, name, 0.3)
    kl, worse, delta, same, source_nats, rows = [], [], [], [], [], []
    for number, each in enumerate(SAMPLES):
        if len(each.tokens) < 2:
            continue
        read = mx.array([each.tokens[:-1]])
        log_p, log_q = log_softmax(source(read)[0]), log_softmax(other(read)[0])
        right = np.arange(len(each.tokens) - 1), np.array(each.tokens[1:])
        kl += (np.exp(log_p) * (log_p - log_q)).sum(-1).tolist()
        worse += (log_p - log_q)[right].tolist()
        delta += (np.exp(log_q) - np.exp(log_p))[right].tolist()
        same += (log_p.argmax(-1) == log_q.argmax(-1)).tolist()
        source_nats += (-log_p[right]).tolist()
        rows += [number] * (len(each.tokens) - 1)
    done: list[int] = []
    found = divergence.measure(source, other, SAMPLES, batch_size=2, on_row=done.append)
    assert (found.rows, found.tokens) == (5, sum(LENGTHS) - len(LENGTHS))
    assert done == [2, 4, 5]
    assert found.kl_mean > 0.001
    assert found.kl_mean == pytest.approx(np.mean(kl), rel=1e-4)
    assert found.kl_median == pytest.approx(np.median(kl), rel=1e-4)
    assert found.kl_99 == pytest.approx(np.quantile(kl, 0.99), rel=1e-4)
    assert found.kl_max == pytest.approx(np.max(kl), rel=1e-4)
    assert found.perplexity_source == pytest.approx(math.exp(np.mean(source_nats)), rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(np.mean(source_nats) + np.mean(worse)), rel=1e-5)
    assert found.perplexity_ratio == pytest.approx(math.exp(np.mean(worse)), rel=1e-5)
    assert found.rms_delta_p == pytest.approx(np.sqrt(np.mean(np.square(delta))), rel=1e-4)
    assert found.same_top == pytest.approx(np.mean(same))
    totals = [sum(x - np.mean(worse) for x, row in zip(worse, rows, strict=True) if row == one) for one in set(rows)]
    error = math.sqrt(5 / 4 * np.square(totals).sum()) / len(worse)
    assert found.perplexity_ratio_error == pytest.approx(found.perplexity_ratio * error, rel=1e-3)


def test_a_network_is_not_far_from_itself() -> None:
    net = zoo.build("llama")
    found = divergence.measure(net, net, SAMPLES[:1])
    assert (found.kl_mean, found.kl_max, found.perplexity_ratio, found.rms_delta_p, found.same_top) == (0, 0, 1, 0, 1)
    assert found.perplexity_ratio_error is None and found.kl_error is None  # a single row


def test_small_divergences_are_not_lost_in_rounding() -> None:
    logits = RANDOM.normal(size=(6, 50)) * 3
    off = logits + 1e-3 * RANDOM.normal(size=logits.shape)
    single, single_off = logits.astype(np.float32), off.astype(np.float32)
    found = divergence.compared(mx.array(single), mx.array(single_off), mx.zeros((6,), dtype=mx.int32))[0]
    log_p, log_q = log_softmax(single), log_softmax(single_off)
    expected = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    assert expected.max() < 1e-6
    np.testing.assert_allclose(np.array(found), expected, rtol=0.02)


def test_logits_far_apart() -> None:
    logits = np.array([[0.0, -300.0, 5.0, -1000.0], [400.0, 0.0, 0.0, 0.0]], dtype=np.float32)
    off = np.array([[3.0, 200.0, 5.0, 100.0], [0.0, 0.0, 0.0, 400.0]], dtype=np.float32)
    found = divergence.compared(mx.array(logits), mx.array(off), mx.zeros((2,), dtype=mx.int32))[0]
    log_p, log_q = log_softmax(logits), log_softmax(off)
    np.testing.assert_allclose(np.array(found), (np.exp(log_p) * (log_p - log_q)).sum(-1), rtol=1e-5)


def test_the_error_covers_the_truth() -> None:
    """Of 400 draws of 40 rows that differ from each other, 95 % of the intervals hold the mean of all."""
    random = np.random.default_rng(5)
    held = 0
    for _ in range(400):
        row = np.repeat(np.arange(40), random.integers(1, 12, 40))
        kl = random.normal(size=40)[row] + random.normal(size=len(row))
        even = np.zeros(len(row))
        found = divergence.summed_up(divergence.Positions(row, kl, even, even, even))
        assert found.kl_error is not None
        held += abs(found.kl_mean) < 1.96 * found.kl_error
    assert 0.9 < held / 400 < 0.98


def test_what_cannot_be_compared() -> None:
    net = zoo.build("llama")
    with pytest.raises(DataError, match="no row has two tokens"):
        divergence.measure(net, net, [sample(1), sample(0)])
    with pytest.raises(ModelError, match="has a vocabulary of 64, not 320"):
        divergence.measure(net, zoo.build("llama", vocab_size=64), SAMPLES)


def test_nothing_stays_changed() -> None:
    source, other = zoo.build("llama"), zoo.build("llama")
    source.train()
    before = [type(each) for each in source.modules()]
    divergence.measure(source, other, SAMPLES)
    assert source.training and [type(each) for each in source.modules()] == before


@pytest.mark.parametrize("name", ["llama", "talkie"])
def test_a_reference_knows_the_mean(name: str) -> None:
    source = zoo.build(name)
    other = changed(source, name, 0.3)
    reference = divergence.Reference(source, SAMPLES)
    assert reference.kl(source) == 0
    assert reference.kl(other) == pytest.approx(divergence.measure(source, other, SAMPLES).kl_mean, rel=1e-4)


def test_a_reference_keeps_no_more_than_it_may() -> None:
    source = zoo.build("llama")
    other = changed(source, "llama", 0.3)
    rows = [sample(40) for _ in range(30)]
    few = divergence.Reference(source, rows, most_bytes=100 * 4 * zoo.VOCABULARY)
    assert 80 <= sum(len(at) for _, at, _ in few._parts) <= 100
    assert few.kl(other) == pytest.approx(divergence.measure(source, other, rows).kl_mean, rel=0.1)
    with pytest.raises(DataError, match="no row has two tokens"):
        divergence.Reference(source, [sample(1)])
