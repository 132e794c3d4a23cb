"""Training's own attention: the values and slopes of softmax(Q·Kᵀ)·V, on every architecture, in less memory."""

from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest

from mlxtune import attention, machine
from mlxtune.data.batches import make_batch
from mlxtune.data.render import Sample
from mlxtune.recompute import recomputed
from tests import zoo
from tests.gradients import difference, loss_and_gradient

Wide = npt.NDArray[np.float64]
OWN = mx.fast.scaled_dot_product_attention

# batch, heads, their groups, queries, keys, size of a key and of a value, queries at a time
SHAPES = {
    "one block": (2, 4, 4, 7, 7, 8, 8, 64),
    "uneven blocks": (2, 4, 4, 23, 23, 8, 8, 5),
    "grouped": (2, 6, 2, 23, 23, 8, 8, 8),
    "one group": (1, 4, 1, 16, 16, 8, 8, 4),
    "behind a prefix": (2, 4, 2, 9, 21, 8, 8, 4),
    "one query": (2, 4, 2, 1, 5, 8, 8, 4),
    "values of another size": (2, 4, 2, 12, 12, 8, 6, 5),
}
MASKS = ["none", "causal", "for all heads", "for each head"]


def drawn(shape: tuple[int, ...], seed: int) -> mx.array:
    return mx.array(np.random.default_rng(seed).normal(0, 1.5, shape).astype(np.float32))


def arrays(name: str) -> tuple[mx.array, mx.array, mx.array, mx.array, int]:
    """Queries, keys, values, the output's gradient, and queries at a time."""
    batch, heads, groups, length, keys, size, out, block = SHAPES[name]
    return (
        drawn((batch, heads, length, size), 1), drawn((batch, groups, keys, size), 2),
        drawn((batch, groups, keys, out), 3), drawn((batch, heads, length, out), 4), block,
    )  # fmt: skip


def mask_of(kind: str, name: str) -> mx.array | str | None:
    if kind in ("none", "causal"):
        return None if kind == "none" else kind
    batch, heads, _, length, keys, *_ = SHAPES[name]
    random = np.random.default_rng(5).random((batch, heads if kind == "for each head" else 1, length, keys)) < 0.5
    random[..., 0] = True  # each query sees a key
    return mx.array(random)


