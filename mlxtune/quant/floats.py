"""Search of the scale that a group of 4-bit floats shares: mxfp4 and nvfp4. Knows arrays, not how affine codes lie.

A scale is a byte, a power of two (mxfp4) or a float of four exponent and three mantissa bits (nvfp4). MLX takes it
from the largest value of the group; here its neighbours are tried too, and that of the least squared error is kept.
"""

import mlx.core as mx

from mlxtune.quant import rtn
from mlxtune.quant.packing import Packed, Packing, words_of

GRID = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # what a 4-bit float holds; bit 3 is its sign
NEIGHBOURS = {"mxfp4": range(-1, 2), "nvfp4": range(-5, 9)}
LARGEST = {"mxfp4": 254, "nvfp4": 126}  # scales that are finite


def pack(weight: mx.array, packing: Packing, importance: mx.array | None = None) -> Packed:
    """weight (..., O, I) -> packed, no group with a larger squared error than rounded to nearest.

    `importance` (I,) weighs each input's error. mxfp8 is rounded: it holds what lies near 0 as well with any scale.
    """
    plain = rtn.pack(weight, packing)
    if packing.mode not in NEIGHBOURS:
        return plain
    groups = weight.astype(mx.float32).reshape(*plain.scales.shape, packing.group_size)
    weights = mx.ones((1, 1)) if importance is None else importance.reshape(-1, packing.group_size)
    first = plain.scales.astype(mx.int32)
    best, least = plain.scales, mx.full(first.shape, mx.inf)
    for step in sorted(NEIGHBOURS[packing.mode], key=abs):  # MLX's own choice first
        scales = mx.clip(first + step, 0, LARGEST[packing.mode]).astype(mx.uint8)
        codes = _codes(groups, scales, packing.mode)
        values = mx.array(GRID)[codes] * _value(scales, packing.mode)[..., None]
        error = (weights * mx.square(mx.abs(groups) - values)).sum(axis=-1)
        best, least = mx.where(error < least, scales, best), mx.minimum(error, least)
        mx.eval(best, least)
    signed = _codes(groups, best, packing.mode) + 8 * (groups < 0)
    return Packed(words_of(signed.reshape(weight.shape), packing.bits), best, None)


def _value(scales: mx.array, mode: str) -> mx.array:
    """float32 of scales' bytes."""
    if mode == "nvfp4":
        return mx.from_fp8(scales, mx.float32)
    return mx.power(2.0, scales.astype(mx.float32) - 127)


def _codes(groups: mx.array, scales: mx.array, mode: str) -> mx.array:
    """The nearest of GRID's places for |groups| (..., G) over scales (...)."""
    value = _value(scales, mode)[..., None]
    over = mx.abs(groups) / mx.where(value == 0, 1.0, value)
    codes = mx.zeros(groups.shape, dtype=mx.uint32)
    for low, high in zip(GRID, GRID[1:], strict=False):
        codes = codes + (over > (low + high) / 2)
    return codes
