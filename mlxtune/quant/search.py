"""Data-free search of each group's scale and bias: least squares over codes, scale and bias together.

Knows arrays, not networks. For a group w (G) and weights h (G) of the squared error, it looks for

    min over s, b, q of  sum_i h_i · (w_i - (s · q_i + b))²,   q_i in 0 … 2^bits - 1.

With s and b given the best q_i is the nearest code; with q given the best s and b are a weighted linear regression
of w on q, whose error follows from its sums. The two steps alternate, first from each of a few ranges that are
narrower than that of the group, then from the best; the best of all, in the precision that scales are stored in, is
kept.

Groups lie in columns, (G, N): so every step but sums runs along N, with a scale for each column.
"""

import mlx.core as mx

from mlxtune import machine
from mlxtune.quant import floats, rtn
from mlxtune.quant.packing import Packed, Packing, words_down

SHRINKS = {  # of a group's range, where the search starts, for each number of bits; more of them gain 1 % at most
    2: (0.9, 0.75, 0.6),
    3: (0.95, 0.85, 0.75),
    4: (0.97, 0.91, 0.82),
    5: (1.0, 0.95, 0.9),
    6: (1.0, 0.97, 0.94),
    8: (1.0, 0.995, 0.99),
}
ROUNDS = 3  # from the best of these on
CHUNK = {"cpu": 1 << 18}  # weights at once, so that they stay in a core's cache
CHUNK_ELSEWHERE = 1 << 24
TINY = 1e-30
ROUNDER = 1.5 * 2**23  # added to a small float32 it leaves no place behind the point: quicker than to round


