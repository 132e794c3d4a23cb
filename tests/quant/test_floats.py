"""Searched scales of 4-bit floats: read by MLX as meant, and closer than its own choice."""

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest

from mlxtune.quant import rtn, search
from mlxtune.quant.packing import Packed, Packing, dequantized

MODES = [Packing(4, 32, "mxfp4"), Packing(4, 16, "nvfp4")]


def errors(weight: mx.array, packed: Packed, packing: Packing, importance: float | mx.array = 1.0) -> npt.NDArray[np.float64]:  # fmt: skip  # noqa: E501
    off = np.array(dequantized(packed, packing), dtype=np.float64) - np.array(weight.astype(mx.float32))
    summed: npt.NDArray[np.float64] = (np.array(importance) * off**2).reshape(-1, packing.group_size).sum(axis=-1)
    return summed


@pytest.mark.parametrize("packing", MODES, ids=lambda each: each.mode)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
def test_no_group_is_worse_and_most_are_better(packing: Packing, dtype: mx.Dtype) -> None:
    weight = (mx.random.normal((3, 16, 128), key=mx.random.key(0)) * 0.02).astype(dtype)
    found, plain = search.pack(weight, packing), rtn.pack(weight, packing)
    assert found.biases is None and found.scales.dtype == mx.uint8
    assert (found.weight.shape, found.scales.shape) == (plain.weight.shape, plain.scales.shape)
    before, after = errors(weight, plain, packing), errors(weight, found, packing)
    assert (after <= before * (1 + 1e-5)).all()
    assert after.sum() < 0.95 * before.sum()


@pytest.mark.parametrize("packing", MODES, ids=lambda each: each.mode)
def test_no_scale_at_all_is_better_for_some_groups(packing: Packing) -> None:
    """Against all 255 bytes: the neighbours are enough for nearly all groups."""
    weight = mx.random.normal((4, 64), key=mx.random.key(1))
    found = search.pack(weight, packing)
    grid = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    bytes_ = np.arange(1, 127, dtype=np.uint8)
    scales = np.array(mx.from_fp8(mx.array(bytes_), mx.float32)) if packing.mode == "nvfp4" else 2.0 ** np.arange(-20, 20)  # fmt: skip  # noqa: E501
    groups = np.abs(np.array(weight, dtype=np.float64)).reshape(-1, 1, packing.group_size, 1)
    possible = grid * scales[:, None, None].astype(np.float64)  # (S, 1, 8)
    best = ((groups - possible) ** 2).min(axis=-1).sum(axis=-1).min(axis=-1)
    assert errors(weight, found, packing).sum() <= 1.01 * best.sum()


@pytest.mark.parametrize("packing", MODES, ids=lambda each: each.mode)
def test_importance(packing: Packing) -> None:
    weight = mx.random.normal((32, 128), key=mx.random.key(2))
    importance = mx.exp(2 * mx.random.normal((128,), key=mx.random.key(3)))
    weighed, plain = search.pack(weight, packing, importance), search.pack(weight, packing)
    assert errors(weight, weighed, packing, importance).sum() < 0.99 * errors(weight, plain, packing, importance).sum()


@pytest.mark.parametrize("packing", MODES, ids=lambda each: each.mode)
def test_odd_groups(packing: Packing) -> None:
    weight = mx.zeros((4, 64))
    weight[1, 3], weight[2], weight[3] = -5.0, 1e-20, mx.linspace(-1e4, 1e4, 64)
    found, plain = search.pack(weight, packing), rtn.pack(weight, packing)
    assert np.isfinite(np.array(dequantized(found, packing))).all()
    before = errors(weight, plain, packing)
    assert (errors(weight, found, packing) <= before * (1 + 1e-5)).all()


def test_mxfp8_is_rounded_to_nearest() -> None:
    weight = mx.random.normal((4, 64), key=mx.random.key(4))
    packing = Packing(8, 32, "mxfp8")
    assert mx.array_equal(search.pack(weight, packing).weight, rtn.pack(weight, packing).weight)
