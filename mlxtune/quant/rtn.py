"""Round-to-nearest quantization, as MLX packs it. Knows arrays, not networks."""

import mlx.core as mx

from mlxtune.quant.packing import Packed, Packing


def pack(weight: mx.array, packing: Packing) -> Packed:
    """Each weight of (..., O, I) rounded to the nearest code, the scale and bias of a group from its range alone."""
    words, scales, *biases = mx.quantize(weight, **packing.described)
    return Packed(words, scales, biases[0] if biases else None)
