"""Converts, quantizes and dequantizes a model folder, a few rows at a time. Knows folders, not the hub.

Nothing holds the model: rows are read, checked, cast, packed and written, whatever the model's size (see `sources` and
`shards`). How a weight is packed is decided in `packs`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxtune import machine, model, packs, precision, shards, sources
from mlxtune.claims import without_claim
from mlxtune.data.render import Sample
from mlxtune.errors import InputError, ModelError
from mlxtune.layers import Layer, chosen, described, packed_tensors
from mlxtune.packs import Pack
from mlxtune.quant.packing import WORD, Packed, Packing, dequantized
from mlxtune.recipe import QuantizeRecipe
from mlxtune.rundir import refuse_existing, size_of, staged, write_json
from mlxtune.shards import Job, Piece, Tensor
from mlxtune.sources import Read, Source
from mlxtune.tokenizer import check_vocabulary, load_tokenizer, vocabulary

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}

OnBytes = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Converted:
    """What was written. Sizes in bytes.

    `layers` are those that could be quantized, by `method`, where that was asked for.
    """

    path: Path
    parameters: int
    dtype: str
    bits_per_weight: float
    bytes_before: int
    bytes_after: int
    layers: tuple[Layer, ...]
    method: str | None = None

    @property
    def quantized_layers(self) -> int:
        return sum(layer.packing is not None for layer in self.layers)

    @property
    def left_out(self) -> dict[str, str]:
        """Layers that stayed in full precision, with the reason."""
        return {layer.name: layer.left_out for layer in self.layers if layer.left_out is not None}


def convert(
    source: Path,
    out: Path,
    *,
    quantize: QuantizeRecipe | None = None,
    dtype: str | None = None,
    samples: Sequence[Sample] = (),
    packings: Mapping[str, Packing] | None = None,
    beside: Mapping[str, Any] | None = None,
    on_bytes: OnBytes = lambda done, total: None,
) -> Converted:
    """Reads the model in `source`, casts it to `dtype` where one is given, quantizes it, and writes `out`.

    `samples` show a method that needs them what goes into each layer; `packings` gives layers a packing of their own.
    `beside` are JSON files that the folder gets as well. `on_bytes(done, total)` tells how much is written. Raises
    ModelError for a malformed or already quantized source, OutputError if `out` exists.
    """
    net, config, weights = _opened(source, out)
    if _is_quantized(net, config) and (quantize is not None or dtype is not None):
        raise ModelError("is quantized already", where=source, hint="start from the original model")
    casts = _casts(net, weights, dtype)
    layers: list[Layer] = []
    if quantize is not None:
        asked = Packing(quantize.bits, quantize.group_size, quantize.mode)
        layers = chosen(net, asked, casts, packings)
        packs.check(net, config, quantize, layers, samples)
        config = described(config, asked, layers)
    parameters = precision.parameter_count(net)
    del net
    plan = packs.planned(source, layers, quantize, samples, casts)
    weights |= {name: Source(array, None) for name, array in plan.changed.items()}
    order = sorted(weights, key=lambda name: plan.packs[name].turn if name in plan.packs else 0)
    pieces = (_piece(name, weights.pop(name), casts[name], plan.packs, source) for name in order)
    done = _written(source, out, pieces, _with_dtype(config, dtype), parameters, tuple(layers), on_bytes, beside or {})
    return replace(done, method=quantize.method if quantize is not None else None)


def dequantize(
    source: Path, out: Path, *, dtype: str | None = None, on_bytes: OnBytes = lambda done, total: None
) -> Converted:
    """Writes the quantized model of `source` to `out` with dense layers of the same values.

    They are in `dtype`, or in the precision of their scales, bfloat16 where these are no floats. Raises ModelError for
    a malformed source and for one that is not quantized, OutputError if `out` exists.
    """
    net, config, weights = _opened(source, out)
    layers = _quantized_layers(net)
    if not layers and _is_quantized(net, config):
        raise ModelError("is quantized in a form that has no dense one here", where=source)
    if not layers:
        raise ModelError("is not quantized", where=source, hint="`mlxtune convert` copies and casts it")
    casts = _casts(net, weights, dtype)
    parameters = precision.parameter_count(net)
    config = without_claim({key: value for key, value in config.items() if key != "quantization"})
    parts = {f"{name}.{part}" for name in layers for part in ("scales", "biases", "global_scale")}
    names = [name for name in weights if name not in parts]
    del net
    pieces = (_dense_or_plain(name, layers, weights, casts[name], dtype, source) for name in names)
    return _written(source, out, pieces, _with_dtype(config, dtype), parameters, (), on_bytes, {})


def _opened(source: Path, out: Path) -> tuple[nn.Module, dict[str, Any], dict[str, Source]]:
    """The checked model of `source`, as `sources.opened` gives it."""
    refuse_existing(out, "--mlx-path")
    if source.resolve() in (out.resolve(), *out.resolve().parents):
        raise InputError("lies inside the model it is made from", where=out, hint="choose a folder outside it")
    machine.configure()
    config = model.check(source)
    check_vocabulary(load_tokenizer(source, config), vocabulary(config), source)
    return sources.opened(source, config)


def _quantized_layers(net: nn.Module) -> dict[str, nn.Module]:
    return {name: each for name, each in net.named_modules() if isinstance(each, precision.QUANTIZED)}


def _is_quantized(net: nn.Module, config: dict[str, Any]) -> bool:
    """Whether the network is; what the folder held in 8-bit floats is dense by now, and its config says so."""
    return bool(_quantized_layers(net)) or any(config.get(key) for key in ("quantization", "quantization_config"))


def _casts(net: nn.Module, weights: Mapping[str, Source], dtype: str | None) -> dict[str, mx.Dtype]:
    """The type of each weight; those that the architecture needs as they are, such as a router's, keep their own."""
    wanted: Callable[[str], bool] = getattr(net, "cast_predicate", lambda name: True)

    def one(name: str, stored: mx.Dtype) -> mx.Dtype:
        cast = dtype is not None and mx.issubdtype(stored, mx.floating) and wanted(name)
        return DTYPES[dtype] if dtype is not None and cast else stored

    return {name: one(name, weight.dtype) for name, weight in weights.items()}


