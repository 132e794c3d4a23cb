"""Makes adapted layers plain again, packed as they were, and measures how much of the change survives. Knows layers.

A packed layer takes only values of its grid, so W + ΔW is packed anew. Where the inputs x of the layer are known that
is done by GPTQ, so that what is lost is small in the outputs, (Ŵ - W - ΔW)·x, rather than in the weights; else by the
search for each group's best scale and bias. Knows nothing of folders and of how inputs are found.
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from mlxtune import adapter, precision
from mlxtune.errors import FuseError, ModelError
from mlxtune.layers import chosen, packed_tensors
from mlxtune.quant import gptq, search
from mlxtune.quant.calibrate import Inputs
from mlxtune.quant.packing import Packed, Packing, dequantized
from mlxtune.recipe import FuseRecipe

WIDTHS = (2, 3, 4, 5, 6, 8)  # bits that the affine format has
LIKE = 0.7  # cosine of a base's weights with those it was quantized from; two bits of groups of 128 reach 0.9

Keep = Callable[[str, nn.Module], nn.Module]


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What became of the adapter's change ΔW of one layer, made again with `bits` (None: dense).

    `asked` is ‖ΔW‖. With the change made D = Ŵ - W, `norm` is ‖D‖ / ‖ΔW‖ and `cosine` that between D and ΔW.
    `lost` is ‖(D - ΔW)·X‖² / ‖ΔW·X‖² over the layer's inputs X: the noise in its outputs beside what was learned;
    without inputs of the weights alone. None, all but `asked`, where the adapter changes nothing.
    """

    name: str
    bits: int | None
    asked: float
    norm: float | None
    cosine: float | None
    lost: float | None


def packing_of(layer: nn.Module) -> Packing | None:
    """How a layer, with an adapter or without, is packed."""
    stored = layer.linear if isinstance(layer, adapter.ADAPTED) else layer
    if not isinstance(stored, precision.QUANTIZED):
        return None
    return Packing(int(stored.bits), int(stored.group_size), str(stored.mode))


def planned(net: nn.Module, plain: nn.Module, settings: FuseRecipe) -> dict[str, Packing | None]:
    """The layers that are made again and how each is packed, None: dense. `plain` is `net` without its adapter.

    These are the adapted ones, and where a dense base is to have `settings.bits`, all that can be quantized.
    """
    adapted = {name: packing_of(layer) for name, layer in adapter.adapted_layers(net)}
    if settings.dequantize:
        return dict.fromkeys(adapted)
    if settings.bits is not None and not any(isinstance(each, precision.QUANTIZED) for each in plain.modules()):
        layers = chosen(plain, Packing(settings.bits, 64, "affine"), _dtypes(plain))
        return dict.fromkeys(adapted) | {each.name: each.packing for each in layers if each.packing is not None}
    layers_of = dict(plain.named_modules())
    return {
        name: None if packing is None else with_bits(packing, inputs_of(layers_of[name]), settings.bits)
        for name, packing in adapted.items()
    }


def _dtypes(net: nn.Module) -> dict[str, mx.Dtype]:
    return {name: each.dtype for name, each in tree_flatten(net.parameters())}


def inputs_of(layer: nn.Module) -> int:
    """The inputs of a linear layer, packed or not."""
    width: int = layer.weight.shape[-1]
    return width * 32 // int(layer.bits) if isinstance(layer, precision.QUANTIZED) else width


def with_bits(packing: Packing, inputs: int, bits: int | None) -> Packing:
    """`packing` itself, or with `bits`, in the affine format, which has every number of bits. Raises FuseError."""
    if bits is None or bits == packing.bits:
        return packing
    groups = [packing.group_size] if packing.mode == "affine" else [size for size in (64, 32) if inputs % size == 0]
    if not groups:
        raise FuseError(f"{inputs} inputs of a layer divide by no group of {bits}-bit weights", hint="use --dequantize")
    return Packing(bits, groups[0], "affine")


def remake(
    net: nn.Module,
    packings: Mapping[str, Packing | None],
    inputs: Mapping[str, Inputs],
    originals: Mapping[str, nn.Module] | None = None,
    keep: Keep = lambda name, made: made,
) -> list[Change]:
    """Replaces the layers of `net` that `packings` names by what `keep` gives for the layer made of each, one by one.

    Adapted layers lose their adapter, in float32 and rounded once. `originals` are the layers that the base was
    quantized from: then the change is added to their weights. Raises ModelError where they are not what the base came
    from, or where a layer holds NaN or infinite values.
    """
    changes = []
    layers = dict(net.named_modules())
    for name, packing in packings.items():
        layer = layers.pop(name)
        made, change = _remade(name, layer, packing, inputs.get(name), (originals or {}).get(name))
        net.update_modules(tree_unflatten([(name, keep(name, made))]))
        if change is not None:
            changes.append(change)
        del layer, made
    return changes


def _remade(
    name: str, layer: nn.Module, packing: Packing | None, inputs: Inputs | None, original: nn.Module | None
) -> tuple[nn.Module, Change | None]:
    adapted = isinstance(layer, adapter.ADAPTED)
    stored = layer.linear if adapted else layer
    own = packing_of(layer)
    dtype = precision.dense_dtype(stored) if own is not None else stored.weight.dtype
    dense = precision.dense(stored, mx.float32) if own is not None else copy.copy(stored)
    weight = dense.weight.astype(mx.float32)
    if original is not None:
        weight = _like(name, original.weight.astype(mx.float32), weight)
    wanted = adapter.fused_weight(layer, weight) if adapted else weight
    if not mx.all(mx.isfinite(wanted)).item():
        raise ModelError("holds NaN or infinite values", where=name, hint="download or train the model again")
    if packing is None:
        dense.weight = wanted.astype(dtype)
        made, values = dense, dense.weight.astype(mx.float32)
    else:
        packed = _packed(wanted.astype(dtype), packing, inputs)
        mx.eval(packed.weight, packed.scales)
        made, values = packed_layer(dense if own is None else stored, packed, packing), dequantized(packed, packing)
    change = _change(name, packing, weight, wanted, values, inputs) if adapted else None
    return made, change


