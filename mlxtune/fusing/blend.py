"""Adapters at other strengths than their own, or several at once, on one base. Knows folders, not fusing.

An adapter of strength w adds w·ΔW to a layer where it would add ΔW; several add the sum of theirs. For LoRA that sum
is again LoRA, of the ranks' sum: with A = [A₁ A₂ …] and B = [w₁s₁B₁; w₂s₂B₂; …], A·B = w₁s₁A₁B₁ + w₂s₂A₂B₂ + ….
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlxtune import adapter, model
from mlxtune.borrow import LoRALinear, LoRASwitchLinear
from mlxtune.errors import InputError
from mlxtune.lora import use_own
from mlxtune.model import LanguageModel


@dataclass(frozen=True, slots=True)
class Part:
    """An adapter folder and its weight, a factor on what it adds."""

    path: Path
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class _Factors:
    """scale·(A·B)ᵀ of one layer of one adapter, its weight in the scale; shapes as mlx-lm's layers have them."""

    a: mx.array
    b: mx.array
    scale: float


def check(parts: Sequence[Part]) -> dict[str, Any]:
    """The config of the first adapter. Raises InputError for adapters that cannot be weighted or added, ModelError."""
    if not parts:
        raise InputError("names no adapter", where="--adapter-path")
    configs = [adapter.check(part.path) for part in parts]
    kinds = [config.get("fine_tune_type", "lora") for config in configs]
    if len({part.path.resolve() for part in parts}) < len(parts):
        raise InputError("is given twice", where=parts[-1].path, hint="give it once, with the sum of its weights")
    for part, kind in zip(parts, kinds, strict=True):
        if kind == "dora" and (len(parts) > 1 or part.weight != 1):
            raise InputError(
                "is a DoRA adapter, whose change is no sum that could be weighted",
                where=part.path,
                hint="fuse it alone and as it is",
            )
        if kind == "full" and len(parts) > 1:
            raise InputError("is a full tuning", where=part.path, hint="only LoRA adapters can be added to each other")
    if len({config.get("chat_template") for config in configs}) > 1:
        raise InputError(
            f"has another chat template than {parts[0].path}",
            where=next(
                part.path
                for part, config in zip(parts, configs, strict=True)
                if config.get("chat_template") != configs[0].get("chat_template")
            ),
            hint="adapters that are added must have learned the same one",
        )
    return configs[0]


def attach(lm: LanguageModel, parts: Sequence[Part]) -> None:
    """Attaches the weighted sum of the adapters to `lm.net`. Errors as those of `check` and `adapter.load`."""
    config = check(parts)
    if len(parts) > 1:
        _attach_sum(lm, parts)
        return
    (part,) = parts
    full = config.get("fine_tune_type") == "full" and part.weight != 1
    before = dict(tree_flatten(lm.net.parameters())) if full else {}
    adapter.load(lm, part.path)
    if full:
        between = [(name, _between(before[name], each, part.weight)) for name, each in _changed(lm.net, part)]
        lm.net.load_weights(between, strict=False)
    else:
        strengthen(lm.net, part.weight)


def strengthen(net: nn.Module, factor: float) -> None:
    """Multiplies what the LoRA layers of `net` add by `factor`."""
    if factor != 1:
        for _, layer in adapter.adapted_layers(net):
            layer.scale *= factor


def _changed(net: nn.Module, part: Part) -> list[tuple[str, mx.array]]:
    names = set(adapter.tensor_names(part.path))
    return [(name, each) for name, each in tree_flatten(net.parameters()) if name in names]


def _between(before: mx.array, after: mx.array, weight: float) -> mx.array:
    """W + weight·(W' - W), computed in float32."""
    start = before.astype(mx.float32)
    return (start + weight * (after.astype(mx.float32) - start)).astype(before.dtype)


def _attach_sum(lm: LanguageModel, parts: Sequence[Part]) -> None:
    found: dict[str, list[_Factors]] = {}
    for part in parts:
        net, config = model.outline(lm.path)
        adapter.load(LanguageModel(net=net, tokenizer=lm.tokenizer, config=config, path=lm.path), part.path)
        for name, layer in adapter.adapted_layers(net):
            found.setdefault(name, []).append(_Factors(layer.lora_a, layer.lora_b, part.weight * layer.scale))
    layers = dict(lm.net.named_modules())
    lm.net.update_modules(tree_unflatten([(name, _joined(layers[name], each)) for name, each in found.items()]))
    use_own(lm.net)
    lm.net.eval()


def _joined(layer: nn.Module, factors: Sequence[_Factors]) -> nn.Module:
    """One LoRA layer on `layer` whose update is the sum of those of `factors`."""
    a, b = [each.a.astype(mx.float32) for each in factors], [each.scale * each.b.astype(mx.float32) for each in factors]
    if b[0].ndim == 3:  # experts: A is (experts, rank, inputs), B (experts, outputs, rank)
        made = LoRASwitchLinear.from_base(layer, r=sum(each.shape[2] for each in b), scale=1.0)
        made.lora_a, made.lora_b = mx.concatenate(a, axis=1), mx.concatenate(b, axis=2)
    else:
        made = LoRALinear.from_base(layer, r=sum(each.shape[1] for each in a), scale=1.0)
        made.lora_a, made.lora_b = mx.concatenate(a, axis=1), mx.concatenate(b, axis=0)
    return made
