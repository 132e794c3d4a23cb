"""Cross-entropy against float64 NumPy, at once and in chunks, with what follows a head."""

from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest

from mlxtune.crossentropy import Tail, chunk_size, chunked_nats, learned_nats, token_nats

N, D, V = 11, 6, 40
RANDOM = np.random.default_rng(0)
HIDDEN, WEIGHT = RANDOM.normal(size=(N, D)), RANDOM.normal(size=(V, D))
TARGETS = RANDOM.integers(0, V, N)
COTANGENT = RANDOM.normal(size=N)


def expected(cap: float | None) -> tuple[np.ndarray, np.ndarray]:
    """Nats (N,) and the gradient (N, D) of their sum weighted by COTANGENT, by hand."""
    raw = HIDDEN @ WEIGHT.T
    logits = raw if cap is None else cap * np.tanh(raw / cap)
    softmax = np.exp(logits - logits.max(axis=1, keepdims=True))
    softmax /= softmax.sum(axis=1, keepdims=True)
    nats = -np.log(softmax[np.arange(N), TARGETS])
    slope = softmax.copy()
    slope[np.arange(N), TARGETS] -= 1
    slope *= COTANGENT[:, None] * (1 if cap is None else 1 - np.tanh(raw / cap) ** 2)
    return nats, slope @ WEIGHT


def tail(cap: float | None, dtype: mx.Dtype = mx.float32) -> Tail:
    weight = mx.array(WEIGHT).astype(dtype)

    def logits(hidden: mx.array) -> mx.array:
        raw = hidden @ weight.T
        return raw if cap is None else cap * mx.tanh(raw / cap)

    return logits


def at_once(tail: Tail, hidden: mx.array, targets: mx.array, size: int) -> mx.array:
    return token_nats(tail(hidden), targets)


@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("size", [1, 4, 11, 50])
@pytest.mark.parametrize("way", [at_once, chunked_nats, learned_nats])
def test_nats_and_gradient(way: Callable[..., mx.array], size: int, cap: float | None) -> None:
    nats, slope = expected(cap)
    targets, cotangent = mx.array(TARGETS), mx.array(COTANGENT.astype(np.float32))
    found = mx.array(HIDDEN.astype(np.float32))
    np.testing.assert_allclose(way(tail(cap), found, targets, size), nats, rtol=2e-6, atol=1e-6)
    gradient = mx.grad(lambda hidden: (way(tail(cap), hidden, targets, size) * cotangent).sum())(found)
    np.testing.assert_allclose(gradient, slope, atol=1e-5 * np.abs(slope).max())


@pytest.mark.parametrize("way", [chunked_nats, learned_nats])
def test_half_precision_is_summed_in_float32(way: Callable[..., mx.array]) -> None:
    hidden, targets = mx.array(HIDDEN).astype(mx.bfloat16), mx.array(TARGETS)
    made = tail(None, mx.bfloat16)
    nats = way(made, hidden, targets, 3)
    assert nats.dtype == mx.float32
    np.testing.assert_allclose(nats, token_nats(made(hidden), targets), rtol=1e-2)
    gradient = mx.grad(lambda each: way(made, each, targets, 3).sum())(hidden)
    assert gradient.dtype == mx.bfloat16
    plain = mx.grad(lambda each: token_nats(made(each), targets).sum())(hidden)
    one, other = np.array(gradient.astype(mx.float32)), np.array(plain.astype(mx.float32))
    np.testing.assert_allclose(one, other, atol=2e-2 * np.abs(other).max())


def test_chunks_by_bytes() -> None:
    assert chunk_size(1000, 4_000_000) == 1000
    assert chunk_size(1000, 3_999_999) == 999
    assert chunk_size(1000, 1) == 1
