"""How each weight of a model is packed, by the method that a recipe names. Knows methods and networks, writes nothing.

A method that looks at the layers' inputs runs the model block by block. awq and dwq change all layers together and hold
the model: awq once, dwq twice.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map_with_path

from mlxtune import machine, model
from mlxtune.data.render import Sample
from mlxtune.errors import InputError, ModelError
from mlxtune.layers import Layer, chosen
from mlxtune.quant import awq, calibrate, dwq, gptq, imatrix, own_text, rtn, search
from mlxtune.quant.packing import Packed, Packing
from mlxtune.recipe import QuantizeRecipe
from mlxtune.recipe.settings import CALIBRATED

METHODS = {"rtn": rtn.pack, "search": search.pack}
# from the inputs of a layer; without them: by search
BY_INPUTS = {"imatrix": imatrix.pack, "gptq": gptq.pack, "dwq": gptq.pack}
OWN_ROWS, OWN_TOKENS = 64, 128  # that a model writes itself, where there are none


@dataclass(frozen=True, slots=True)
class Pack:
    """How a layer is packed: `whole` at once, or some rows at a time, by what `begin` gives when its `turn` comes."""

    packing: Packing
    begin: Callable[[], Callable[[mx.array], Packed]]
    whole: bool
    turn: int = 0


@dataclass(frozen=True, slots=True)
class Plan:
    """How the weights that are packed are packed, by their names; and those that stay dense but have `changed`."""

    packs: dict[str, Pack]
    changed: dict[str, mx.array] = field(default_factory=dict)


def check(
    net: nn.Module,
    config: Mapping[str, Any],
    spec: QuantizeRecipe,
    layers: Sequence[Layer],
    samples: Sequence[Sample],
) -> None:
    """Refuses what the method cannot do, before a weight of `net` is read. Raises InputError and ModelError."""
    if spec.method in CALIBRATED and not samples:
        raise InputError(
            f"{spec.method} needs rows that show what goes into the layers",
            where="quantize.method",
            hint="give some, or use search",
        )
    if spec.method == "awq":
        _check_awq(net, config, spec, layers)


def _check_awq(net: nn.Module, config: Mapping[str, Any], spec: QuantizeRecipe, layers: Sequence[Layer]) -> None:
    """mlx-lm's awq packs every layer of the blocks, all alike: it must be asked for just that."""
    if machine.worker_rank(os.environ) is not None:
        raise InputError("awq works in one process", where="quantize.method", hint="quantize before mlx.launch")
    packed = awq.layers_of(net, config)
    asked = Packing(spec.bits, spec.group_size, spec.mode)
    for layer in layers:
        if layer.name in packed and layer.left_out is not None:
            raise ModelError(
                f"awq packs it, but {layer.left_out}",
                where=layer.name,
                hint="use gptq, or a group size that divides the inputs of all layers",
            )
        if layer.packing not in (None, asked):
            raise ModelError("awq packs all layers alike, and this one has its own bits", where=layer.name)
    for name in sorted({layer.name for layer in layers if layer.packing is not None} ^ packed):
        raise ModelError("mlx-lm's awq and the architecture differ on whether it is packed", where=name)


def check_source(source: Path, spec: QuantizeRecipe) -> None:
    """As `check`, for a folder, before there are rows: what is refused is refused before any are made."""
    if spec.method != "awq":
        return
    net, config = model.outline(source)
    if not any(config.get(key) for key in ("quantization", "quantization_config")):  # else `convert` says so
        dtypes = {name: each.dtype for name, each in tree_flatten(net.parameters())}
        _check_awq(net, config, spec, chosen(net, Packing(spec.bits, spec.group_size, spec.mode), dtypes))