def _with_dtype(config: dict[str, Any], dtype: str | None) -> dict[str, Any]:
    if dtype is None:
        return config
    return {key: value for key, value in config.items() if key != "dtype"} | {"torch_dtype": dtype}


def _piece(name: str, weight: Source, dtype: mx.Dtype, packs: dict[str, Pack], where: Path) -> Piece:
    """What is written of a weight: itself, or what it is packed into."""
    pack = packs.pop(name, None)
    if pack is None:
        tensors: tuple[Tensor, ...] = (Tensor(name, dtype, weight.shape),)
    else:
        tensors = packed_tensors(name.removesuffix(".weight"), weight.shape, dtype, pack.packing)
    count = weight.row_count if pack is not None and pack.whole else shards.rows_at_once(weight.width)

    def jobs() -> Iterator[Job]:
        begun = pack.begin() if pack is not None else None
        return (partial(_rows, read, name, dtype, begun, where) for read in weight.rows(count))

    return Piece(tensors, jobs, whole=weight.place is None or (pack is not None and pack.whole))


def _rows(
    read: Read, name: str, dtype: mx.Dtype, pack: Callable[[mx.array], Packed] | None, where: Path
) -> list[mx.array]:
    """Some rows of a weight as they are written."""
    rows = _checked(read(), name, dtype, where)
    if pack is None:
        return [rows]
    packed = pack(rows)
    return [each for each in (packed.weight, packed.scales, packed.biases) if each is not None]


def _checked(rows: mx.array, name: str, dtype: mx.Dtype, where: Path) -> mx.array:
    """Rows in `dtype`. Raises ModelError for NaN and infinite values, before or after."""
    if not sources.is_finite(rows):
        raise ModelError(
            f"holds NaN or infinite values in {name}", where=where, hint="download or train the model again"
        )
    if rows.dtype == dtype:
        return rows
    rows = rows.astype(dtype)
    mx.eval(rows)
    if not sources.is_finite(rows):
        kind = str(dtype).removeprefix("mlx.core.")
        raise ModelError(
            f"holds values in {name} that are too large for {kind}", where=where, hint="choose bfloat16 or float32"
        )
    return rows


def _dense_or_plain(
    name: str,
    layers: dict[str, nn.Module],
    weights: dict[str, Source],
    cast: mx.Dtype,
    dtype: str | None,
    where: Path,
) -> Piece:
    """What is written of a weight of a quantized network. Takes it, and its layer, out of the two."""
    layer_name = name.removesuffix(".weight")
    layer = layers.pop(layer_name, None) if name.endswith(".weight") else None
    if layer is None:
        return _piece(name, weights.pop(name), cast, {}, where)
    kind = DTYPES[dtype] if dtype is not None else precision.dense_dtype(layer)
    if "global_scale" in layer:
        return shards.of_array(name, precision.dense(layer, kind).weight)
    packing = Packing(layer.bits, layer.group_size, layer.mode)
    parts = [weights.pop(f"{layer_name}.{part}") for part in ("weight", "scales", "biases") if part in layer]
    *lead, words = parts[0].shape
    shape = (*lead, words * WORD // packing.bits)

    def jobs() -> Iterator[Job]:
        count = shards.rows_at_once(shape[-1])
        for reads in zip(*(part.rows(count) for part in parts), strict=True):
            yield partial(_dense_rows, reads, packing, name, kind, where)

    return Piece((Tensor(name, kind, shape),), jobs, whole=any(part.place is None for part in parts))


def _dense_rows(reads: Sequence[Read], packing: Packing, name: str, dtype: mx.Dtype, where: Path) -> list[mx.array]:
    """The values of some packed rows."""
    weight, scales, *biases = (read() for read in reads)
    rows = dequantized(Packed(weight, scales, biases[0] if biases else None), packing)
    mx.eval(rows)
    return [_checked(rows, name, dtype, where)]


def _written(
    source: Path,
    out: Path,
    pieces: Iterator[Piece],
    config: dict[str, Any],
    parameters: int,
    layers: tuple[Layer, ...],
    on_bytes: OnBytes,
    beside: Mapping[str, Any],
) -> Converted:
    with staged(out) as scratch:
        total = shards.write(scratch, pieces, on_bytes)
        for name, value in beside.items():
            write_json(scratch / name, value)
        shards.describe(scratch, config, source)
    return Converted(
        path=out,
        parameters=parameters,
        dtype=str(config.get("torch_dtype") or config.get("dtype") or "as stored"),
        bits_per_weight=8 * total / parameters,
        bytes_before=sum(size_of(file) for file in model.weight_files(source)),
        bytes_after=sum(size_of(file) for file in model.weight_files(out)),
        layers=layers,
    )
