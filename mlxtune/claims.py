"""What a config says of how its tensors are quantized: checked against them, and refused by name where it is unknown.

Knows the formats of MLX and of other tools, and which of them mlx-lm reads rightly; reads no weights.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxtune import architecture, fp8
from mlxtune.errors import ModelError
from mlxtune.headers import Tensor
from mlxtune.precision import QUANTIZED

Tensors = Mapping[str, Tensor]
Packing = tuple[int, int, str]  # bits, group_size, mode

# mode: its bits, its groups
MODES = {
    "affine": ((1, 2, 3, 4, 5, 6, 8), (32, 64, 128)),
    "mxfp4": ((4,), (32,)),
    "nvfp4": ((4,), (16,)),
    "mxfp8": ((8,), (32,)),
}
FLOATS = ("F16", "BF16", "F32")
UNREADABLE = ("F4", "F6_E2M3", "F6_E3M2", "F64", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")  # by MLX
# formats that mlx-lm reads for the architectures that are published in them, by the quant_method of their config
BORROWED = {"mxfp4", "mxfp8", "bitnet", "modelopt"}
PACKED_BY_SANITIZE = ("deepseek_v3",)  # architectures whose networks read compressed-tensors' integers
PLAIN = (nn.Linear, nn.Embedding, nn.RMSNorm, nn.LayerNorm)  # layers that compute in floats
ORIGINAL = "start from the original model, or from one that was quantized for MLX"
AGAIN = "download the model again"


def check(config: dict[str, Any], tensors: Tensors, path: Path) -> None:
    """Refuses claims that are malformed, or that the tensors contradict. Raises ModelError."""
    where = path / "config.json"
    for name, tensor in tensors.items():
        if tensor.dtype in UNREADABLE:
            raise ModelError(
                f"holds {ascii(name)} in {tensor.dtype}, which MLX does not read",
                where=path,
                hint="save the model in bfloat16 or float32",
            )
    source = source_claim(config)
    if config.get("quantization") is not None:
        _check_packed(config["quantization"], tensors, path)
    elif source is not None:
        _check_source(source, config, tensors, path)
    elif packed := next((each for each in _layers(tensors) if tensors[f"{each}.weight"].dtype == "U32"), None):
        raise ModelError(f"says nothing of the quantization of {ascii(packed)}", where=where, hint=AGAIN)
    if config.get("quantization") is not None or not _is_fp8(source):
        _refuse_fp8(tensors, source, path)


def source_claim(config: dict[str, Any]) -> Any:
    """What a config says of the quantization by another tool, or None. It may lie with the settings of the text."""
    text = config.get("text_config")
    own = config.get("quantization_config")
    return own if own is not None or not isinstance(text, dict) else text.get("quantization_config")


def stored_in_fp8(config: dict[str, Any], tensors: Tensors) -> fp8.Stored | None:
    """What of a checked folder's tensors is to be made dense when it is loaded, or None."""
    source = source_claim(config)
    if config.get("quantization") is not None or not _is_fp8(source):
        return None
    dtype = architecture.stored_dtype(config) or "bfloat16"
    return fp8.Stored(
        names=frozenset(name for name, tensor in tensors.items() if tensor.dtype == fp8.DTYPE),
        block=_block(source),
        dtype={"float16": mx.float16, "float32": mx.float32}.get(dtype, mx.bfloat16),
    )


def without_claim(config: dict[str, Any]) -> dict[str, Any]:
    """A config whose tensors are not quantized (any more)."""
    made = {name: value for name, value in config.items() if name != "quantization_config"}
    if isinstance(made.get("text_config"), dict):
        made["text_config"] = {
            name: value for name, value in made["text_config"].items() if name != "quantization_config"
        }
    return made


def check_loaded(net: nn.Module, config: dict[str, Any], path: Path) -> None:
    """Refuses a network whose layers are quantized otherwise than the config says, or hold whole numbers as weights.

    mlx-lm finds out from the shapes how a layer is quantized where the config does not name it. Raises ModelError.
    """
    claims = config.get("quantization")
    for name, layer in net.named_modules():
        if isinstance(layer, QUANTIZED) and isinstance(claims, dict):
            found = (layer.bits, layer.group_size, layer.mode)
            if found not in (choices := _choices(name, claims)):
                raise ModelError(
                    f"says {_words_of(choices)} of {name}, whose tensors have {_words(found)}",
                    where=path / "config.json",
                    hint=AGAIN,
                )
        elif isinstance(layer, PLAIN):
            for part, value in layer.items():
                if isinstance(value, mx.array) and not mx.issubdtype(value.dtype, mx.floating):
                    dtype = str(value.dtype).removeprefix("mlx.core.")
                    raise ModelError(f"holds whole numbers ({dtype}) as {part} of {name}", where=path, hint=ORIGINAL)


def _layers(tensors: Tensors) -> list[str]:
    """Layers with a weight and scales as MLX names them."""
    return [
        name.removesuffix(".scales")
        for name in tensors
        if name.endswith(".scales") and f"{name.removesuffix('.scales')}.weight" in tensors
    ]


