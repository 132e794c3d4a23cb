"""Which layers of a network are quantized, how each is packed, and why others are not. Knows shapes, no values."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlxtune.errors import ModelError
from mlxtune.quant.packing import WORD, Packing
from mlxtune.shards import Tensor

Predicate = Callable[[str, nn.Module], bool | dict[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """A layer of `parameters` weights that could be quantized; `packing` is None where it is `left_out`, for a reason.

    `bits_per_weight` counts scales and biases.
    """

    name: str
    parameters: int
    packing: Packing | None
    bits_per_weight: float
    left_out: str | None = None


def chosen(
    net: nn.Module, asked: Packing, dtypes: Mapping[str, mx.Dtype], own: Mapping[str, Packing] | None = None
) -> list[Layer]:
    """The layers of `net` in its order, packed as `asked` where the architecture and `own` want nothing else.

    `dtypes` are those that the weights, by their names, are packed from. Raises ModelError when the groups divide no
    layer, and for a layer of `own` that is not there or does not divide.
    """
    wanted: Predicate | None = getattr(net, "quant_predicate", None)
    modules = dict(net.named_modules())
    names = [name.removesuffix(".weight") for name, _ in tree_flatten(net.parameters()) if name.endswith(".weight")]
    own = own or {}
    layers = [
        _layer(name, modules[name], asked, own.get(name), wanted, dtypes[f"{name}.weight"])
        for name in names
        if name in modules and hasattr(modules[name], "to_quantized")
    ]
    by_name = {layer.name: layer for layer in layers}
    for name in own:
        if name not in by_name:
            raise ModelError("is no layer that can be quantized", where=name)
        if by_name[name].left_out is not None:
            raise ModelError(f"cannot be quantized so: {by_name[name].left_out}", where=name)
    if all(layer.packing is None for layer in layers):
        raise ModelError(
            f"no layer can be quantized in groups of {asked.group_size}",
            where="group_size",
            hint="try 32, or leave it out",
        )
    return layers


def _layer(
    name: str, module: nn.Module, asked: Packing, own: Packing | None, wanted: Predicate | None, dtype: mx.Dtype
) -> Layer:
    weight = module.weight

    def left_out(reason: str) -> Layer:
        return Layer(name=name, parameters=weight.size, packing=None, bits_per_weight=8 * dtype.size, left_out=reason)

    own_form = "mode" in inspect.signature(module.to_quantized).parameters
    if not own_form or module.parameters().keys() - {"weight", "bias"}:
        return left_out("mlx-lm has no packed form of it")
    choice = own.described if own is not None else wanted(name, module) if wanted is not None else True
    if not choice:
        return left_out("the architecture keeps it in full precision")
    packing = Packing(**choice) if isinstance(choice, dict) else asked
    inputs = weight.shape[-1]
    if inputs % packing.group_size:
        return left_out(f"{inputs} inputs are no multiple of {packing.group_size}")
    stored = sum(each.nbytes for each in packed_tensors(name, tuple(weight.shape), dtype, packing))
    return Layer(name=name, parameters=weight.size, packing=packing, bits_per_weight=8 * stored / weight.size)


def packed_tensors(layer: str, shape: tuple[int, ...], dtype: mx.Dtype, packing: Packing) -> tuple[Tensor, ...]:
    """What a weight (..., O, I) of `layer` is packed into: words, scales and, in the affine mode, biases."""
    *lead, inputs = shape
    words = Tensor(f"{layer}.weight", mx.uint32, (*lead, inputs * packing.bits // WORD))
    affine = packing.mode == "affine"
    groups = (*lead, inputs // packing.group_size)
    scales = Tensor(f"{layer}.scales", dtype if affine else mx.uint8, groups)
    return (words, scales, Tensor(f"{layer}.biases", dtype, groups)) if affine else (words, scales)


def described(config: dict[str, Any], asked: Packing, layers: list[Layer]) -> dict[str, Any]:
    """The config of the quantized network; a layer packed otherwise than `asked` is named in it."""
    packing: dict[str, Any] = dict(asked.described)
    for layer in layers:
        if layer.packing is not None and layer.packing != asked:
            packing[layer.name] = layer.packing.described
    return {**config, "quantization": packing, "quantization_config": packing}
