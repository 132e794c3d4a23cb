"""LoRA adapters: attach them to a network, save them, load them. The layers are mlx-lm's, so plain mlx-lm reads them.

Knows networks and adapter folders, not data or training.
"""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from safetensors import SafetensorError, safe_open

from mlxtune.borrow import (
    LoRALinear,
    LoRASwitchLinear,
    QuantizedSwitchLinear,
    SwitchLinear,
    linear_to_lora_layers,
)
from mlxtune.errors import ModelError, RecipeError
from mlxtune.model import LanguageModel
from mlxtune.recipe import LoraRecipe
from mlxtune.rundir import read_json
from mlxtune.tokenizer import use_template

WEIGHTS, CONFIG = "adapters.safetensors", "adapter_config.json"
LAYERS = (nn.Linear, nn.QuantizedLinear, SwitchLinear, QuantizedSwitchLinear)
FACTORS = ("lora_a", "lora_b")


def attach(net: nn.Module, lora: LoraRecipe, seed: int) -> list[str]:
    """Freezes `net` and adds LoRA factors: A uniform in ±1/sqrt(inputs) from `seed`, B zero, so nothing changes yet.

    Returns the names of the layers, relative to a block. Raises RecipeError as `targets` does.
    """
    chosen = targets(net, lora)
    net.freeze()
    mx.random.seed(seed)
    linear_to_lora_layers(net, _block_count(net, lora), _parameters(lora, chosen))
    return chosen


def targets(net: nn.Module, lora: LoraRecipe) -> list[str]:
    """The layers of a block that `lora` names. Raises RecipeError when a target matches none, or blocks are missing."""
    _block_count(net, lora)
    names = _layers(net)
    chosen: set[str] = set()
    for target in lora.targets:
        found = {name for name in names if _matches(name, target)}
        if not found:
            known = ["all-linear", "attention", "mlp", *sorted({name.rsplit(".", 1)[-1] for name in names})]
            raise RecipeError(
                f"{target!r} matches no layer", where="lora.targets", hint=f"choose from {', '.join(known)}"
            )
        chosen |= found
    return sorted(chosen)


def _block_count(net: nn.Module, lora: LoraRecipe) -> int:
    blocks = len(net.layers)
    if lora.num_layers > blocks:
        raise RecipeError(
            f"is {lora.num_layers}, but the model has {blocks} blocks", where="lora.num_layers", hint="-1 means all"
        )
    return blocks if lora.num_layers == -1 else lora.num_layers


def _layers(net: nn.Module) -> list[str]:
    """Names of all linear layers inside the blocks, relative to a block."""
    return sorted(
        {name for block in net.layers for name, module in block.named_modules() if isinstance(module, LAYERS)}
    )


def _matches(name: str, target: str) -> bool:
    if target == "all-linear":
        return True
    if target in ("attention", "mlp"):
        return (".attn" in f".{name}" or "attention" in name or "attn." in name) == (target == "attention")
    return name == target or name.rsplit(".", 1)[-1] == target


def _parameters(lora: LoraRecipe, keys: list[str]) -> dict[str, Any]:
    return {"rank": lora.rank, "scale": lora.scale, "dropout": lora.dropout, "keys": keys}


def config(
    net: nn.Module, lora: LoraRecipe, keys: list[str], base: str, chat_template: str | None = None
) -> dict[str, Any]:
    """The adapter_config.json that mlx-lm reads.

    `base` names the model that the adapter belongs to; `chat_template` is kept where it is not the tokenizer's own.
    """
    return {
        "fine_tune_type": "lora",
        "num_layers": _block_count(net, lora),
        "lora_parameters": _parameters(lora, keys),
        "model": base,
        **({"chat_template": chat_template} if chat_template is not None else {}),
    }


def factors(net: nn.Module) -> dict[str, mx.array]:
    """The adapter's tensors by name."""
    return {name: value for name, value in tree_flatten(net.trainable_parameters()) if name.endswith(FACTORS)}


