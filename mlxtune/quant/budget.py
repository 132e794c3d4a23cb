"""Which layer gets how many bits, so that a network of a given size loses least. Knows layers and costs, not folders.

A layer's cost in a packing is the KL that it alone adds, all others in full precision. Costs of layers are taken to
add up, which holds where they are small. What fits best into a budget is then a knapsack: on each layer's curve of
cost against size only the corners of its lower hull are of use, and the steps between them are taken by what they
save for a bit, while there is room.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxtune.errors import InputError
from mlxtune.quant.packing import Packed, Packing, dequantized

Pack = Callable[[str, mx.array, Packing], Packed]
Costs = dict[str, dict[Packing, float]]
Sizes = dict[str, dict[Packing, int]]


def sensitivities(
    net: nn.Module,
    names: Sequence[str],
    packings: Sequence[Packing],
    pack: Pack,
    kl: Callable[[nn.Module], float],
    *,
    measured: Sequence[Packing] | None = None,
    on_layer: Callable[[int], None] = lambda done: None,
) -> Costs:
    """The KL that each layer called `names` adds in each of the packings that divide its inputs.

    `kl` says how far `net` is from what it was; `net` stays as it is. With `measured` it is asked in these only, and
    any other packing costs what the nearest of them does, times the ratio of the squared errors of the weights.
    """
    layers = dict(net.named_modules())
    costs: Costs = {}
    for done, name in enumerate(names, 1):
        layer = layers[name]
        weight = layer.weight
        usable = [each for each in packings if weight.shape[-1] % each.group_size == 0]
        errors, found = {}, {}
        try:
            for packing in usable:
                values = dequantized(pack(name, weight, packing), packing)
                errors[packing] = float(np.array(mx.square(values - weight.astype(mx.float32)).sum()))
                if measured is None or packing in measured:
                    layer.weight = values.astype(weight.dtype)
                    found[packing] = kl(net)
        finally:
            layer.weight = weight
        costs[name] = {packing: _cost(packing, errors, found) for packing in usable}
        on_layer(done)
    return costs


def _cost(packing: Packing, errors: Mapping[Packing, float], found: Mapping[Packing, float]) -> float:
    if packing in found:
        return found[packing]
    nearest = min(found, key=lambda each: abs(each.bits - packing.bits))
    return found[nearest] * errors[packing] / errors[nearest] if errors[nearest] else 0.0


def stored_bits(shape: Sequence[int], packing: Packing, scale_bits: int) -> int:
    """Bits that a weight of this shape takes: its codes, and of each group a scale and, in the affine mode, a bias."""
    count = 1
    for size in shape:
        count *= size
    each = 2 * scale_bits if packing.mode == "affine" else 8
    return count * packing.bits + count // packing.group_size * each


def assign(costs: Costs, sizes: Sizes, budget: float) -> dict[str, Packing]:
    """A packing for each layer, so that their sizes together are at most `budget` bits.

    Raises InputError where even the smallest packings take more.
    """
    hulls = {name: hull(costs[name], sizes[name]) for name in costs}
    chosen = {name: corners[0] for name, corners in hulls.items()}
    room = budget - sum(sizes[name][packing] for name, packing in chosen.items())
    if room < 0:
        least = sum(sizes[name][packing] for name, packing in chosen.items())
        raise InputError(
            f"even the fewest bits take {least / 8e6:.3g} MB, and the budget is {budget / 8e6:.3g} MB",
            where="target",
            hint="allow more, or a smaller model",
        )
    steps = [
        ((costs[name][one] - costs[name][next_]) / (sizes[name][next_] - sizes[name][one]), name, one, next_)
        for name, corners in hulls.items()
        for one, next_ in pairwise(corners)
    ]
    for _, name, one, next_ in sorted(steps, key=lambda step: -step[0]):  # steep ones first, so in order in each layer
        more = sizes[name][next_] - sizes[name][one]
        if chosen[name] == one and more <= room:
            chosen[name] = next_
            room -= more
    return chosen


def hull(costs: Mapping[Packing, float], sizes: Mapping[Packing, int]) -> list[Packing]:
    """The packings, smallest first, on the lower hull of cost against size: each step saves less for a bit."""
    corners: list[Packing] = []

    def slope(one: Packing, other: Packing) -> float:
        return (costs[one] - costs[other]) / (sizes[other] - sizes[one])

    for packing in sorted(costs, key=lambda each: (sizes[each], costs[each])):
        if corners and (sizes[packing] == sizes[corners[-1]] or costs[packing] >= costs[corners[-1]]):
            continue
        while len(corners) > 1 and slope(corners[-2], corners[-1]) <= slope(corners[-1], packing):
            corners.pop()
        corners.append(packing)
    return corners
