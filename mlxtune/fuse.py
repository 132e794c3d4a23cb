"""Fuses an adapter into its base and measures what was kept. Knows folders and samples, not files of data."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlxtune import adapter, likelihood, model, precision
from mlxtune.data.render import Sample
from mlxtune.errors import FuseError, InputError
from mlxtune.quant import rtn
from mlxtune.recipe import FuseRecipe, QuantizeRecipe, check_quantization
from mlxtune.rundir import refuse_existing, size_of, staged, write_json
from mlxtune.tokenizer import write_template


@dataclass(frozen=True, slots=True, kw_only=True)
class Fused:
    """What fusing did to `layers` layers, or tensors of a full tuning; `kept` is the share of the adapter's gain.

    Losses in nats per supervised token on `rows` rows. The losses and `kept` are None where there were no rows; `kept`
    is None too where the adapter gained nothing.
    """

    path: str
    layers: int
    bits: int | None
    bytes: int
    rows: int
    base_loss: float | None
    adapter_loss: float | None
    fused_loss: float | None
    kept: float | None


def fuse(base: Path, adapter_path: Path, out: Path, settings: FuseRecipe, samples: Sequence[Sample] = ()) -> Fused:
    """Writes base + adapter as one model to `out`, in the base's own precision unless `settings` says otherwise.

    Raises FuseError, and writes nothing, when less than `settings.keep` of the adapter's gain on `samples` survives.
    """
    refuse_existing(out, "--save-path")
    if settings.bits is not None:
        check_quantization(settings.bits, 64, "affine", "fuse")
    for inside in (base, adapter_path):
        if inside.resolve() in (out.resolve(), *out.resolve().parents):
            raise InputError("lies inside its own input", where=out, hint="choose a folder outside it")
    chat_template = adapter.check(adapter_path).get("chat_template")
    base_loss, adapter_loss = _losses_before(base, adapter_path, samples)
    lm = model.load(base, stored=True)
    adapter.load(lm, adapter_path)
    layers = len(adapter.adapted_layers(lm.net)) or len(adapter.tensor_names(adapter_path))
    config = fuse_layers(lm.net, lm.config, settings)
    with staged(out) as scratch:
        model.save(scratch, lm.net, config, base)
        if chat_template is not None:
            write_template(scratch, chat_template, lm.tokenizer.eos_token_ids)
        fused_loss = likelihood.mean_nats(model.load(scratch).net, samples) if samples else None
        result = Fused(
            path=str(out),
            layers=layers,
            bits=_bits(config, settings),
            bytes=sum(size_of(file) for file in model.weight_files(scratch)),
            rows=len(samples),
            base_loss=base_loss,
            adapter_loss=adapter_loss,
            fused_loss=fused_loss,
            kept=kept_share(base_loss, adapter_loss, fused_loss),
        )
        if result.kept is not None and result.kept < settings.keep:
            raise FuseError(
                f"fusing would keep {max(0.0, result.kept):.0%} of what the adapter learned, less than "
                f"{settings.keep:.0%} (loss of base {base_loss:.4f}, adapter {adapter_loss:.4f}, "
                f"fused {fused_loss:.4f}); nothing was written",
                where=out,
                hint=ways_out(result.bits),
            )
        write_json(scratch / "fuse.json", asdict(result))
    return result


def ways_out(bits: int | None) -> str:
    """What would keep more of the adapter."""
    return "use --dequantize" if bits is None or bits >= 8 else "use --q-bits 8 or --dequantize"


def kept_share(base: float | None, adapter: float | None, fused: float | None) -> float | None:
    """(base - fused) / (base - adapter): the share of the adapter's gain in loss that the fused model has."""
    if base is None or adapter is None or fused is None or adapter >= base:
        return None
    return (base - fused) / (base - adapter)


def _losses_before(base: Path, adapter_path: Path, samples: Sequence[Sample]) -> tuple[float | None, float | None]:
    if not samples:
        return None, None
    lm = model.load(base)
    base_loss = likelihood.mean_nats(lm.net, samples)
    adapter.load(lm, adapter_path)
    return base_loss, likelihood.mean_nats(lm.net, samples)


def fuse_layers(net: nn.Module, config: dict[str, Any], settings: FuseRecipe) -> dict[str, Any]:
    """Replaces each adapted layer of `net` by one of its fused weight, computed in float32; returns the config for it.

    A layer that was quantized is packed again, with `settings.bits` where they are given; others keep their bytes.
    """
    described = dict(config.get("quantization") or {})
    fused = []
    for name, layer in adapter.adapted_layers(net):
        stored = layer.linear
        packed = isinstance(stored, precision.QUANTIZED)
        dtype = precision.dense_dtype(stored) if packed else stored.weight.dtype
        made = precision.dense(stored, mx.float32) if packed else stored
        made.weight = adapter.fused_weight(layer, made.weight).astype(dtype)  # float32, as the update is
        if packed and not settings.dequantize:
            packing = _packing(stored, made.weight.shape[-1], settings.bits)
            if packing["bits"] != stored.bits:
                described[name] = packing
            made = made.to_quantized(**packing)
        fused.append((name, made))
    net.update_modules(tree_unflatten(fused))
    if settings.dequantize:
        precision.dequantize(net)
        return {key: value for key, value in config.items() if key not in ("quantization", "quantization_config")}
    if described:
        return {**config, "quantization": described, "quantization_config": described}
    if settings.bits is not None:
        config, _ = rtn.quantize(net, config, QuantizeRecipe(bits=settings.bits))
    return config


def _packing(layer: nn.Module, inputs: int, bits: int | None) -> dict[str, Any]:
    """How a fused layer is packed: as it was, or in `bits`, which the affine format has for every number of bits."""
    if bits is None or bits == layer.bits:
        return {"group_size": layer.group_size, "bits": layer.bits, "mode": layer.mode}
    groups = [layer.group_size] if layer.mode == "affine" else [size for size in (64, 32) if inputs % size == 0]
    if not groups:
        raise FuseError(f"{inputs} inputs of a layer divide by no group of {bits}-bit weights", hint="use --dequantize")
    return {"group_size": groups[0], "bits": bits, "mode": "affine"}


def _bits(config: dict[str, Any], settings: FuseRecipe) -> int | None:
    packing = config.get("quantization")
    return (settings.bits or int(packing["bits"])) if packing else None