def _check_packed(claims: Any, tensors: Tensors, path: Path) -> None:
    """MLX's own claim: {"bits", "group_size", "mode", and for each layer that differs, the same or false}."""
    where = path / "config.json"
    if not isinstance(claims, dict):
        raise ModelError("has a quantization that is no group of settings", where=where, hint=AGAIN)
    parts = {name: value for name, value in claims.items() if isinstance(value, dict)}
    for name, claim in ("quantization", claims), *parts.items():
        _check_packing(name, _packing(claim), where)
    layers = _layers(tensors)
    if not layers:
        raise ModelError("claims to be quantized, but no tensor is", where=where, hint=AGAIN)
    for layer in layers:
        _check_layer(layer, tensors, _choices(layer, claims), path)


def _check_packing(name: str, packing: tuple[Any, Any, Any], where: Path) -> None:
    bits, group, mode = packing
    if not isinstance(mode, str) or mode not in MODES:
        raise ModelError(f"has the unknown mode {_short(mode)} in {_short(name)}", where=where, hint=AGAIN)
    for what, value, known in ("bits", bits, MODES[mode][0]), ("group_size", group, MODES[mode][1]):
        if type(value) is not int or value not in known:
            raise ModelError(
                f"has {what} = {_short(value)} in {_short(name)}; {mode} has {', '.join(map(str, known))}",
                where=where,
                hint=AGAIN,
            )


def _packing(claim: dict[str, Any]) -> Packing:
    """(bits, group_size, mode). mlx-lm reads a layer's own claim alone, in which the mode may be missing."""
    return claim.get("bits"), claim.get("group_size"), claim.get("mode", "affine")  # type: ignore[return-value]


def _choices(layer: str, claims: dict[str, Any]) -> set[Packing]:
    """What a layer may be: what it is said to be, else what any is, as some tools name the layers otherwise."""
    own = claims.get(layer)
    if isinstance(own, dict):
        return {_packing(own)}
    return {_packing(claims), *(_packing(each) for each in claims.values() if isinstance(each, dict))}


def _check_layer(layer: str, tensors: Tensors, choices: set[Packing], path: Path) -> None:
    """The tensors of a layer of I inputs: weight (..., O, I · bits / 32) in U32, scales and biases (..., O, I / group).

    Affine layers have scales in floats, and biases; the others have scales in bytes.
    """
    weight, scales = tensors[f"{layer}.weight"], tensors[f"{layer}.scales"]
    biases = tensors.get(f"{layer}.biases")

    def fits(bits: int, group: int, mode: str) -> bool:
        if mode != "affine":
            return scales.dtype == "U8" and biases is None and 32 * weight.shape[-1] == bits * group * scales.shape[-1]
        kinds = scales.dtype in FLOATS and biases is not None and biases.shape == scales.shape
        return kinds and biases.dtype in FLOATS and 32 * weight.shape[-1] == bits * group * scales.shape[-1]  # type: ignore[union-attr]

    whole = len(weight.shape) >= 2 and weight.dtype == "U32" and weight.shape[:-1] == scales.shape[:-1]
    if not whole or not any(fits(*choice) for choice in sorted(choices)):
        parts = {"weight": weight, "scales": scales, "biases": biases}
        shown = ", ".join(
            f"{name} {each.dtype} {_short(list(each.shape))}" for name, each in parts.items() if each is not None
        )
        raise ModelError(
            f"says {_words_of(choices)} of {ascii(layer)}, whose tensors are {shown}",
            where=path / "config.json",
            hint=AGAIN,
        )


def _check_source(source: Any, config: dict[str, Any], tensors: Tensors, path: Path) -> None:
    """A claim of another tool: let through where mlx-lm reads it rightly, or `fp8` does."""
    where = path / "config.json"
    method = source.get("quant_method") if isinstance(source, dict) else None
    if not isinstance(method, str):
        raise ModelError("has a quantization_config that names no quant_method", where=where, hint=AGAIN)
    if _is_fp8(source):
        _check_fp8(source, tensors, path)
    elif method == "awq":
        _check_awq(source, tensors, path)
    elif method == "compressed-tensors":
        _check_compressed(source, config, path)
    elif method not in BORROWED:
        raise ModelError(f"is quantized by {_short(method)}, which is not supported", where=path, hint=ORIGINAL)


def _is_fp8(source: Any) -> bool:
    """8-bit floats that `fp8` makes dense. Scales that are powers of two (ue8m0) are left to mlx-lm, which keeps them.

    Neuralmagic's `float-quantized` is the same, in compressed-tensors' container.
    """
    if not isinstance(source, dict):
        return False
    method, form = source.get("quant_method"), source.get("format")
    return (method == "fp8" and not _is_mx(source)) or (method == "compressed-tensors" and form == "float-quantized")


def _is_mx(source: dict[str, Any]) -> bool:
    return source.get("scale_fmt") == "ue8m0" and source.get("weight_block_size") == [32, 32]


