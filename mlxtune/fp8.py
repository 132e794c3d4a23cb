"""Weights stored as 8-bit floats (E4M3) with scales: made dense before an architecture sees them. Knows no folders.

mlx-lm does this for some architectures, always in blocks of 128; one of them multiplies the bytes as whole numbers.
"""

from collections.abc import Collection
from dataclasses import dataclass

import mlx.core as mx

DTYPE = "F8_E4M3"  # as safetensors names it; MLX reads its bytes as uint8
SCALES = ("_scale_inv", "_scale")  # DeepSeek's and compressed-tensors' names; a weight is multiplied by either
ACTIVATIONS = ("input_scale", "activation_scale", "output_scale", ".k_scale", ".v_scale")  # of computing in 8 bits

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """What of a checkpoint is in 8 bits: the weights' `names`, the `block` (rows, columns) that shares a scale."""

    names: frozenset[str]
    block: tuple[int, int] | None
    dtype: mx.Dtype


def scale_name(name: str, names: Collection[str]) -> str | None:
    """The name of the scales of the weight `name`, or None."""
    return next((name + each for each in SCALES if name + each in names), None)


def fits(weight: Shape, scales: Shape, block: tuple[int, int] | None) -> bool:
    """Whether scales of that shape say how to scale a weight: one for all, one a row, one an expert, or one a block."""
    return _spreads(weight, scales) or (block is not None and scales == _in_blocks(weight, block))


def dense(weight: mx.array, scales: mx.array, stored: Stored) -> mx.array:
    """The values w · s of a weight (..., O, I) in E4M3, computed in float32, as `stored.dtype`."""
    values = mx.from_fp8(weight, dtype=mx.float32)
    scales = scales.astype(mx.float32)
    if not _spreads(weight.shape, scales.shape):
        assert stored.block is not None
        for axis, length in zip((-2, -1), stored.block, strict=True):
            scales = mx.repeat(scales, length, axis=axis)
        scales = scales[..., : weight.shape[-2], : weight.shape[-1]]
    return (values * scales).astype(stored.dtype)


def all_dense(weights: dict[str, mx.array], stored: Stored) -> dict[str, mx.array]:
    """`weights` without 8-bit floats and their scales. Nothing is computed yet."""
    made = {
        name: weight
        for name, weight in weights.items()
        if not name.endswith(ACTIVATIONS) and name.removesuffix("_inv").removesuffix("_scale") not in stored.names
    }
    for name in stored.names:
        found = scale_name(name, weights)
        assert found is not None
        made[name] = dense(weights[name], weights[found], stored)
    return made


def _spreads(weight: Shape, scales: Shape) -> bool:
    """Whether each axis of `scales` has length 1 or the weight's."""
    if all(axis == 1 for axis in scales):
        return len(scales) <= len(weight)
    return len(scales) == len(weight) and all(own in (1, axis) for own, axis in zip(scales, weight, strict=True))


def _in_blocks(weight: Shape, block: tuple[int, int]) -> Shape | None:
    if len(weight) < 2:
        return None
    return (*weight[:-2], -(-weight[-2] // block[0]), -(-weight[-1] // block[1]))
