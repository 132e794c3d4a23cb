"""Searched scales and biases against rounding to nearest and against the best that a long search in float64 finds."""

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest

from mlxtune.quant import rtn, search
from mlxtune.quant.packing import Packed, Packing, dequantized

Matrix = npt.NDArray[np.float64]
DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}


def values(packed: Packed, packing: Packing) -> Matrix:
    """s · q + b in float64."""
    assert packed.biases is not None
    ones = mx.ones(packed.scales.shape)
    described = {"group_size": packing.group_size, "bits": packing.bits}
    codes = np.array(mx.dequantize(packed.weight, ones, mx.zeros_like(ones), **described), dtype=np.float64)
    scales, biases = (
        np.repeat(np.array(each.astype(mx.float32), dtype=np.float64), packing.group_size, axis=-1)
        for each in (packed.scales, packed.biases)
    )
    made: Matrix = scales * codes + biases
    return made


def errors(weight: mx.array, packed: Packed, packing: Packing, importance: Matrix | float = 1.0) -> Matrix:
    """Squared error of each group, in float64."""
    off = importance * (values(packed, packing) - np.array(weight.astype(mx.float32), dtype=np.float64)) ** 2
    summed: Matrix = off.reshape(-1, packing.group_size).sum(axis=-1)
    return summed


def best_known(group: Matrix, top: int, rounds: int = 20) -> float:
    """The least squared error of a group (G,) over 40 x 5 starts, each fitted until nothing changes."""
    least = np.inf
    low, width = group.min(), np.ptp(group)
    for shrink in np.linspace(0.4, 1.05, 40):
        for shift in np.linspace(0, 1, 5):
            scale, bias = width * shrink / top, low + width * (1 - shrink) * shift
            for _ in range(rounds):
                codes = np.clip(np.round((group - bias) / scale), 0, top)
                if np.ptp(codes) == 0:
                    break
                scale, bias = np.polyfit(codes, group, 1)
                least = min(least, float(((group - scale * codes - bias) ** 2).sum()))
    return least


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_group_is_worse_than_rounded_to_nearest(bits: int, group_size: int, dtype: str) -> None:
    packing = Packing(bits, group_size)
    weight = (mx.random.normal((24, 256), key=mx.random.key(bits)) ** 3 * 0.02).astype(DTYPES[dtype])
    found = search.pack(weight, packing)
    plain = rtn.pack(weight, packing)
    assert found.scales.dtype == weight.dtype and found.biases is not None and found.biases.dtype == weight.dtype
    assert (found.weight.shape, found.scales.shape) == (plain.weight.shape, plain.scales.shape)
    before, after = errors(weight, plain, packing), errors(weight, found, packing)
    assert (after <= before * (1 + 1e-4) + 1e-12).all()  # the choice is made in float32
    assert after.sum() < before.sum()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_close_to_the_best_known(bits: int) -> None:
    weight = np.random.default_rng(bits).normal(size=(8, 128))
    packing = Packing(bits, 64)
    found = errors(mx.array(weight), search.pack(mx.array(weight.astype(np.float32)), packing), packing)
    best = [best_known(group, 2**bits - 1) for group in weight.reshape(-1, 64)]
    assert found.sum() <= 1.06 * sum(best)


def test_importance_weighs_the_error() -> None:
    random = np.random.default_rng(0)
    weight = mx.array(random.normal(size=(64, 128)).astype(np.float32))
    importance = random.lognormal(sigma=2.0, size=128)
    packing = Packing(3, 64)
    weighed = search.pack(weight, packing, mx.array(importance.astype(np.float32)))
    of_weighed, of_plain, of_rounded = (
        errors(weight, each, packing, importance)
        for each in (weighed, search.pack(weight, packing), rtn.pack(weight, packing))
    )
    assert (of_weighed <= of_rounded * (1 + 1e-4)).all()
    assert of_weighed.sum() < 0.8 * of_plain.sum()
    even = search.pack(weight, packing, mx.full((128,), 7.0))
    assert errors(weight, even, packing).sum() == pytest.approx(errors(weight, search.pack(weight, packing), packing).sum(), rel=1e-3)  # fmt: skip  # noqa: E501


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_odd_groups_stay_finite_and_close(bits: int, dtype: str) -> None:
    rows = np.zeros((7, 64), dtype=np.float32)
    rows[1] = 3.0  # one value
    rows[2, 5] = -1.0  # all but one are 0
    rows[3, :32] = 1.0  # two values
    rows[4] = np.linspace(1e-6, 2e-6, 64)  # tiny, far below 1
    rows[5] = 1000 + np.linspace(0, 1, 64)  # far from 0
    rows[6, 3] = 1e4  # an outlier
    weight = mx.array(rows).astype(DTYPES[dtype])
    packing = Packing(bits, 64)
    found = search.pack(weight, packing, mx.zeros((64,)))  # inputs that were never other than 0
    for packed in (found, search.pack(weight, packing)):
        assert np.isfinite(values(packed, packing)).all()
        worst = errors(weight, rtn.pack(weight, packing), packing)
        assert (errors(weight, packed, packing) <= worst * (1 + 1e-3) + 1e-12).all()


def test_chunks_and_leading_axes_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = mx.random.normal((3, 10, 128), key=mx.random.key(3))
    packing = Packing(4, 32)
    whole = search.pack(weight, packing)
    monkeypatch.setattr(search, "CHUNK", {"cpu": 256, "metal": 256, "cuda": 256})
    parts = search.pack(weight, packing)
    assert whole.weight.shape == (3, 10, 16) and whole.scales.shape == (3, 10, 4)
    for one, other in ((whole.weight, parts.weight), (whole.scales, parts.scales), (whole.biases, parts.biases)):
        assert one is not None and other is not None and mx.array_equal(one, other)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_mlx_multiplies_by_it(bits: int) -> None:
    packing = Packing(bits, 64)
    packed = search.pack(mx.random.normal((48, 128), key=mx.random.key(4)), packing)
    inputs = mx.random.normal((5, 128), key=mx.random.key(5))
    made = mx.quantized_matmul(inputs, packed.weight, packed.scales, packed.biases, True, 64, bits)
    expected = np.array(inputs, dtype=np.float64) @ values(packed, packing).T
    np.testing.assert_allclose(np.array(made), expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(np.array(dequantized(packed, packing)), values(packed, packing), rtol=1e-5, atol=1e-6)