def _like(name: str, original: mx.array, weight: mx.array) -> mx.array:
    """`original`, if `weight` may have been quantized from it. Raises ModelError."""
    if original.shape == weight.shape:
        sizes = _norm(original) * _norm(weight)
        if sizes == 0 or _product(original, weight) >= LIKE * sizes:
            return original
    raise ModelError(
        f"the base was not quantized from this model: {name} differs", hint="give the model that the base was made of"
    )


def _packed(weight: mx.array, packing: Packing, inputs: Inputs | None) -> Packed:
    return search.pack(weight, packing) if inputs is None else gptq.pack(weight, packing, inputs)


def packed_layer(layer: nn.Module, packed: Packed, packing: Packing) -> nn.Module:
    """The quantized layer of `packed`, with all else of `layer`, which may be dense."""
    packs = isinstance(layer, precision.QUANTIZED)
    # of what a dense layer makes only the class and the names are used: MLX is lazy, no value is ever computed
    made = copy.copy(layer) if packs else layer.to_quantized(**packing.described)
    made.pop("global_scale", None)
    made.weight, made.scales, made.biases = packed.weight, packed.scales, packed.biases
    made.bits, made.group_size, made.mode = packing.bits, packing.group_size, packing.mode
    return made


def _change(
    name: str, packing: Packing | None, weight: mx.array, wanted: mx.array, values: mx.array, inputs: Inputs | None
) -> Change:
    asked, made = wanted - weight, values - weight
    norm, made_norm = _norm(asked), _norm(made)
    bits = None if packing is None else packing.bits
    effect = _energy(asked, inputs)
    if not norm or not effect:
        return Change(name=name, bits=bits, asked=norm, norm=None, cosine=None, lost=None)
    cosine = _product(asked, made) / (norm * made_norm) if made_norm else 0.0
    lost = _energy(values - wanted, inputs) / effect
    return Change(name=name, bits=bits, asked=norm, norm=made_norm / norm, cosine=cosine, lost=lost)


def _energy(rows: mx.array, inputs: Inputs | None) -> float:
    """The mean square of rows·x, summed over rows (…, O, I): over the inputs x where they are known, else ‖rows‖²."""
    if inputs is None or inputs.hessian is None:
        return _product(rows, rows)
    return max(0.0, _product(rows @ inputs.hessian, rows))


def _norm(rows: mx.array) -> float:
    return math.sqrt(_product(rows, rows))


def _product(one: mx.array, other: mx.array) -> float:
    """The sum of the products of their elements: of each row in float32, of these in float64."""
    rows = (one * other).sum(axis=-1)
    return float(np.array(rows, dtype=np.float64).sum())


def raised(
    packings: Mapping[str, Packing | None], changes: Sequence[Change], net: nn.Module, spare_bits: float
) -> dict[str, Packing]:
    """The worst quarter of the layers with their next number of bits, as far as `spare_bits` more may be stored."""
    lost = {change.name: change.lost for change in changes if change.lost is not None}
    worst = sorted(lost, key=lambda name: -(lost[name] or 0.0))
    layers = dict(net.named_modules())
    found: dict[str, Packing] = {}
    for name in worst:
        packing = packings[name]
        if packing is None or packing.bits == WIDTHS[-1]:
            continue
        more = next(bits for bits in WIDTHS if bits > packing.bits)
        try:
            cost = extra_bits(net, name, packing, more)
        except FuseError:
            continue
        if cost <= spare_bits:
            found[name] = with_bits(packing, inputs_of(layers[name]), more)
            spare_bits -= cost
        if len(found) >= math.ceil(len(worst) / 4):
            break
    return found


def extra_bits(net: nn.Module, name: str, packing: Packing, bits: int) -> int:
    """How many more bits a layer of `net` takes with `bits` a weight than in `packing`."""
    layer = dict(net.named_modules())[name]
    return _stored(layer, with_bits(packing, inputs_of(layer), bits)) - _stored(layer, packing)


def _stored(layer: nn.Module, packing: Packing) -> int:
    """Bits that the weight of `layer` takes in this packing, scales and biases included."""
    shape = (*layer.weight.shape[:-1], inputs_of(layer))
    dtype = precision.dense_dtype(layer) if isinstance(layer, precision.QUANTIZED) else layer.weight.dtype
    return sum(8 * each.nbytes for each in packed_tensors("", shape, dtype, packing))


def described(
    config: dict[str, Any], plain: nn.Module, packings: Mapping[str, Packing | None], bits: int | None
) -> dict[str, Any]:
    """The config of the model with these layers made again; one that is packed otherwise than before is named in it."""
    names = ("quantization", "quantization_config")
    packed = any(isinstance(each, precision.QUANTIZED) for each in plain.modules())
    if not any(packings.values()) and not packed:
        return config
    layers = dict(plain.named_modules())
    values: dict[str, Any] = dict(config.get("quantization") or {})
    if not packed:
        assert bits is not None
        values = dict(Packing(bits, 64, "affine").described)
    for name, packing in packings.items():
        before = packing_of(layers[name]) if packed else Packing(bits or 0, 64, "affine")
        if packing is not None and packing != before:
            values[name] = packing.described
    return {**config, **dict.fromkeys(names, values)}
