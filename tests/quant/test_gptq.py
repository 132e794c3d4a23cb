"""GPTQ against the paper's update without its Cholesky factor, in float64, and against what it is to minimize."""

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest

from mlxtune.quant import gptq, imatrix, search
from mlxtune.quant.calibrate import Inputs
from mlxtune.quant.packing import Packed, Packing, codes_of, dequantized

Matrix = npt.NDArray[np.float64]
DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16}


def case(outputs: int = 24, inputs: int = 128, seed: int = 0) -> tuple[mx.array, Inputs, Matrix]:
    """A weight, correlated inputs of very different sizes, and their H."""
    random = np.random.default_rng(seed)
    mixed = random.normal(size=(inputs, inputs)) * random.lognormal(size=inputs)
    seen = random.normal(size=(600, inputs)) @ mixed / 20
    hessian = seen.T @ seen / len(seen)
    weight = mx.array(random.normal(size=(outputs, inputs)).astype(np.float32))
    single = mx.array(hessian.astype(np.float32))
    return weight, Inputs(mx.diag(single), single, len(seen)), hessian


def cost(weight: mx.array, packed: Packed, packing: Packing, hessian: Matrix) -> float:
    """Mean square error of the outputs, in float64."""
    off = np.array(dequantized(packed, packing), dtype=np.float64) - np.array(weight.astype(mx.float32))
    return float(np.einsum("oi,ij,oj->", off, hessian, off))


def by_the_paper(weight: Matrix, hessian: Matrix, scales: Matrix, biases: Matrix, top: int, size: int) -> Matrix:
    """Codes (O, I): equations 2 and 3 of the paper, input by input, with the inverse of H updated as it says."""
    weight, inverse = weight.copy(), np.linalg.inv(hessian)
    codes = np.zeros_like(weight)
    for i in range(weight.shape[1]):
        scale, bias = scales[:, i // size], biases[:, i // size]
        codes[:, i] = np.clip(np.round((weight[:, i] - bias) / scale), 0, top)
        error = (weight[:, i] - (scale * codes[:, i] + bias)) / inverse[i, i]
        weight -= error[:, None] * inverse[i]
        inverse = inverse - np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return codes


def damped(hessian: mx.array) -> np.ndarray:
    """With 5 % of the mean diagonal on it, in float64."""
    found = np.array(hessian, dtype=np.float64)
    return found + 0.05 * found.diagonal().mean() * np.eye(len(found))


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("group_size", [32, 64])
def test_the_codes_are_those_of_the_paper(bits: int, group_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gptq, "SWEEPS", 0)
    weight, inputs, _ = case()
    assert inputs.hessian is not None
    packed = gptq.pack(weight, Packing(bits, group_size), inputs)
    assert packed.biases is not None
    scales, biases = np.array(packed.scales, dtype=np.float64), np.array(packed.biases, dtype=np.float64)
    expected = by_the_paper(
        np.array(weight, dtype=np.float64), damped(inputs.hessian), scales, biases, 2**bits - 1, group_size
    )
    same = np.array(codes_of(packed.weight, bits)) == expected
    assert same.mean() > 0.995  # a value halfway between two codes may go either way in float32, with all after it
    assert same.all(axis=1).mean() > 0.9


def test_the_factor() -> None:
    _, inputs, _ = case()
    assert inputs.hessian is not None
    factor = np.array(gptq.upper(inputs.hessian, gptq.damping(inputs.hessian)), dtype=np.float64)
    hessian = damped(inputs.hessian)
    assert (np.tril(factor, -1) == 0).all()
    np.testing.assert_allclose(factor.T @ factor @ hessian, np.eye(len(hessian)), atol=1e-5)
    expected = np.linalg.cholesky(np.linalg.inv(hessian)).T
    np.testing.assert_allclose(factor, expected, rtol=1e-3, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_outputs_are_closer_than_after_a_search(bits: int, dtype: str) -> None:
    weight, inputs, hessian = case()
    weight = weight.astype(DTYPES[dtype])
    packing = Packing(bits, 64)
    plain, weighed, best = (
        cost(weight, packed, packing, hessian)
        for packed in (
            search.pack(weight, packing),
            imatrix.pack(weight, packing, inputs),
            gptq.pack(weight, packing, inputs),
        )
    )
    assert weighed < plain
    assert best < (0.6 if bits < 8 else 0.9) * plain


def test_each_sweep_lowers_the_damped_error(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, inputs, _ = case()
    assert inputs.hessian is not None
    costs = []
    for sweeps in (0, 1, 2, 4):
        monkeypatch.setattr(gptq, "SWEEPS", sweeps)
        packed = gptq.pack(weight, Packing(3, 64), inputs)
        costs.append(cost(weight, packed, Packing(3, 64), damped(inputs.hessian)))
    assert costs == sorted(costs, reverse=True)
    assert costs[1] < 0.97 * costs[0]


def test_without_correlations_it_is_a_search() -> None:
    weight, _, _ = case()
    packing = Packing(4, 64)
    found = gptq.pack(weight, packing, Inputs(mx.ones((128,)), mx.eye(128), 10))
    expected = search.pack(weight, packing)
    off = [cost(weight, each, packing, np.eye(128)) for each in (found, expected)]
    assert off[0] == pytest.approx(off[1], rel=0.02) and off[0] <= off[1]


def test_inputs_that_say_little_break_nothing() -> None:
    weight, inputs, _ = case(inputs=64)
    one = np.random.default_rng(1).normal(size=64).astype(np.float32)
    dead = np.array(inputs.hessian)
    dead[:, :9] = dead[:9] = 0.0
    for hessian in (np.zeros((64, 64)), np.outer(one, one), dead, 1e-12 * dead, 1e12 * dead):
        single = mx.array(hessian.astype(np.float32))
        packed = gptq.pack(weight, Packing(3, 32), Inputs(mx.diag(single), single, 1))
        off = dequantized(packed, Packing(3, 32)) - weight
        assert np.isfinite(np.array(off)).all()
        assert (off * off).mean().item() < 0.2  # of weights of variance 1


def test_constant_groups() -> None:
    _, inputs, _ = case()
    weight = mx.concatenate([mx.full((3, 128), 0.5), mx.zeros((2, 128))])
    packed = gptq.pack(weight, Packing(4, 64), inputs)
    np.testing.assert_allclose(np.array(dequantized(packed, Packing(4, 64))), np.array(weight), atol=1e-5)


def test_experts_and_what_falls_back() -> None:
    weight, inputs, _ = case()
    packing = Packing(4, 64)
    alone = gptq.pack(weight, packing, inputs)
    stacked = gptq.pack(weight.reshape(2, 12, 128), packing, inputs)
    assert mx.array_equal(stacked.weight.reshape(24, -1), alone.weight)
    plain = gptq.pack(weight, packing, Inputs(inputs.mean_square, None, 1))
    assert mx.array_equal(plain.weight, imatrix.pack(weight, packing, inputs).weight)
