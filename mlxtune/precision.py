"""The precision that weights are held in: quantized layers made dense, and what a machine computes in.

Knows networks and layers, not folders.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlxtune import machine
from mlxtune.borrow import (
    MultiLinear,
    QuantizedMultiLinear,
    QuantizedSwitchLinear,
    SwitchLinear,
    get_total_parameters,
)

QUANTIZED = (nn.QuantizedLinear, nn.QuantizedEmbedding, QuantizedSwitchLinear, QuantizedMultiLinear)
MATRICES = (*QUANTIZED, nn.Linear, nn.Embedding, SwitchLinear, MultiLinear)


def for_compute(net: nn.Module, policy: machine.ComputePolicy) -> nn.Module:
    """Changes `net` to the precision that the policy computes in; the values stay those of the stored weights."""
    if policy.unfold:
        unfold(net)
    if policy.float32:
        net.set_dtype(mx.float32)
    if policy.expand:
        dequantize(net, mx.float32 if policy.float32 else None)
    if policy.spread:
        spread(net)
    return net


def unfold(net: nn.Module) -> None:
    """Lets `net` compute in float32 while its matrices stay as they are stored: each is made dense when it is used.

    A forward pass then needs the memory of the stored weights and of a layer or two; a backward pass would hold all.
    """
    for layer in net.modules():
        if isinstance(layer, MATRICES):
            layer.__class__ = _unfolded(type(layer))
        else:
            own = {name: each for name, each in layer.items() if isinstance(each, mx.array)}
            layer.update({name: each.astype(mx.float32) for name, each in own.items() if _is_float(each)})


def _unfolded(kind: type) -> type:
    """The layer that is made dense, in float32, whenever it is called."""

    def wide(layer: nn.Module, x: mx.array, *, rows: bool = False) -> Any:
        part = copy.copy(layer)
        part.__class__ = kind
        if rows:  # of an embedding
            part.update({name: part[name][x] for name in ("weight", "scales", "biases") if name in part})
        else:  # not before x is there, or many layers would be made dense at once
            (part.weight,) = mx.depends([part.weight], [x])
        if isinstance(part, QUANTIZED):
            part = dense(part, mx.float32)
        part.update({name: each.astype(mx.float32) for name, each in part.items() if isinstance(each, mx.array)})
        return part

    def call(layer: nn.Module, x: mx.array, *args: Any, **kwargs: Any) -> Any:
        if issubclass(kind, nn.Embedding | nn.QuantizedEmbedding):
            return wide(layer, x, rows=True).weight
        return wide(layer, x)(x, *args, **kwargs)

    methods: dict[str, Any] = {"__call__": call, "unfolded": True}
    if hasattr(kind, "as_linear"):
        methods["as_linear"] = lambda layer, x: wide(layer, x).as_linear(x)
    return type(kind.__name__, (kind,), methods)


@contextmanager
def one_by_one(net: nn.Module) -> Iterator[None]:
    """Inside, each layer that `unfold` left as stored is done before the next is made dense.

    MLX else hands out some layers' work ahead, each with its dense matrix. It costs time, as nothing overlaps, and
    takes no gradients. A single token, of which only shapes are asked, stays uncomputed.
    """

    def at_once(method: Any) -> Any:
        def run(layer: nn.Module, x: mx.array, *args: Any, **kwargs: Any) -> Any:
            found = method(layer, x, *args, **kwargs)
            if x.size > x.shape[-1]:
                mx.eval(found)
            return found

        return run

    layers = [(each, type(each)) for each in net.modules() if getattr(type(each), "unfolded", False)]
    for layer, kind in layers:
        methods = {name: at_once(getattr(kind, name)) for name in ("__call__", "as_linear") if hasattr(kind, name)}
        layer.__class__ = type(kind.__name__, (kind,), methods)
    try:
        yield
    finally:
        for layer, kind in layers:
            layer.__class__ = kind


def _is_float(each: mx.array) -> bool:
    return bool(mx.issubdtype(each.dtype, mx.floating))


def spread(net: nn.Module) -> None:
    """Holds the matrices of `net` with a gap of one element behind each row; their values stay.

    The reference BLAS multiplies by a transposed matrix, as every linear layer does, at half its speed (3.1 against
    6.2 GFLOP/s measured). MLX hands it a matrix or the transpose of one as it lies in memory, and copies what lies
    otherwise, which is quick, into rows that are multiplied at full speed, forward and backward.
    """
    layers = [each for each in net.modules() if isinstance(each, nn.Linear | nn.Embedding)]
    for layer in layers:
        layer.weight = mx.pad(layer.weight, [(0, 0), (0, 1)])[:, :-1]


def dequantize(net: nn.Module, dtype: mx.Dtype | None = None) -> None:
    """Replaces the quantized layers of `net` by dense ones of the same values, in `dtype` or as `dense_dtype` says."""
    layers = [(name, each) for name, each in net.named_modules() if isinstance(each, QUANTIZED)]
    net.update_modules(tree_unflatten([(name, dense(each, dtype or dense_dtype(each))) for name, each in layers]))


def dense_dtype(layer: nn.Module) -> mx.Dtype:
    """The precision that a quantized layer computes in: that of its scales, bfloat16 where these are no floats."""
    return layer.scales.dtype if _is_float(layer.scales) else mx.bfloat16


def dense(layer: nn.Module, dtype: mx.Dtype) -> nn.Module:
    """The dense layer of a quantized one. The values are computed in float32, whatever the scales are stored in."""

    def values(weight: mx.array, scales: mx.array, biases: mx.array | None, own: mx.array | None) -> mx.array:
        if biases is not None:
            scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
        packing = {"group_size": layer.group_size, "bits": layer.bits, "mode": layer.mode}
        return mx.dequantize(weight, scales, biases, **packing, global_scale=own, dtype=mx.float32)

    bias = "bias" in layer
    made: nn.Module
    if isinstance(layer, nn.QuantizedEmbedding):
        made = nn.Embedding(1, 1)
    elif isinstance(layer, QuantizedSwitchLinear):
        made = SwitchLinear(1, 1, 1, bias=bias)
    else:
        made = MultiLinear(1, 1, 1) if isinstance(layer, QuantizedMultiLinear) else nn.Linear(1, 1, bias=bias)
    if "global_scale" in layer:  # one for each expert
        experts = zip(layer.weight, layer.scales, layer.global_scale, strict=True)
        weight = mx.stack([values(weight, scales, None, own) for weight, scales, own in experts])
    else:
        weight = values(layer.weight, layer.scales, layer.biases, None)
    made.weight = weight.astype(dtype)
    if bias:
        made.bias = layer.bias
    return made


def parameter_count(net: nn.Module) -> int:
    """Weights of a network, counted as if it were not quantized."""
    return int(get_total_parameters(net))


def bits_per_weight(net: nn.Module) -> float:
    """Stored bits over weights, scales and biases included."""
    stored: int = sum(weight.nbytes for _, weight in tree_flatten(net.parameters()))
    return 8 * stored / parameter_count(net)
