"""Round-to-nearest quantization, as MLX packs it. Knows networks and bits, not folders."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlxtune.errors import ModelError
from mlxtune.precision import parameter_count
from mlxtune.quant.packing import Packed, Packing
from mlxtune.recipe import QuantizeRecipe


@dataclass(frozen=True, slots=True)
class Quantized:
    """What was done: bits per weight over all weights, and the layers left in full precision with the reason."""

    bits_per_weight: float
    layers: int
    left_out: dict[str, str]


def pack(weight: mx.array, packing: Packing) -> Packed:
    """Each weight of (..., O, I) rounded to the nearest code, the scale and bias of a group from its range alone."""
    words, scales, *biases = mx.quantize(weight, **packing.described)
    return Packed(words, scales, biases[0] if biases else None)


def quantize(net: nn.Module, config: dict[str, Any], spec: QuantizeRecipe) -> tuple[dict[str, Any], Quantized]:
    """Quantizes the layers of `net` in place; returns the config that describes it.

    Raises ModelError for a net that is quantized already, or when the group size divides no layer.
    """
    if "quantization" in config:
        raise ModelError("is quantized already", hint="start from the original model, or dequantize it first")
    wanted: Callable[[str, nn.Module], bool | dict[str, Any]] | None = getattr(net, "quant_predicate", None)
    packing = {"group_size": spec.group_size, "bits": spec.bits, "mode": spec.mode}
    described: dict[str, Any] = dict(packing)
    left_out: dict[str, str] = {}
    done: list[str] = []

    def choose(name: str, module: nn.Module) -> bool | dict[str, Any]:
        if not hasattr(module, "to_quantized"):
            return False
        choice = wanted(name, module) if wanted is not None else True
        if not choice:
            left_out[name] = "the architecture keeps it in full precision"
            return False
        own = choice if isinstance(choice, dict) else packing
        inputs = module.weight.shape[-1]
        if inputs % own["group_size"]:
            left_out[name] = f"{inputs} inputs are no multiple of {own['group_size']}"
            return False
        if isinstance(choice, dict):
            described[name] = choice
        done.append(name)
        return choice

    nn.quantize(net, spec.group_size, spec.bits, mode=spec.mode, class_predicate=choose)
    if not done:
        raise ModelError(
            f"no layer can be quantized in groups of {spec.group_size}",
            where="group_size",
            hint="try 32, or leave it out",
        )
    mx.eval(net.parameters())
    new_config = {**config, "quantization": described, "quantization_config": described}
    return new_config, Quantized(bits_per_weight(net), len(done), left_out)


def bits_per_weight(net: nn.Module) -> float:
    """Stored bits over weights, scales and biases included."""
    stored: int = sum(weight.nbytes for _, weight in tree_flatten(net.parameters()))
    return 8 * stored / parameter_count(net)
