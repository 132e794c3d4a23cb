"""What training changes: LoRA and DoRA adapters, or all weights. Attached, saved, loaded; plain mlx-lm reads them.

Knows networks and adapter folders, not data or training.
"""

import json
import math
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlxtune import headers
from mlxtune.borrow import (
    DoRALinear,
    LoRALinear,
    LoRASwitchLinear,
    QuantizedSwitchLinear,
    SwitchLinear,
    linear_to_lora_layers,
)
from mlxtune.errors import ModelError, RecipeError
from mlxtune.lora import use_own
from mlxtune.model import LanguageModel, fingerprint
from mlxtune.recipe import LoraRecipe
from mlxtune.rundir import read_json
from mlxtune.tokenizer import use_template

WEIGHTS, CONFIG = "adapters.safetensors", "adapter_config.json"
LAYERS = (nn.Linear, nn.QuantizedLinear, SwitchLinear, QuantizedSwitchLinear)
ADAPTED = (LoRALinear, LoRASwitchLinear, DoRALinear)
FACTORS = ("lora_a", "lora_b", "m")  # m: the magnitudes of DoRA
KINDS = ("lora", "dora", "full")


def attach(lm: LanguageModel, lora: LoraRecipe, seed: int) -> list[str]:
    """Freezes the network of `lm` and adds what is trained; nothing that it computes changes yet.

    LoRA factors (Hu et al. 2021, https://arxiv.org/abs/2106.09685): A uniform in ±1/sqrt(inputs) from `seed`, B zero.
    DoRA (Liu et al. 2024, https://arxiv.org/abs/2402.09353) adds the norms of the weight's rows. `full` adds nothing:
    the last `num_layers` blocks, or all weights, are trained themselves. Returns the names of the adapted layers,
    relative to a block. Raises RecipeError as `check_fits` does.
    """
    net = lm.net
    chosen = check_fits(lm, lora)
    net.freeze()
    mx.random.seed(seed)
    if lora.method == "full":
        for each in [net] if lora.num_layers == -1 else net.layers[-lora.num_layers :]:
            each.unfreeze()
    else:
        _add(net, _block_count(net, lora), _parameters(lora, chosen), dora=lora.method == "dora")
    return chosen


def check_fits(lm: LanguageModel, lora: LoraRecipe) -> list[str]:
    """The layers of a block that `lora` adapts; none for full tuning.

    Raises RecipeError when a target matches none, blocks are missing, or the method cannot train such layers.
    """
    if lora.method == "full":
        _block_count(lm.net, lora)
        if "quantization" in lm.config:
            raise RecipeError(
                f"full tuning cannot change the quantized weights of {lm.path}",
                where="lora.method",
                hint="use lora or dora, or start from the original model",
            )
        return []
    chosen = targets(lm.net, lora)
    if lora.method == "dora":
        experts = {
            name
            for block in lm.net.layers
            for name, module in block.named_modules()
            if name in chosen and isinstance(module, SwitchLinear | QuantizedSwitchLinear)
        }
        if experts:
            raise RecipeError(
                f"dora has no form for layers of experts, such as {min(experts)}",
                where="lora.method",
                hint="use lora, or name other lora.targets such as attention",
            )
    return chosen


def _add(net: nn.Module, blocks: int, parameters: dict[str, Any], *, dora: bool) -> None:
    """Adds adapters to the last `blocks` blocks. Raises ValueError for a layer that cannot carry one."""
    if not dora:
        linear_to_lora_layers(net, blocks, parameters)
        use_own(net)
        return
    for block in net.layers[-max(blocks, 0) :]:
        made = [
            (name, _dora(module, parameters))
            for name, module in block.named_modules()
            if parameters.get("keys") is None or name in parameters["keys"]
            if isinstance(module, nn.Linear | nn.QuantizedLinear)
        ]
        block.update_modules(tree_unflatten(made))


def _dora(layer: nn.Module, parameters: dict[str, Any]) -> nn.Module:
    """A DoRA layer on `layer`. mlx-lm's own way to make one gets the inputs of 3, 5 and 6-bit layers wrong."""
    outputs, inputs = layer.weight.shape
    if isinstance(layer, nn.QuantizedLinear):
        inputs = inputs * 32 // layer.bits
    made = DoRALinear(inputs, outputs, parameters["rank"], parameters["dropout"], parameters["scale"])
    made.set_linear(layer)
    return made


def targets(net: nn.Module, lora: LoraRecipe) -> list[str]:
    """The layers of a block that `lora` names. Raises RecipeError when a target matches none, or blocks are missing."""
    _block_count(net, lora)
    names = _layers(net)
    chosen: set[str] = set()
    for target in lora.targets:
        found = {name for name in names if matches(name, target)}
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


def matches(name: str, target: str) -> bool:
    """Whether a layer, named relative to its block, is among what `target` of `lora.targets` names."""
    if target == "all-linear":
        return True
    if target in ("attention", "mlp"):
        return (".attn" in f".{name}" or "attention" in name or "attn." in name) == (target == "attention")
    return fnmatchcase(name, target) or fnmatchcase(name.rsplit(".", 1)[-1], target)