def save(folder: Path, tensors: dict[str, mx.array], config: dict[str, Any]) -> None:
    """Writes an adapter into the empty `folder`: use it inside `rundir.staged`."""
    mx.save_safetensors(str(folder / WEIGHTS), tensors, metadata={"format": "mlx"})
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def check(folder: Path) -> dict[str, Any]:
    """The config of an adapter folder whose files are there and well-formed. Raises ModelError."""
    if not folder.is_dir():
        raise ModelError("is not an adapter folder", where=folder, hint="give the folder with adapters.safetensors")
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise ModelError(f"has no {name}", where=folder, hint="give the folder that `mlxtune train` wrote")
    value: dict[str, Any] = read_json(folder / CONFIG)
    kind = value.get("fine_tune_type", "lora") if isinstance(value, dict) else None
    if kind != "lora":
        raise ModelError(f"is an adapter of the kind {kind!r}", where=folder / CONFIG, hint="only lora is supported")
    parameters = value.get("lora_parameters")
    if not isinstance(parameters, dict) or not {"rank", "scale"} <= parameters.keys() or "num_layers" not in value:
        raise ModelError("lacks num_layers or lora_parameters", where=folder / CONFIG)
    keys = parameters.get("keys")
    if not (
        type(parameters["rank"]) is int
        and parameters["rank"] > 0
        and type(parameters["scale"]) in (int, float)
        and type(value["num_layers"]) is int
        and (keys is None or (isinstance(keys, list) and all(isinstance(key, str) for key in keys)))
        and isinstance(value.get("chat_template"), str | None)
    ):
        raise ModelError(
            "has a rank, scale, num_layers, keys or chat_template of the wrong type", where=folder / CONFIG
        )
    try:
        with safe_open(str(folder / WEIGHTS), framework="numpy"):
            pass
    except (SafetensorError, OSError) as error:
        raise ModelError(f"is no whole safetensors file: {error}", where=folder / WEIGHTS) from None
    return value


def read_tensors(file: Path) -> dict[str, mx.array]:
    """The tensors of a checked safetensors file."""
    tensors = mx.load(str(file))
    assert isinstance(tensors, dict)
    return tensors


def load(lm: LanguageModel, folder: Path) -> None:
    """Attaches the adapter in `folder` to `lm.net`. Raises ModelError if it does not fit the model or holds NaN."""
    value = check(folder)
    parameters = value["lora_parameters"] | {"dropout": 0.0}  # of use in training only
    tensors = read_tensors(folder / WEIGHTS)
    try:
        linear_to_lora_layers(lm.net, value["num_layers"], parameters)
    except ValueError as error:
        raise ModelError(f"does not fit {lm.path}: {error}", where=folder) from None
    expected = {name: weight for name, weight in tree_flatten(lm.net.parameters()) if name.endswith(FACTORS)}
    if not expected or len(expected) != 2 * len(adapted_layers(lm.net)):
        raise ModelError(f"adapts no linear layer of {lm.path}, or other layers as well", where=folder)
    if missing := sorted(expected.keys() ^ tensors.keys()):
        raise ModelError(
            f"does not fit {lm.path}: {len(missing)} tensors differ, such as {missing[0]}",
            where=folder,
            hint="give the base model that the adapter was trained on",
        )
    for name, tensor in sorted(tensors.items()):
        if tensor.shape != expected[name].shape:
            raise ModelError(
                f"does not fit {lm.path}: {name} is {tensor.shape}, not {expected[name].shape}",
                where=folder,
                hint="give the base model that the adapter was trained on",
            )
        if not mx.all(mx.isfinite(tensor)).item():
            raise ModelError(f"holds NaN or infinite values in {name}", where=folder, hint="train it again")
    lm.net.load_weights(list(tensors.items()), strict=False)
    lm.net.eval()
    use_template(lm.tokenizer, value.get("chat_template"))
    mx.eval(lm.net.parameters())


def update(layer: nn.Module) -> mx.array:
    """What the adapter adds to its layer's weight: scale·(A·B)ᵀ in float32, (outputs, inputs), experts first."""
    a, b = layer.lora_a.astype(mx.float32), layer.lora_b.astype(mx.float32)
    if isinstance(layer, LoRASwitchLinear):  # here B is (experts, outputs, rank), and A is transposed
        experts: mx.array = layer.scale * (b @ a.reshape(b.shape[0], -1, a.shape[-1]))
        return experts
    one: mx.array = layer.scale * (a @ b).T
    return one


def adapted_layers(net: nn.Module) -> list[tuple[str, nn.Module]]:
    """All layers of `net` that carry an adapter, by name."""
    return [(name, each) for name, each in net.named_modules() if isinstance(each, LoRALinear | LoRASwitchLinear)]