def by_hand(queries: Wide, keys: Wide, values: Wide, slope: Wide, scale: float, seen: Any) -> list[Wide]:
    """The output and the gradients of sum(output * slope) by queries, keys and values, in float64, a head at a time."""
    output, of_queries = np.zeros_like(slope), np.zeros_like(queries)
    of_keys, of_values = np.zeros_like(keys), np.zeros_like(values)
    for row, head in np.ndindex(queries.shape[:2]):
        at = (row, head * keys.shape[1] // queries.shape[1])
        scores = np.where(seen[row, head], scale * queries[row, head] @ keys[at].T, -np.inf)
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        weights /= weights.sum(axis=1, keepdims=True)
        output[row, head] = weights @ values[at]
        of_weights = slope[row, head] @ values[at].T
        of_scores = np.zeros_like(scores)
        for query, p in enumerate(weights):  # the softmax's Jacobian, written out
            of_scores[query] = (np.diag(p) - np.outer(p, p)) @ of_weights[query]
        of_queries[row, head] = scale * of_scores @ keys[at]
        of_keys[at] += scale * of_scores.T @ queries[row, head]
        of_values[at] += weights.T @ slope[row, head]
    return [output, of_queries, of_keys, of_values]


def seen_by(mask: mx.array | str | None, shape: tuple[int, ...]) -> npt.NDArray[np.bool_]:
    if isinstance(mask, mx.array):
        return np.broadcast_to(np.array(mask), shape)
    *_, length, keys = shape
    causal = np.arange(keys) <= np.arange(keys - length, keys)[:, None]
    return np.broadcast_to(causal if mask == "causal" else np.True_, shape)


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("name", SHAPES)
def test_output_and_gradients_are_those_of_float64(name: str, kind: str) -> None:
    queries, keys, values, slope, size = arrays(name)
    mask = mask_of(kind, name)

    def summed(queries: mx.array, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        output = attention.attention(queries, keys, values, 0.3, mask, size)
        return (output * slope).sum(), output

    (_, output), found = mx.value_and_grad(summed, argnums=(0, 1, 2))(queries, keys, values)
    seen = seen_by(mask, (*queries.shape[:3], keys.shape[2]))
    wide = [np.array(each, dtype=np.float64) for each in (queries, keys, values, slope)]
    for one, other in zip([output, *found], by_hand(*wide, 0.3, seen), strict=True):
        assert np.abs(np.array(one) - other).max() <= 1e-5 * np.abs(other).max()


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_half_precision_comes_out_as_it_went_in(dtype: mx.Dtype) -> None:
    *inputs, slope, size = arrays("grouped")
    half = [each.astype(dtype) for each in inputs]

    def summed(*inputs: mx.array) -> mx.array:
        return (attention.attention(*inputs, 0.3, "causal", size) * slope.astype(dtype)).sum().astype(mx.float32)

    found = mx.grad(summed, argnums=(0, 1, 2))(*half)
    exact = mx.grad(lambda *each: (OWN(*each, scale=0.3, mask="causal") * slope).sum(), argnums=(0, 1, 2))(*inputs)
    for one, other in zip(found, exact, strict=True):
        assert one.dtype == dtype
        assert mx.abs(one.astype(mx.float32) - other).max() <= 0.03 * mx.abs(other).max()


def test_scores_far_apart_overflow_nothing() -> None:
    queries, keys, values, slope, size = arrays("uneven blocks")

    def summed(attend: Any, queries: mx.array) -> mx.array:
        return (attend(queries) * slope).sum()

    ours = mx.value_and_grad(lambda q: summed(lambda q: attention.attention(q, keys, values, 1.0, "causal", size), q))
    theirs = mx.value_and_grad(lambda q: summed(lambda q: OWN(q, keys, values, scale=1.0, mask="causal"), q))
    for one, other in zip(ours(300 * queries), theirs(300 * queries), strict=True):
        assert np.isfinite(np.array(one)).all()
        assert mx.allclose(one, other, rtol=1e-4, atol=1e-4)


def test_a_row_that_sees_nothing_spoils_no_other() -> None:
    queries, keys, values, slope, size = arrays("grouped")
    mask = np.array(seen_by("causal", (2, 1, 23, 23)))
    mask[:, :, 4] = False
    slope = mx.where(mx.arange(23)[:, None] == 4, 0.0, slope)
    slopes = mx.grad(
        lambda *each: (attention.attention(*each, 0.3, mx.array(mask), size) * slope).sum(), argnums=(0, 1, 2)
    )(queries, keys, values)
    plain = mx.grad(lambda *each: (attention.attention(*each, 0.3, "causal", size) * slope).sum(), argnums=(0, 1, 2))(
        queries, keys, values
    )
    for one, other in zip(slopes, plain, strict=True):
        assert mx.allclose(one, other, rtol=1e-5, atol=1e-5)


def test_it_keeps_less() -> None:
    shape = (1, 8, 512, 8)
    inputs = [drawn(shape, seed) for seed in (1, 2, 3)]
    mx.eval(inputs)

    def peak(attend: Any) -> int:
        def through_four(queries: mx.array, *others: mx.array) -> mx.array:
            for _ in range(4):
                queries = attend(queries, *others)
            return queries.sum()

        mx.reset_peak_memory()
        mx.eval(mx.grad(through_four, argnums=(0, 1, 2))(*inputs))
        return mx.get_peak_memory()

    lean = peak(lambda *each: attention.attention(*each, 0.3, "causal", 64))
    # MLX hands operations out ahead of those that compute, so that peaks differ from run to run
    assert lean <= 0.6 * peak(lambda *each: OWN(*each, scale=0.3, mask="causal"))


SAMPLES = [
    Sample("a:1", np.random.default_rng(length).integers(0, zoo.VOCABULARY, length).tolist(), [True] * length, 0, None)
    for length in (19, 7, 12)
]


@pytest.mark.parametrize("saving", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("name", zoo.ARCHITECTURES)
def test_loss_and_gradient_of_an_architecture_stay(name: str, saving: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    net = zoo.build(name)
    batch = make_batch(SAMPLES, [0, 1, 2])
    monkeypatch.setattr(machine, "attention_blocks", lambda device: (None, 0))
    loss, plain = loss_and_gradient(net, [batch], 1)
    monkeypatch.setattr(machine, "attention_blocks", lambda device: (8, 0))
    with recomputed(net, saving):
        lean_loss, lean = loss_and_gradient(net, [batch], 1)
    assert lean_loss == pytest.approx(loss, rel=1e-5)
    assert difference(lean, plain) <= 1e-4


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the queries that training's own attention gets."""
    made: list[tuple[int, ...]] = []
    real = attention.attention

    def noted(queries: mx.array, *others: Any) -> mx.array:
        made.append(queries.shape)
        return real(queries, *others)

    monkeypatch.setattr(attention, "attention", noted)
    return made


def test_the_trainer_uses_it_and_leaves_mlx_as_it_was(calls: list[tuple[int, ...]]) -> None:
    net = zoo.build("llama")
    loss_and_gradient(net, [make_batch(SAMPLES, [0, 1, 2])], 1)
    assert calls and all(shape[1] == 4 for shape in calls)
    assert mx.fast.scaled_dot_product_attention is OWN


def test_mlx_is_as_it_was_behind_an_error() -> None:
    with pytest.raises(ZeroDivisionError), attention.lean(8):
        assert mx.fast.scaled_dot_product_attention is not OWN
        raise ZeroDivisionError
    assert mx.fast.scaled_dot_product_attention is OWN


@pytest.mark.parametrize(
    ("size", "shortest", "others", "own"),
    [
        (8, 0, {}, True),
        (8, 0, {"mask": "causal", "sinks": None}, True),
        (8, 23, {"mask": "causal"}, True),
        (8, 24, {"mask": "causal"}, False),
        (None, 0, {"mask": "causal"}, False),
        (8, 0, {"mask": mx.zeros((23, 23))}, False),
        (8, 0, {"sinks": mx.zeros((6,))}, False),
    ],
)
def test_what_it_does_not_know_is_left_to_mlx(
    calls: list[tuple[int, ...]], size: int | None, shortest: int, others: dict[str, Any], own: bool
) -> None:
    queries, keys, values, _, _ = arrays("grouped")
    with attention.lean(size, shortest):
        found = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=0.3, **others)
    assert bool(calls) == own
    assert mx.allclose(found, OWN(queries, keys, values, scale=0.3, **others), rtol=1e-4, atol=1e-5)
