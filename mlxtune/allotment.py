"""Bits for each layer of a model, so that all of it takes a given size and loses least. Knows folders and text.

What each layer costs in each width is measured once, against the source on a text (see `quant.budget`), and can be kept
in a file: another size then takes no time.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from mlxtune import layers, model, precision
from mlxtune.data.render import Sample
from mlxtune.errors import InputError
from mlxtune.metrics import divergence
from mlxtune.quant import budget, search
from mlxtune.quant.packing import Packed, Packing
from mlxtune.recipe import QuantizeRecipe
from mlxtune.rundir import read_json

WIDTHS = (2, 3, 4, 5, 6, 8)
MEASURED = (3,)  # the others are reckoned from it: within 3 % of the KL of plans that are measured in every width
SAMPLES = 16  # windows of text that each layer's cost is measured on


@dataclass(frozen=True, slots=True, kw_only=True)
class Allotment:
    """A packing for each layer, what each costs in each width in nats per token, and the whole's bits per weight."""

    packings: Mapping[str, Packing]
    costs: budget.Costs
    bits_per_weight: float


def allot(
    source: Path,
    spec: QuantizeRecipe,
    target_bpw: float,
    samples: Sequence[Sample],
    *,
    costs: budget.Costs | None = None,
    on_layer: Callable[[int, int], None] = lambda done, total: None,
) -> Allotment:
    """Bits for the layers of `source`, in groups as `spec` says, so that it takes `target_bpw` bits per weight at most.

    `costs` are those of `read_costs`, else they are measured on `samples`. Raises InputError where no bits are few
    enough, or where nothing is to be chosen because the widest fit.
    """
    net, _ = model.outline(source)
    dtypes = {name: each.dtype for name, each in tree_flatten(net.parameters())}
    asked = Packing(spec.bits, spec.group_size, spec.mode)
    chosen = [each for each in layers.chosen(net, asked, dtypes) if each.packing is not None]
    names = [each.name for each in chosen]
    shapes = {name: tuple(each.shape) for name, each in tree_flatten(net.parameters())}
    sizes = {name: _sizes(name, shapes[f"{name}.weight"], dtypes[f"{name}.weight"], spec) for name in names}
    weights = precision.parameter_count(net)
    whole = sum(8 * each.nbytes for _, each in tree_flatten(net.parameters()))
    rest = whole - sum(8 * dtypes[f"{each.name}.weight"].size * each.parameters for each in chosen)
    del net
    room = target_bpw * weights - rest
    budget.assign({name: dict.fromkeys(each, 0.0) for name, each in sizes.items()}, sizes, room)  # refuses too little
    if costs is None:
        costs = _measured(source, names, spec, samples, on_layer)
    elif costs.keys() != sizes.keys():
        raise InputError(
            "has the costs of another model's layers", where="--costs", hint="leave it out to measure them"
        )
    packings = budget.assign(costs, sizes, room)
    taken = rest + sum(sizes[name][packing] for name, packing in packings.items())
    return Allotment(packings=packings, costs=costs, bits_per_weight=taken / weights)


def _sizes(name: str, shape: tuple[int, ...], dtype: mx.Dtype, spec: QuantizeRecipe) -> dict[Packing, int]:
    """Bits that a layer takes in each width."""
    packings = [Packing(bits, spec.group_size) for bits in WIDTHS]
    return {each: 8 * sum(part.nbytes for part in layers.packed_tensors(name, shape, dtype, each)) for each in packings}


def _measured(
    source: Path,
    names: Sequence[str],
    spec: QuantizeRecipe,
    samples: Sequence[Sample],
    on_layer: Callable[[int, int], None],
) -> budget.Costs:
    net = model.load(source).net
    before = divergence.Reference(net, samples[:: max(1, len(samples) // SAMPLES)][:SAMPLES])

    def pack(name: str, weight: mx.array, packing: Packing) -> Packed:
        return search.pack(weight, packing)

    packings = [Packing(bits, spec.group_size) for bits in WIDTHS]
    measured = [each for each in packings if each.bits in MEASURED]
    return budget.sensitivities(
        net, names, packings, pack, before.kl, measured=measured, on_layer=lambda done: on_layer(done, len(names))
    )


def costs_to_value(costs: budget.Costs) -> dict[str, Any]:
    """As JSON holds them."""
    return {
        name: [{**packing.described, "kl": kl} for packing, kl in by_packing.items()]
        for name, by_packing in costs.items()
    }


def read_costs(file: Path) -> budget.Costs:
    """The costs that a file holds. Raises InputError."""
    value = read_json(file)
    try:
        return {
            name: {Packing(each["bits"], each["group_size"], each["mode"]): float(each["kl"]) for each in some}
            for name, some in value.items()
        }
    except (AttributeError, KeyError, TypeError, ValueError):
        raise InputError(
            "holds no layers' costs", where=file, hint="give the costs.json of a quantized model"
        ) from None
