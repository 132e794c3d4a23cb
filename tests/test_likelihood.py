"""The likelihood against float64 from the same logits: nats, gradients, and padding that changes nothing."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt
import pytest
from mlx.utils import tree_flatten

from mlxtune import adapter, head, likelihood, machine, model
from mlxtune.borrow import LoRALinear
from mlxtune.data.batches import Batch, make_batch
from mlxtune.data.render import Sample
from mlxtune.noise import noisy_embeddings
from mlxtune.recipe import LoraRecipe
from mlxtune.recompute import recomputed
from tests import zoo

# rows of several lengths with gaps in what is learned, as in a chat of two answers
SAMPLES = [
    Sample("a:1", [1, 323, 201, 67, 2, 201], [False, True, False, True, True, False], 3, "b"),
    Sample("a:2", [5, 900, 17], [False, False, True], 2, "b"),
    Sample("a:3", [1, 30, 40, 50, 60, 70, 80, 90, 2], [False] * 4 + [True] * 5, 4, "b"),
    Sample("a:4", [9, 8], [True, True], 0, None),  # its first token is marked, but nothing comes before it
]


class Fixed(nn.Module):
    """A network whose logits (B, T, V) are its parameter."""

    def __init__(self, logits: mx.array):
        super().__init__()
        self.logits = logits

    def __call__(self, tokens: mx.array) -> mx.array:
        assert tokens.shape == self.logits.shape[:2]
        return self.logits


def wanted(trained: npt.ArrayLike) -> mx.array:
    return mx.array(likelihood.wanted_at(np.asarray(trained)))


def log_softmax(logits: npt.ArrayLike) -> npt.NDArray[np.float64]:
    wide = np.asarray(logits, dtype=np.float64)
    wide = wide - wide.max(axis=-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))


def expected_nats(logits: npt.ArrayLike, batch: Batch) -> npt.NDArray[np.float64]:
    """Row by row and token by token, as the docstring of `row_nats` says. logits (B, T-1, V) -> (B,)."""
    logs, nats = log_softmax(logits), np.zeros(len(batch.rows))
    for row in range(len(batch.rows)):
        for t in range(1, batch.tokens.shape[1]):
            if batch.trained[row, t]:
                nats[row] -= logs[row, t - 1, batch.tokens[row, t]]
    return nats


def widened(batch: Batch, columns: int) -> Batch:
    """The batch with more padding, of a token that is not 0."""
    rows = len(batch.rows)
    return Batch(
        np.concatenate([batch.tokens, np.full((rows, columns), 77, np.int32)], axis=1),
        np.concatenate([batch.trained, np.zeros((rows, columns), np.bool_)], axis=1),
        batch.rows,
    )


def nats_of(net: nn.Module, batch: Batch) -> mx.array:
    return likelihood.row_nats(net, mx.array(batch.tokens), wanted(batch.trained), learn=True)


@pytest.fixture(scope="module")
def lm(tiny: Path) -> model.LanguageModel:
    return model.load(tiny)


@pytest.fixture(scope="module")
def batch() -> Batch:
    return make_batch(SAMPLES, [0, 1, 2, 3])


def test_nats_of_the_embedded_model(lm: model.LanguageModel, batch: Batch) -> None:
    logits = np.array(lm.net(mx.array(batch.tokens[:, :-1])))
    np.testing.assert_allclose(nats_of(lm.net, batch), expected_nats(logits, batch), rtol=2e-6)


def test_nats_by_hand() -> None:
    # softmax of (0, 0, ln 2) is (1/4, 1/4, 1/2): ln 4 for the first, ln 2 for the second
    logits = mx.array([[[0.0, 0.0, np.log(2.0)], [0.0, 0.0, np.log(2.0)]]])
    tokens = mx.array([[0, 1, 2]])
    nats = likelihood.row_nats(Fixed(logits), tokens, wanted([[True, True, True]]))
    np.testing.assert_allclose(nats, [np.log(4) + np.log(2)], rtol=1e-6)
    nats = likelihood.row_nats(Fixed(logits), tokens, wanted([[True, False, True]]))
    np.testing.assert_allclose(nats, [np.log(2)], rtol=1e-6)
    assert likelihood.row_nats(Fixed(logits), tokens, wanted([[True, False, False]])).item() == 0.0


@pytest.mark.parametrize("scale", [1.0, 30.0, 1000.0])
def test_gradient_of_the_logits_is_softmax_minus_one_hot(batch: Batch, scale: float) -> None:
    logits = np.random.default_rng(0).normal(size=(4, batch.tokens.shape[1] - 1, 1024)).astype(np.float32) * scale
    net = Fixed(mx.array(logits))
    nats, gradient = nn.value_and_grad(net, lambda: nats_of(net, batch).sum())()
    np.testing.assert_allclose(nats.item(), expected_nats(logits, batch).sum(), rtol=1e-6)
    expected = np.exp(log_softmax(logits))
    for row, t in np.ndindex(logits.shape[:2]):
        expected[row, t, batch.tokens[row, t + 1]] -= 1.0
        if not batch.trained[row, t + 1]:
            expected[row, t] = 0.0
    # a softmax of float32 logits near 1000 can be no better than their own rounding, 1000 · 2^-24
    np.testing.assert_allclose(gradient["logits"], expected, atol=1e-6 * max(1.0, scale / 10))


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_nats_are_summed_in_float32(batch: Batch, dtype: mx.Dtype) -> None:
    logits = mx.random.normal((4, batch.tokens.shape[1] - 1, 1024), key=mx.random.key(0)).astype(dtype)
    nats = nats_of(Fixed(logits), batch)
    assert nats.dtype == mx.float32
    stored = np.array(logits.astype(mx.float32))
    np.testing.assert_allclose(nats, expected_nats(stored, batch), rtol=2e-6)


def test_padding_changes_neither_nats_nor_gradients(tiny: Path, batch: Batch) -> None:
    lm = model.load(tiny)
    adapter.attach(lm, LoraRecipe(rank=4), seed=0)
    tensors = adapter.trained(lm.net)
    made = {name: mx.random.normal(each.shape, scale=0.05, key=mx.random.key(1)) for name, each in tensors.items()}
    lm.net.load_weights(list(made.items()), strict=False)

    def both(batch: Batch) -> tuple[mx.array, dict[str, mx.array]]:
        _, gradient = nn.value_and_grad(lm.net, lambda: nats_of(lm.net, batch).sum())()
        flat = dict(tree_flatten(gradient))
        assert flat.keys() == tensors.keys()
        return nats_of(lm.net, batch), flat

    nats, gradients = both(batch)
    wide_nats, wide_gradients = both(widened(batch, 23))
    np.testing.assert_allclose(nats, wide_nats, rtol=1e-5)
    for name, gradient in gradients.items():
        largest = float(mx.abs(gradient).max())
        assert largest > 0
        np.testing.assert_allclose(gradient, wide_gradients[name], atol=1e-5 * largest, err_msg=name)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
def test_measure_keeps_the_order_of_the_samples(lm: model.LanguageModel, batch: Batch, batch_size: int) -> None:
    told: list[int] = []
    found = likelihood.measure(lm.net, SAMPLES, batch_size, told.append)
    np.testing.assert_allclose(found, nats_of(lm.net, batch), rtol=1e-5)
    assert told == [min(done, 4) for done in range(batch_size, 4 + batch_size, batch_size)]


def test_every_token_weighs_the_same_in_the_mean(lm: model.LanguageModel) -> None:
    nats = likelihood.measure(lm.net, SAMPLES)
    # the mark on the last sample's first token cannot be scored and counts for nothing
    assert likelihood.mean_nats(lm.net, SAMPLES) == pytest.approx(sum(nats) / (3 + 1 + 5 + 1), rel=1e-6)


def test_measure_switches_dropout_off(tiny: Path) -> None:
    lm = model.load(tiny)
    adapter.attach(lm, LoraRecipe(rank=4, dropout=0.5), seed=0)
    made = {name: mx.ones_like(each) * 0.05 for name, each in adapter.trained(lm.net).items()}
    lm.net.load_weights(list(made.items()), strict=False)
    lm.net.train()
    assert likelihood.measure(lm.net, SAMPLES) == likelihood.measure(lm.net, SAMPLES)


def test_no_samples_have_no_loss(lm: model.LanguageModel) -> None:
    assert likelihood.measure(lm.net, []) == []
    assert likelihood.mean_nats(lm.net, []) == 0.0


@pytest.mark.parametrize("parts", [1, 2, 3, 64])
def test_rows_keep_their_nats_however_a_batch_is_split(tiny: Path, monkeypatch: pytest.MonkeyPatch, parts: int) -> None:
    net = model.load(tiny).net
    alone = [likelihood.measure(net, [sample], batch_size=1)[0] for sample in SAMPLES]
    monkeypatch.setattr(machine, "batch_parts", lambda device, cores: parts)
    np.testing.assert_allclose(likelihood.measure(net, SAMPLES, batch_size=4), alone, rtol=1e-5)


@pytest.mark.parametrize(
    ("shape", "at_once", "most", "count"),
    [
        ((8, 100), 2, None, 2),
        ((8, 100), 2, 400, 2),
        ((8, 100), 2, 399, 4),
        ((8, 100), 2, 100, 8),
        ((8, 100), 2, 10, 8),
        ((1, 1000), 1, 320, 1),
        ((8, 100), 1, 320, 3),
    ],
)
def test_parts_of_a_batch(shape: tuple[int, int], at_once: int, most: int | None, count: int) -> None:
    assert likelihood.part_count(shape, at_once, most) == count


def test_a_batch_is_computed_in_rounds(lm: model.LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row once, in order, no round with more tokens than asked."""
    monkeypatch.setattr(machine, "batch_parts", lambda device, cores: 2)
    seen: list[tuple[int, ...]] = []

    def noted(tokens: mx.array, wanted: mx.array) -> mx.array:
        seen.append(tokens.shape)
        return tokens[:, 0]

    rows = np.arange(8 * 10).reshape(8, 10).astype(np.int32)
    batch = Batch(rows, np.ones((8, 10), dtype=np.bool_), list(range(8)))
    found = np.concatenate([np.array(each) for each in likelihood.in_parts(batch, noted, 25)])
    assert found.tolist() == rows[:, 0].tolist()
    assert seen == [(2, 10)] * 4


