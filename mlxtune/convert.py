"""Converts a Hugging Face model folder to an MLX one, quantized or not. Knows folders, not the hub."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map_with_path

from mlxtune import model, precision
from mlxtune.errors import InputError, ModelError
from mlxtune.quant import rtn
from mlxtune.recipe import QuantizeRecipe
from mlxtune.rundir import refuse_existing, size_of, staged

METHODS = {"rtn": rtn.quantize}
DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


@dataclass(frozen=True, slots=True, kw_only=True)
class Converted:
    """What was written. Sizes in bytes; `left_out` names layers that could not be quantized, with the reason."""

    path: Path
    parameters: int
    dtype: str
    bits_per_weight: float
    bytes_before: int
    bytes_after: int
    quantized_layers: int
    left_out: dict[str, str]


def convert(source: Path, out: Path, *, quantize: QuantizeRecipe | None = None, dtype: str | None = None) -> Converted:
    """Reads the model in `source`, casts it to `dtype` where one is given, quantizes it, and writes `out`.

    Raises ModelError for a malformed or already quantized source, OutputError if `out` exists.
    """
    refuse_existing(out, "--mlx-path")
    _refuse_inside(source, out)
    if quantize is not None or dtype is not None:
        _refuse_quantized(source)
    lm = model.load(source, stored=True)
    net, config = lm.net, lm.config
    if dtype is not None:
        cast(net, DTYPES[dtype])
        config = {**config, "torch_dtype": dtype}
        config.pop("dtype", None)
    quantized_layers, left_out = 0, {}
    if quantize is not None:
        try:
            config, done = METHODS[quantize.method](net, config, quantize)
        except ModelError as error:
            raise ModelError(error.what, where=error.where or source, hint=error.hint) from None
        quantized_layers, left_out = done.layers, done.left_out
    parameters, bits = precision.parameter_count(net), rtn.bits_per_weight(net)
    with staged(out) as scratch:
        model.save(scratch, net, config, source)
    return Converted(
        path=out,
        parameters=parameters,
        dtype=str(config.get("torch_dtype") or config.get("dtype") or "as stored"),
        bits_per_weight=bits,
        bytes_before=sum(size_of(file) for file in model.weight_files(source)),
        bytes_after=sum(size_of(file) for file in model.weight_files(out)),
        quantized_layers=quantized_layers,
        left_out=left_out,
    )


def cast(net: nn.Module, dtype: mx.Dtype) -> None:
    """Casts the weights of `net`, but for those that its architecture needs as they are, such as a router's."""
    wanted: Callable[[str], bool] = getattr(net, "cast_predicate", lambda name: True)

    def one(name: str, weight: mx.array) -> mx.array:
        return weight.astype(dtype) if mx.issubdtype(weight.dtype, mx.floating) and wanted(name) else weight

    net.update(tree_map_with_path(one, net.parameters()))


def _refuse_inside(source: Path, out: Path) -> None:
    if source.resolve() in (out.resolve(), *out.resolve().parents):
        raise InputError("lies inside the model it is made from", where=out, hint="choose a folder outside it")


def _refuse_quantized(source: Path) -> None:
    if {"quantization", "quantization_config"} & model.check(source).keys():
        raise ModelError("is quantized already", where=source, hint="start from the original model")
