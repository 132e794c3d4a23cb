"""Search of scale and bias in which a weight counts as much as its input's mean square. Knows arrays, not networks.

The error of a layer's outputs is sum over i of (ŵ_i - w_i) · x_i; were the inputs uncorrelated, its mean square would
be sum over i of E[x_i²] · (ŵ_i - w_i)², which is what `search` minimizes with these weights.
"""

import mlx.core as mx

from mlxtune.quant import search
from mlxtune.quant.calibrate import Inputs
from mlxtune.quant.packing import Packed, Packing


def pack(weight: mx.array, packing: Packing, inputs: Inputs) -> Packed:
    """weight (..., O, I) -> packed."""
    return search.pack(weight, packing, inputs.mean_square)