def pack(weight: mx.array, packing: Packing, importance: mx.array | None = None) -> Packed:
    """weight (..., O, I) -> packed, with a squared error in no group above that of rounding to nearest.

    `importance` (I,) weighs the squared error of each input's weights; None: all alike.
    """
    if packing.mode != "affine":
        return floats.pack(weight, packing, importance)
    rows = weight.reshape(-1, weight.shape[-1])
    size = max(1, CHUNK.get(machine.device_kind(), CHUNK_ELSEWHERE) // rows.shape[-1])
    made = []
    for start in range(0, len(rows), size):
        part = _rows(rows[start : start + size], packing, importance)
        mx.eval(part.weight, part.scales, part.biases)
        made.append(part)
    lead = weight.shape[:-1]
    return Packed(
        mx.concatenate([each.weight for each in made]).reshape(*lead, -1),
        mx.concatenate([each.scales for each in made]).reshape(*lead, -1),
        mx.concatenate([each.biases for each in made if each.biases is not None]).reshape(*lead, -1),
    )


def _rows(rows: mx.array, packing: Packing, importance: mx.array | None) -> Packed:
    """(R, I) -> packed."""
    count = len(rows)
    groups = columns(rows.astype(mx.float32), packing.group_size)
    weights = None
    if importance is not None:
        each = columns(importance.astype(mx.float32)[None], packing.group_size)
        weights = mx.contiguous(mx.tile(each / mx.maximum(each.mean(axis=0), TINY), (1, count)))
    plain = rtn.pack(rows, packing)
    assert plain.biases is not None
    first = (plain.scales.reshape(-1).astype(mx.float32), plain.biases.reshape(-1).astype(mx.float32))
    scale, bias = searched(groups, packing.bits, first, weights, rows.dtype)
    words = words_down(_codes(groups, scale, bias, 2**packing.bits - 1), packing.bits)  # (G·bits/32, N)
    return Packed(
        words.T.reshape(count, -1),
        scale.astype(rows.dtype).reshape(count, -1),
        bias.astype(rows.dtype).reshape(count, -1),
    )


def columns(rows: mx.array, group_size: int) -> mx.array:
    """(R, I) -> (G, R·I/G): the groups of one row after those of the other."""
    return mx.contiguous(rows.reshape(-1, group_size).T)


def scale_and_bias(
    groups: mx.array, packing: Packing, importance: mx.array, dtype: mx.Dtype
) -> tuple[mx.array, mx.array]:
    """(N,) of groups (G, N), float32 with values of `dtype`; `importance` (G,) weighs each input's squared error."""
    plain = rtn.pack(groups.T.astype(dtype), packing)
    assert plain.biases is not None
    first = (plain.scales[:, 0].astype(mx.float32), plain.biases[:, 0].astype(mx.float32))
    weights = mx.contiguous(mx.broadcast_to((importance / importance.mean())[:, None], groups.shape))
    return searched(groups, packing.bits, first, weights, dtype)


def searched(
    groups: mx.array, bits: int, first: tuple[mx.array, mx.array], weights: mx.array | None, dtype: mx.Dtype
) -> tuple[mx.array, mx.array]:
    """Scales and biases (N,) of groups (G, N), float32 but with values of `dtype`; no worse than `first`.

    `weights` (G, N) of the squared error, None: all alike.
    """
    top = 2**bits - 1
    centre = _mean(groups, weights)  # sums of what lies around 0 lose least in float32
    around = groups - centre
    weighted = around if weights is None else around * weights
    low, high = around.min(axis=0), around.max(axis=0)
    width = mx.maximum(high - low, TINY)
    scale, bias, least = width / top, low, mx.full(width.shape, -mx.inf)
    for step in (*SHRINKS[bits], *[None] * ROUNDS):
        start = (scale, bias) if step is None else (width * (step / top), low + width * ((1 - step) / 2))
        gain, new_scale, new_bias = _fitted(weighted, _codes(around, *start, top), weights)
        better = gain > least
        scale, bias = mx.where(better, new_scale, scale), mx.where(better, new_bias, bias)
        least = mx.maximum(gain, least)
    scale = scale.astype(dtype).astype(mx.float32)
    scale = mx.where(scale == 0, first[0], scale)
    left = around - scale * _codes(around, scale, bias, top)
    bias = (centre + _mean(left, weights)).astype(dtype).astype(mx.float32)
    better = _error(groups, scale, bias, top, weights) < _error(groups, *first, top, weights)
    return mx.where(better, scale, first[0]), mx.where(better, bias, first[1])


def _codes(groups: mx.array, scale: mx.array, bias: mx.array, top: int) -> mx.array:
    """The nearest codes, in float32."""
    inverse = mx.where(scale == 0, 0.0, 1 / mx.where(scale == 0, 1.0, scale))
    return mx.clip((groups - bias) * inverse + ROUNDER, ROUNDER, ROUNDER + top) - ROUNDER


def _mean(groups: mx.array, weights: mx.array | None) -> mx.array:
    if weights is None:
        return groups.mean(axis=0)
    return (groups * weights).sum(axis=0) / mx.maximum(weights.sum(axis=0), TINY)


def _fitted(weighted: mx.array, codes: mx.array, weights: mx.array | None) -> tuple[mx.array, mx.array, mx.array]:
    """The regression on codes (G, N) of groups whose weighted mean is 0 and which are `weighted`.

    How much of the squared error it explains, scale and bias, each (N,).
    """
    both = (weighted * codes).sum(axis=0)
    counted = codes if weights is None else codes * weights
    total, squares = counted.sum(axis=0), (counted * codes).sum(axis=0)
    size = mx.array(float(len(codes))) if weights is None else mx.maximum(weights.sum(axis=0), TINY)
    middle = total / size
    scale = both / mx.maximum(squares - middle * total, TINY)
    return both * scale, scale, -scale * middle


def _error(groups: mx.array, scale: mx.array, bias: mx.array, top: int, weights: mx.array | None) -> mx.array:
    off = groups - (scale * _codes(groups, scale, bias, top) + bias)
    return ((off * off) if weights is None else off * off * weights).sum(axis=0)