def test_another_thread_measures_too(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLX's streams belong to the thread that made them."""
    monkeypatch.setattr(machine, "batch_parts", lambda device, cores: 2)
    net = model.load(tiny).net
    here = likelihood.measure(net, SAMPLES)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(likelihood.measure, net, SAMPLES).result() == here


def test_places_of_supervised_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    trained = np.array([[True, False, True, True], [False, True, False, False], [True, False, False, False]])
    assert likelihood.wanted_at(trained).tolist() == [1, 2, 3]
    assert likelihood.wanted_at(trained[2:]).tolist() == [-1]  # MLX is not asked for arrays without elements
    monkeypatch.setattr(machine, "device_kind", lambda: "metal")  # where each new shape is compiled
    assert likelihood.wanted_at(trained).tolist() == [1, 2, 3, -1]
    assert likelihood.wanted_at(np.ones((1, 4))).tolist() == [0, 1, 2]


def whole_nats(net: nn.Module, batch: Batch) -> mx.array:
    """The plain way: all logits (B, T-1, V), in the formula's own order."""
    logits = net(mx.array(batch.tokens[:, :-1])).astype(mx.float32)
    logs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    chosen = mx.take_along_axis(logs, mx.array(batch.tokens[:, 1:, None]), axis=-1).squeeze(-1)
    return -mx.where(mx.array(batch.trained[:, 1:]), chosen, 0.0).sum(axis=-1)


def largest_difference(found: Any, expected: Any) -> float:
    """Between two gradients, relative to the largest element."""
    one, other = dict(tree_flatten(found)), dict(tree_flatten(expected))
    assert one.keys() == other.keys()
    differences = [float(mx.abs(one[name] - other[name]).max()) for name in other]
    return max(differences) / max(float(mx.abs(each).max()) for each in other.values())


ZOO_BATCH = Batch(
    np.random.default_rng(0).integers(0, zoo.VOCABULARY, (3, 13)).astype(np.int32),
    np.random.default_rng(1).random((3, 13)) < 0.4,
    [0, 1, 2],
)


@pytest.mark.parametrize("chunk", [2**26, 4 * zoo.VOCABULARY * 4], ids=["at once", "chunks of 4"])
@pytest.mark.parametrize("name", zoo.ARCHITECTURES)
def test_every_architecture_keeps_nats_and_gradients(name: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "chunk_bytes", lambda device: chunk)
    net = zoo.build(name)
    net.freeze()
    for block in net.layers:
        block.unfreeze()
    found = head.find(net)
    tokens, places = mx.array(ZOO_BATCH.tokens), wanted(ZOO_BATCH.trained)
    expected = whole_nats(net, ZOO_BATCH)
    np.testing.assert_allclose(likelihood.row_nats(net, tokens, places, found), expected, rtol=1e-5)
    _, gradient = nn.value_and_grad(net, lambda: whole_nats(net, ZOO_BATCH).sum())()
    learned = nn.value_and_grad(net, lambda: likelihood.row_nats(net, tokens, places, found, learn=True).sum())
    nats, own = learned()
    np.testing.assert_allclose(nats.item(), expected.sum().item(), rtol=1e-5)
    assert largest_difference(own, gradient) <= 1e-5


@pytest.mark.parametrize("kind", ["full", "adapter", "quantized"])
def test_a_head_that_is_trained_or_quantized(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "chunk_bytes", lambda device: 4 * zoo.VOCABULARY * 4)
    net = zoo.build("cohere" if kind == "full" else "llama")  # cohere's head is its embeddings
    if kind != "full":
        net.freeze()
        layer = net.layers[0].self_attn
        layer.q_proj = LoRALinear.from_base(layer.q_proj)
        layer.q_proj.lora_b = mx.random.normal(layer.q_proj.lora_b.shape)
    if kind == "adapter":
        net.lm_head = LoRALinear.from_base(net.lm_head)
        net.lm_head.lora_b = mx.random.normal(net.lm_head.lora_b.shape)
    if kind == "quantized":
        nn.quantize(net, 32, 8, class_predicate=lambda path, _: path == "lm_head")
    found = head.find(net)
    assert found is not None
    assert found.frozen == (kind == "quantized")
    tokens, places = mx.array(ZOO_BATCH.tokens), wanted(ZOO_BATCH.trained)
    _, gradient = nn.value_and_grad(net, lambda: whole_nats(net, ZOO_BATCH).sum())()
    learned = nn.value_and_grad(net, lambda: likelihood.row_nats(net, tokens, places, found, learn=True).sum())
    nats, own = learned()
    np.testing.assert_allclose(nats.item(), whole_nats(net, ZOO_BATCH).sum().item(), rtol=1e-5)
    assert largest_difference(own, gradient) <= 1e-5


def test_checkpointing_and_noise_go_with_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    net = zoo.build("llama")
    net.freeze()
    for block in net.layers:
        block.unfreeze()
    found = head.find(net)
    tokens, places = mx.array(ZOO_BATCH.tokens), wanted(ZOO_BATCH.trained)

    def gradient(chunk: int, checkpointed: bool) -> Any:
        monkeypatch.setattr(machine, "chunk_bytes", lambda device: chunk)
        mx.random.seed(5)
        with recomputed(net, checkpointed), noisy_embeddings(net, 5.0):
            made = nn.value_and_grad(net, lambda: likelihood.row_nats(net, tokens, places, found, learn=True).sum())
            return made()[1]

    expected = gradient(2**26, False)
    assert largest_difference(gradient(4 * zoo.VOCABULARY * 4, False), expected) <= 1e-5
    assert largest_difference(gradient(4 * zoo.VOCABULARY * 4, True), expected) <= 1e-5


@pytest.mark.parametrize("learn", [True, False])
def test_the_logits_of_a_large_vocabulary_are_never_whole(learn: bool) -> None:
    vocabulary, rows, width = 65_536, 8, 128
    net = zoo.build("llama", vocab_size=vocabulary)
    net.freeze()
    net.layers[0].unfreeze()
    found = head.find(net)
    random = np.random.default_rng(0)
    tokens = mx.array(random.integers(0, vocabulary, (rows, width)).astype(np.int32))
    places = wanted(random.random((rows, width)) < 0.1)

    def peak(make: Callable[[], Any]) -> int:
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(make())
        return mx.get_peak_memory() - before

    def nats() -> mx.array:
        return likelihood.row_nats(net, tokens, places, found, learn=learn).sum()

    used = peak(nn.value_and_grad(net, nats) if learn else nats)
    assert used < 0.5 * rows * width * vocabulary * 4  # half of the float32 logits of all tokens, once