def planned(
    source: Path,
    layers: Sequence[Layer],
    spec: QuantizeRecipe | None,
    samples: Sequence[Sample],
    dtypes: Mapping[str, mx.Dtype],
) -> Plan:
    """How each weight is packed, as `check` found it can be; `dtypes` are those that the weights are packed from."""
    packings = {layer.name: layer.packing for layer in layers if layer.packing is not None}
    if spec is None:
        return Plan({})
    if spec.method == "awq":
        scaled = _scaled(source, spec, samples, dtypes)
        return Plan(_made(scaled.packed, packings), scaled.changed)
    seen = _Seen(source, list(packings), samples, spec.method != "imatrix") if spec.method in CALIBRATED else None
    if spec.method == "dwq":
        assert seen is not None
        return Plan(_made(_learned(source, packings, seen, samples, dtypes), packings))

    def begin(name: str, packing: Packing) -> Callable[[mx.array], Packed]:
        inputs = seen.take(name) if seen is not None else None
        if inputs is None:
            return partial(METHODS.get(spec.method, search.pack), packing=packing)
        return partial(BY_INPUTS[spec.method], packing=packing, inputs=inputs)

    return Plan(
        {
            f"{name}.weight": Pack(
                packing,
                partial(begin, name, packing),
                whole=spec.method == "gptq",
                turn=seen.turns[name] if seen is not None else 0,
            )
            for name, packing in packings.items()
        }
    )


class _Seen:
    """What goes into each layer, gathered only as far as it is asked for."""

    def __init__(self, source: Path, names: Sequence[str], samples: Sequence[Sample], hessian: bool):
        config = model.check(source)
        stages = calibrate.by_block(model.unread(source, config), names)
        self.turns = {name: turn for turn, some in enumerate(stages) for name in some}
        self.found: dict[str, calibrate.Inputs | None] = {}
        self.coming = calibrate.gathered(lambda: model.unread(source, config), samples, names, hessian)

    def take(self, name: str) -> calibrate.Inputs | None:
        """Of the layer `name`, and lets it go. To be asked in the order of the turns, or much is held."""
        while name not in self.found:
            self.found |= next(self.coming)
        return self.found.pop(name)


def _learned(
    source: Path,
    packings: Mapping[str, Packing],
    seen: _Seen,
    samples: Sequence[Sample],
    dtypes: Mapping[str, mx.Dtype],
) -> dict[str, Packed]:
    """All layers, packed and then learned together: the model is held twice."""
    net, copy = model.load(source).net, model.load(source).net
    modules = dict(net.named_modules())
    packed = {}
    for name in seen.turns:
        packing = packings[name]
        weight = modules[name].weight.astype(dtypes[f"{name}.weight"])
        known = seen.take(name)
        packed[name] = search.pack(weight, packing) if known is None else gptq.pack(weight, packing, known)
    learned = dwq.learn(net, copy, packed, packings, samples)
    mx.eval([each.weight for each in learned.values()], [each.scales for each in learned.values()])
    mx.eval([each.biases for each in learned.values() if each.biases is not None])
    return learned


def _scaled(
    source: Path, spec: QuantizeRecipe, samples: Sequence[Sample], dtypes: Mapping[str, mx.Dtype]
) -> awq.Scaled:
    """All layers, scaled and packed block by block by mlx-lm: the model is held once.

    In the types it is written in; on a CPU in float32, as it multiplies halves 10 to 50 times as slowly.
    """
    lm = model.load(source, stored=True)
    wide = machine.device_kind() == "cpu"

    def computed(name: str, weight: mx.array) -> mx.array:
        weight = weight.astype(dtypes[name])
        return weight.astype(mx.float32) if wide and mx.issubdtype(weight.dtype, mx.floating) else weight

    lm.net.update(tree_map_with_path(computed, lm.net.parameters()))
    return awq.quantize(lm.net, lm.config, samples, Packing(spec.bits, spec.group_size, spec.mode), dtypes)


def _made(packed: dict[str, Packed], packings: Mapping[str, Packing]) -> dict[str, Pack]:
    """Of layers that are packed already; each is let go when its turn comes."""
    return {
        f"{name}.weight": Pack(packing, partial(partial, _ready, packed, name), whole=True)
        for name, packing in packings.items()
    }


def _ready(packed: dict[str, Packed], name: str, rows: mx.array) -> Packed:
    return packed.pop(name)


def own_rows(source: Path) -> list[Sample]:
    """Rows that the model of `source` writes itself, for a method that looks at the layers where a user has none."""
    lm = model.load(source)
    start = lm.tokenizer.bos_token_id
    return own_text.write(lm.net, OWN_ROWS, OWN_TOKENS, min(lm.tokenizer.eos_token_ids) if start is None else start, 0)
