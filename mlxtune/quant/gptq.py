"""Rounding whose errors later inputs make good (GPTQ), with searched scales. Knows arrays, not networks.

Frantar et al. 2022, arXiv 2210.17323. With H the mean of x·xᵀ over the inputs of a layer, the mean square error of an
output is e·H·eᵀ for the row e = ŵ - w. Inputs are rounded one after the other; the error of each is spread over those
not yet rounded, as H⁻¹ = Uᵀ·U, U upper triangular, says: w_k ← w_k - (w_j - ŵ_j) / U_jj · U_jk for k > j.
What an error in input j then costs is 1 / U_jj², and with these weights scale and bias of a group are searched when
its turn comes. Afterwards rounds of descent go over the groups again: each code is set to what is best while all
others stay, then scale and bias of the group, all by e·H·eᵀ.
"""

from dataclasses import dataclass

import mlx.core as mx

from mlxtune.quant import search
from mlxtune.quant.calibrate import Inputs
from mlxtune.quant.packing import Packed, Packing, words_down

DAMPING = 0.05  # of H's mean diagonal, added to it
SWEEPS = 2
SINGULAR = 1e-6  # share of a determinant's terms below which all codes of a group are as good as the same


@dataclass(frozen=True, slots=True)
class _Groups:
    """A weight on its way, transposed so that inputs come first: codes (I, O), scales and biases (I/G, O), float32."""

    codes: mx.array
    scales: mx.array
    biases: mx.array


def pack(weight: mx.array, packing: Packing, inputs: Inputs) -> Packed:
    """weight (..., O, I) -> packed. Without a hessian, or in a mode of floats: as `search` does."""
    if inputs.hessian is None or packing.mode != "affine":
        return search.pack(weight, packing, inputs.mean_square)
    rows = weight.reshape(-1, weight.shape[-1])
    turned = mx.contiguous(rows.astype(mx.float32).T)
    more = damping(inputs.hessian)
    factor = upper(inputs.hessian, more)
    mx.eval(more, factor)
    found = _rounded(turned, packing, factor, rows.dtype)
    del factor
    for _ in range(SWEEPS):
        found = _swept(turned, packing, inputs.hessian, more, found, rows.dtype)
    lead = weight.shape[:-1]
    return Packed(
        words_down(found.codes, packing.bits).T.reshape(*lead, -1),
        found.scales.T.astype(rows.dtype).reshape(*lead, -1),
        found.biases.T.astype(rows.dtype).reshape(*lead, -1),
    )


def _rounded(turned: mx.array, packing: Packing, factor: mx.array, dtype: mx.Dtype) -> _Groups:
    """GPTQ over weights (I, O) with U = `factor` (I, I)."""
    size, top = packing.group_size, float(2**packing.bits - 1)
    cost = 1 / mx.diag(factor) ** 2
    made: list[tuple[mx.array, mx.array, mx.array]] = []
    for start in range(0, len(turned), size):
        part = slice(start, start + size)
        block = turned[part]
        scale, bias = search.scale_and_bias(block, packing, cost[part], dtype)
        inverse, inner = _inverse(scale), factor[part, part]
        codes, errors = [], []
        for i in range(size):
            codes.append(mx.clip(mx.round((block[i] - bias) * inverse), 0, top))
            errors.append((block[i] - (scale * codes[i] + bias)) / inner[i, i])
            block = block - inner[i][:, None] * errors[i]
        spread = factor[part, start + size :].T @ mx.stack(errors)
        turned = mx.concatenate([turned[: start + size], turned[start + size :] - spread])
        made.append((mx.stack(codes), scale, bias))
        mx.eval(turned, made[-1])
    return _together(made)


