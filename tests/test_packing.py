"""Packed rows: loss and gradient of the rows alone, no row sees another, on every architecture that allows it."""

import mlx.core as mx
import numpy as np
import pytest

from mlxtune import packing
from mlxtune.caches import given
from mlxtune.data.batches import make_batch, make_lines
from mlxtune.data.render import Sample
from mlxtune.recompute import recomputed
from tests import zoo
from tests.gradients import difference, loss_and_gradient

# no: states that run on, positions that count from the start of a line, caches or masks of another kind
APART = {
    "afm7", "baichuan_m1", "bailing_moe_linear", "falcon_h1", "gemma2", "gpt2", "gpt_bigcode", "granitemoehybrid",
    "hunyuan", "hunyuan_v1_dense", "jamba", "lfm2", "lfm2_moe", "llama4", "longcat_flash", "mamba", "mamba2",
    "nemotron_h", "olmo_hybrid", "plamo2", "qwen3_5", "qwen3_next", "recurrent_gemma", "rwkv7",
}  # fmt: skip
PACKED = sorted(zoo.ARCHITECTURES.keys() - APART)
LENGTHS = (20, 11, 5, 12, 2)  # most of them longer than the zoo's sliding windows of 8
LINES = [[0], [3, 2, 4], [1]]


def rows(seed: int = 0) -> list[Sample]:
    random = np.random.default_rng(seed)
    return [
        Sample("a:1", random.integers(0, zoo.VOCABULARY, length).tolist(), [True] * length, 0, None)
        for length in LENGTHS
    ]


@pytest.mark.parametrize("name", zoo.ARCHITECTURES)
def test_which_architectures_keep_packed_rows_apart(name: str) -> None:
    net = zoo.build(name)
    kind = type(net)
    assert packing.supported(net, 24, zoo.VOCABULARY) == (name not in APART)
    assert type(net) is kind


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
@pytest.mark.parametrize(
    ("name", "apart"), [("llama", True), ("gemma3_text", True), ("gpt2", False), ("qwen3_next", False)]
)
def test_they_are_told_in_half_precision_too(name: str, apart: bool, dtype: mx.Dtype) -> None:
    net = zoo.build(name)
    net.set_dtype(dtype)
    assert packing.supported(net, 24, zoo.VOCABULARY) == apart


@pytest.mark.parametrize("name", PACKED)
def test_loss_and_gradient_are_those_of_the_rows_alone(name: str) -> None:
    net = zoo.build(name)
    loss, alone = loss_and_gradient(net, [make_batch(rows(), [row]) for row in range(len(LENGTHS))], 1)
    packed_loss, packed = loss_and_gradient(net, [make_lines(rows(), LINES, (4, 23))], 1)  # with a line of padding
    assert packed_loss == pytest.approx(loss, rel=1e-5)
    assert all(np.isfinite(np.array(value)).all() for value in packed.values())
    assert difference(packed, alone) <= 1e-4


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt_oss", "deepseek_v3", "qwen3_moe"])
def test_recomputed_blocks_give_the_same_gradient(name: str) -> None:
    net = zoo.build(name)
    batch = make_lines(rows(), LINES, (3, 20))
    _, plain = loss_and_gradient(net, [batch], 1)
    with recomputed(net):
        _, saving = loss_and_gradient(net, [batch], 1)
    assert difference(saving, plain) <= 1e-5


@pytest.mark.parametrize("name", PACKED)
def test_no_row_sees_another(name: str) -> None:
    net = zoo.build(name)
    net.eval()
    batch = make_lines(rows(), LINES, (3, 20))
    segments = mx.array(batch.segments)
    tokens = mx.array(batch.tokens)
    others = np.where((batch.segments == 1) & (np.arange(3)[:, None] == 1), batch.tokens, 7)
    with packing.packed(net, segments):
        one, other = net(tokens), net(mx.array(others))
    seen = np.abs(np.array(one - other))[1, 12:17]  # the row of 5 tokens, second in its line
    assert seen.max() <= 1e-6


def test_windows_of_a_packed_row_are_its_own() -> None:
    mask = packing.Segments(mx.array([[0, 0, 0, 1, 1, 1, 1]])).make_mask(6, window_size=2)
    assert np.array(mask[0, 0]).astype(int).tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [0, 1, 1, 0, 0, 0],
        [0, 0, 0, 1, 0, 0],
        [0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 1, 1],
    ]


def test_nothing_stays_patched() -> None:
    net = zoo.build("llama")
    kind = type(net)
    with pytest.raises(KeyError), given(net, dict):
        assert type(net) is not kind
        raise KeyError
    assert type(net) is kind