def _parameters(lora: LoraRecipe, keys: list[str]) -> dict[str, Any]:
    # rsLoRA (Kalajdzievski 2023, https://arxiv.org/abs/2312.03732): alpha / sqrt(rank) in place of alpha / rank
    scale = lora.scale * math.sqrt(lora.rank) if lora.rslora else lora.scale
    return {"rank": lora.rank, "scale": scale, "dropout": lora.dropout, "keys": keys}


def config(lm: LanguageModel, lora: LoraRecipe, keys: list[str], chat_template: str | None = None) -> dict[str, Any]:
    """The adapter_config.json that mlx-lm reads, with the fingerprint of the base that the adapter belongs to.

    `chat_template` is kept where it is not the tokenizer's own.
    """
    return {
        "fine_tune_type": lora.method,
        "num_layers": _block_count(lm.net, lora),
        "lora_parameters": _parameters(lora, keys),
        "model": str(lm.path),
        "base_fingerprint": fingerprint(lm.path),
        **({"chat_template": chat_template} if chat_template is not None else {}),
    }


def trained(net: nn.Module) -> dict[str, mx.array]:
    """The tensors by name that training changes: an adapter's, or the weights themselves."""
    return dict(tree_flatten(net.trainable_parameters()))


def save(folder: Path, tensors: dict[str, mx.array], config: dict[str, Any]) -> None:
    """Writes an adapter into the empty `folder`: use it inside `rundir.staged`. Equal tensors give equal bytes."""
    # MLX writes tensors in an order that follows from that of the dict
    mx.save_safetensors(str(folder / WEIGHTS), dict(sorted(tensors.items())), metadata={"format": "mlx"})
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
    if kind not in KINDS:
        hint = f"supported are {', '.join(KINDS)}"
        raise ModelError(f"is an adapter of the kind {kind!r}", where=folder / CONFIG, hint=hint)
    parameters = value.get("lora_parameters")
    if kind == "full" and parameters is None:  # mlx-lm's have none
        parameters = {"rank": 1, "scale": 1.0}
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
    headers.read(folder / WEIGHTS, "copy it again, or train again")
    return value


def tensor_names(folder: Path) -> list[str]:
    """The names of the tensors in an adapter folder."""
    return list(headers.read(folder / WEIGHTS))


def read_tensors(file: Path) -> dict[str, mx.array]:
    """The tensors of a checked safetensors file."""
    tensors = mx.load(str(file))
    assert isinstance(tensors, dict)
    return tensors


def load(lm: LanguageModel, folder: Path) -> None:
    """Attaches the adapter in `folder` to `lm.net`, or puts the weights of a full tuning into it.

    Raises ModelError if it does not fit the model, was trained on another one, or holds NaN.
    """
    value = check(folder)
    _refuse_other_base(lm, folder, value.get("base_fingerprint"))
    tensors = read_tensors(folder / WEIGHTS)
    kind = value.get("fine_tune_type", "lora")
    known = dict(tree_flatten(lm.net.parameters()))
    if kind == "full":
        expected = {name: known[name] for name in tensors if name in known}
        tensors = {name: each.astype(known[name].dtype) if name in known else each for name, each in tensors.items()}
    else:
        parameters = value["lora_parameters"] | {"dropout": 0.0}  # of use in training only
        try:
            _add(lm.net, value["num_layers"], parameters, dora=kind == "dora")
        except ValueError as error:
            raise ModelError(f"does not fit {lm.path}: {error}", where=folder) from None
        layers = adapted_layers(lm.net)
        expected = {f"{name}.{each}": layer[each] for name, layer in layers for each in FACTORS if each in layer}
        others = dict(tree_flatten(lm.net.parameters())).keys() - known.keys() - expected.keys()
        if not expected or any(name.endswith(FACTORS) for name in others):
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
    mx.eval(list(tensors.values()))  # and nothing else: of a network that is not read yet, no weight is


def _refuse_other_base(lm: LanguageModel, folder: Path, wanted: Any) -> None:
    if wanted is not None and wanted != fingerprint(lm.path):
        raise ModelError(
            f"was trained on another base than {lm.path}",
            where=folder,
            hint="give that base; or, to use it all the same, remove base_fingerprint from its adapter_config.json",
        )


def fused_weight(layer: nn.Module, weight: mx.array) -> mx.array:
    """The weight (outputs, inputs) of an adapted layer, experts first, from its base's float32 `weight`.

    LoRA: W + scale·(A·B)ᵀ. DoRA: the same with each row scaled to its magnitude, m / ‖row‖.
    """
    added = weight + update(layer)
    if isinstance(layer, DoRALinear):
        norms = mx.linalg.norm(added, axis=-1)
        added = (layer.m.astype(mx.float32) / norms)[:, None] * added
    return added


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
    return [(name, each) for name, each in net.named_modules() if isinstance(each, ADAPTED)]