def _block(source: dict[str, Any]) -> tuple[int, int] | None:
    """Rows and columns of a block that shares a scale, where a claim has them."""
    block = source.get("weight_block_size")
    groups = source.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        if isinstance(weights, dict) and weights.get("block_structure"):
            block = weights["block_structure"]
    if isinstance(block, list) and len(block) == 2 and all(type(each) is int and each > 0 for each in block):
        return block[0], block[1]
    return None


def _check_fp8(source: dict[str, Any], tensors: Tensors, path: Path) -> None:
    found = False
    for name, tensor in tensors.items():
        if tensor.dtype != fp8.DTYPE:
            continue
        found, own = True, fp8.scale_name(name, tensors)
        if own is None or tensors[own].dtype not in FLOATS:
            raise ModelError(f"holds {ascii(name)} in 8-bit floats without scales", where=path, hint=AGAIN)
        if not fp8.fits(tensor.shape, tensors[own].shape, _block(source)):
            raise ModelError(
                f"holds {ascii(name)} of shape {list(tensor.shape)} with scales of shape {list(tensors[own].shape)}",
                where=path,
                hint=AGAIN,
            )
    if not found:
        raise ModelError("claims 8-bit floats, but no tensor is of them", where=path / "config.json", hint=AGAIN)


def _refuse_fp8(tensors: Tensors, source: Any, path: Path) -> None:
    """MLX would take 8-bit floats for whole numbers."""
    if isinstance(source, dict) and (source.get("quant_method") in BORROWED or _is_mx(source)):
        return
    for name, tensor in tensors.items():
        if tensor.dtype in (fp8.DTYPE, "F8_E8M0"):
            raise ModelError(
                f"holds {ascii(name)} in {tensor.dtype}, of which its config says nothing", where=path, hint=ORIGINAL
            )


def _check_awq(source: dict[str, Any], tensors: Tensors, path: Path) -> None:
    """AutoAWQ's GEMM layout of a layer with I inputs and O outputs; mlx-lm repacks it as affine, 4 bits.

    qweight (I, O / 8) and qzeros (I / group, O / 8) in I32, scales (I / group, O) in floats.
    """
    where = path / "config.json"
    bits, group = source.get("bits", source.get("w_bit", 4)), source.get("group_size", source.get("q_group_size", 128))
    version = source.get("version", "gemm")
    if bits != 4 or group not in (32, 64, 128) or not isinstance(version, str) or version.lower() != "gemm":
        raise ModelError(
            f"is quantized by AWQ with bits = {_short(bits)}, group_size = {_short(group)}, version = "
            f"{_short(version)}; supported are 4, groups of 32, 64 or 128, and gemm",
            where=where,
            hint=ORIGINAL,
        )
    layers = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
    if not layers:
        raise ModelError("claims to be quantized by AWQ, but no tensor is", where=where, hint=AGAIN)
    for layer in layers:
        weight, scales = tensors[f"{layer}.qweight"], tensors.get(f"{layer}.scales")
        zeros = tensors.get(f"{layer}.qzeros")
        inputs, packed = weight.shape if len(weight.shape) == 2 else (0, 0)
        if not (
            weight.dtype == "I32"
            and inputs % group == 0 < inputs
            and scales is not None
            and scales.dtype in FLOATS
            and scales.shape == (inputs // group, 8 * packed)
            and (zeros is None or (zeros.dtype == "I32" and zeros.shape == (inputs // group, packed)))
        ):
            raise ModelError(
                f"is quantized by AWQ, but the tensors of {ascii(layer)} do not fit groups of {group}",
                where=where,
                hint=AGAIN,
            )


def _check_compressed(source: dict[str, Any], config: dict[str, Any], path: Path) -> None:
    """Whole numbers of compressed-tensors, which mlx-lm reads for few architectures: 4 bits, symmetric, in groups."""
    form, kind = source.get("format"), architecture.kind(config)
    groups = source.get("config_groups")
    weights = (
        [each.get("weights") for each in groups.values() if isinstance(each, dict)] if isinstance(groups, dict) else []
    )
    known = bool(weights) and all(
        isinstance(each, dict)
        and each.get("num_bits") == 4
        and each.get("type") == "int"
        and each.get("symmetric") is True
        and each.get("strategy") == "group"
        and not each.get("actorder")
        for each in weights
    )
    if form != "pack-quantized" or kind not in PACKED_BY_SANITIZE or not known:
        raise ModelError(
            f"is quantized by compressed-tensors ({_short(form)}), which is not supported for {config['model_type']!r}",
            where=path,
            hint=ORIGINAL,
        )


def _words_of(packings: set[Packing]) -> str:
    return " or ".join(_words(each) for each in sorted(packings)[:3])


def _words(packing: Packing) -> str:
    bits, group, mode = packing
    return f"{bits} bits in groups of {group}" + ("" if mode == "affine" else f" ({mode})")


def _short(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