def _swept(
    turned: mx.array, packing: Packing, hessian: mx.array, more: mx.array, found: _Groups, dtype: mx.Dtype
) -> _Groups:
    """A round of descent on e·H·eᵀ for weights (I, O): in each group the codes one by one, then scale and bias.

    H is `hessian` with `more` on its diagonal.

    With r = H·e (I) of what is left, a value v_j is best at v_j + r_j / H_jj. With the codes c of a group fixed,
    the changes δ of scale and ε of bias solve cᵀHc·δ + cᵀH1·ε = cᵀr and cᵀH1·δ + 1ᵀH1·ε = 1ᵀr.
    """
    size, top = packing.group_size, float(2**packing.bits - 1)
    values = mx.repeat(found.scales, size, axis=0) * found.codes + mx.repeat(found.biases, size, axis=0)
    error = turned - values
    made: list[tuple[mx.array, mx.array, mx.array]] = []
    for number in range(len(found.scales)):
        part = slice(number * size, (number + 1) * size)
        scale, bias, old = found.scales[number], found.biases[number], values[part]
        inner, inverse = hessian[part, part] + more * mx.eye(size), _inverse(scale)
        left = hessian[part] @ error + more * error[part]
        codes = []
        for i in range(size):
            best = old[i] + left[i] / inner[i, i]
            codes.append(mx.clip(mx.round((best - bias) * inverse), 0, top))
            left = left - inner[:, i][:, None] * (scale * codes[i] + bias - old[i])
        chosen = mx.stack(codes)
        scale, bias = _refitted(chosen, scale, bias, inner, left, dtype)
        error = mx.concatenate([error[: part.start], turned[part] - (scale * chosen + bias), error[part.stop :]])
        made.append((chosen, scale, bias))
        mx.eval(error, made[-1])
    return _together(made)


def _refitted(
    codes: mx.array, scale: mx.array, bias: mx.array, inner: mx.array, left: mx.array, dtype: mx.Dtype
) -> tuple[mx.array, mx.array]:
    """The best scale and bias (O,) for codes (G, O), H (G, G) among them and r (G, O); see `_swept`."""
    weighed = inner @ codes
    squares, mixed, ones = (codes * weighed).sum(axis=0), weighed.sum(axis=0), inner.sum()
    determinant = squares * ones - mixed * mixed
    usable = determinant > SINGULAR * squares * ones
    change = ((codes * left).sum(axis=0) * ones - left.sum(axis=0) * mixed) / mx.where(usable, determinant, 1.0)
    new = (scale + mx.where(usable, change, 0.0)).astype(dtype).astype(mx.float32)
    new = mx.where(new == 0, scale, new)
    return new, (bias + (left.sum(axis=0) - (new - scale) * mixed) / ones).astype(dtype).astype(mx.float32)


def _inverse(scale: mx.array) -> mx.array:
    return mx.where(scale == 0, 0.0, 1 / mx.where(scale == 0, 1.0, scale))


def _together(made: list[tuple[mx.array, mx.array, mx.array]]) -> _Groups:
    return _Groups(
        mx.concatenate([codes for codes, _, _ in made]),
        mx.stack([scale for _, scale, _ in made]),
        mx.stack([bias for _, _, bias in made]),
    )


def damping(hessian: mx.array, share: float = DAMPING) -> mx.array:
    """What is added to the diagonal of H (I, I): a `share` of its mean, so that none is singular; 1 where that is 0."""
    mean = mx.diag(hessian).mean()
    return mx.where(mean > 0, share * mean, 1.0)


def upper(hessian: mx.array, more: mx.array) -> mx.array:
    """U (I, I), upper triangular, of H⁻¹ = Uᵀ·U, where H is `hessian` with `more` on its diagonal.

    With H reversed both ways = L·Lᵀ, U is L⁻¹ reversed.
    """
    each = mx.arange(len(hessian))
    turned = mx.contiguous(hessian[::-1, ::-1]).at[each, each].add(more)
    lower = mx.linalg.cholesky(turned, stream=mx.cpu)
    return mx.contiguous(mx.linalg.tri_inv(lower, stream=mx.cpu)[::-1, ::-1])
