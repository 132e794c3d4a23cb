"""Bits for each layer: against all possible choices of small cases, and the costs of a real network's layers."""

import itertools
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlxtune import model
from mlxtune.errors import InputError
from mlxtune.quant import budget, rtn, search
from mlxtune.quant.packing import Packed, Packing, dequantized

OPTIONS = [Packing(bits, 64) for bits in (2, 3, 4, 6, 8)]


def made_up(layers: int, seed: int) -> tuple[budget.Costs, budget.Sizes]:
    """Costs that about halve with each bit, in layers of different sizes and sensitivities."""
    random = np.random.default_rng(seed)
    costs: budget.Costs = {}
    sizes: budget.Sizes = {}
    for layer in range(layers):
        name, sensitivity, weights = f"layer {layer}", random.lognormal(sigma=2), int(random.integers(1, 9)) * 1000
        costs[name] = {each: sensitivity * 3.0**-each.bits * random.uniform(0.5, 1.5) for each in OPTIONS}
        sizes[name] = {each: weights * each.bits for each in OPTIONS}
    return costs, sizes


def total(choice: dict[str, Packing], of: dict[str, dict[Packing, float]] | budget.Sizes) -> float:
    return sum(of[name][packing] for name, packing in choice.items())


def best(costs: budget.Costs, sizes: budget.Sizes, room: float) -> float:
    """The least cost of all choices that fit."""
    choices = (dict(zip(costs, each, strict=True)) for each in itertools.product(OPTIONS, repeat=len(costs)))
    return min(total(each, costs) for each in choices if total(each, sizes) <= room)


@pytest.mark.parametrize("seed", range(20))
def test_close_to_the_best_of_all_choices(seed: int) -> None:
    costs, sizes = made_up(5, seed)
    least, most = (sum(of(each.values()) for each in sizes.values()) for of in (min, max))
    for share in (0.2, 0.5, 0.8):
        room = least + share * (most - least)
        chosen = budget.assign(costs, sizes, room)
        assert total(chosen, sizes) <= room
        # no more than the gap that the next step of the least layer would close
        assert total(chosen, costs) <= best(costs, sizes, 0.9 * room)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("target", [2.5, 3.2, 4.5, 6.0])
def test_the_budget_is_used(seed: int, target: float) -> None:
    costs, sizes = made_up(60, seed)
    weights = sum(each[OPTIONS[0]] for each in sizes.values()) / 2
    chosen = budget.assign(costs, sizes, target * weights)
    assert 0.98 * target < total(chosen, sizes) / weights <= target
    even = total({name: max((p for p in OPTIONS if p.bits <= target), key=lambda p: p.bits) for name in costs}, costs)
    assert total(chosen, costs) < 0.8 * even


def test_only_corners_of_the_hull_are_chosen() -> None:
    costs = dict(zip(OPTIONS, (8.0, 7.5, 2.0, 2.5, 1.0), strict=True))
    sizes = {each: each.bits * 10 for each in OPTIONS}
    assert [each.bits for each in budget.hull(costs, sizes)] == [2, 4, 8]
    same = {OPTIONS[0]: 1.0, Packing(2, 32): 0.5}
    assert budget.hull(same, dict.fromkeys(same, 10)) == [Packing(2, 32)]


def test_a_budget_that_is_too_small() -> None:
    costs, sizes = made_up(3, 0)
    with pytest.raises(InputError) as caught:
        budget.assign(costs, sizes, 1000.0)
    assert str(caught.value).startswith("target: even the fewest bits take ")


@pytest.mark.parametrize("packing", [*OPTIONS, Packing(4, 16, "nvfp4"), Packing(8, 32, "mxfp8"), Packing(3, 128)])
def test_stored_bits_are_those_of_what_is_packed(packing: Packing) -> None:
    weight = mx.random.normal((2, 8, 256), key=mx.random.key(0)).astype(mx.bfloat16)
    packed = rtn.pack(weight, packing)
    arrays = [packed.weight, packed.scales, *([] if packed.biases is None else [packed.biases])]
    assert budget.stored_bits(weight.shape, packing, 16) == 8 * sum(each.nbytes for each in arrays)


def test_costs_of_a_network(tiny: Path) -> None:
    net = model.load(tiny).net
    tokens = mx.array(np.random.default_rng(0).integers(0, 1024, (2, 32)))
    before = net(tokens)
    asked: list[int] = []

    def far(changed: object) -> float:
        asked.append(1)
        return float(mx.square(net(tokens) - before).mean().item())

    def pack(name: str, weight: mx.array, packing: Packing) -> Packed:
        return search.pack(weight, packing)

    layers = dict(net.named_modules())
    names = [name for name in layers if name.endswith("_proj")]
    done: list[int] = []
    measured = budget.sensitivities(net, names, OPTIONS, pack, far, on_layer=done.append)
    assert done == list(range(1, len(names) + 1)) and len(asked) == len(names) * len(OPTIONS)
    assert mx.array_equal(net(tokens), before)
    one = "model.layers.1.mlp.down_proj"
    plain = layers[one].weight
    layers[one].weight = dequantized(search.pack(plain, OPTIONS[1]), OPTIONS[1])
    assert measured[one][OPTIONS[1]] == pytest.approx(far(net))
    layers[one].weight = plain
    asked.clear()
    scaled = budget.sensitivities(net, names, OPTIONS, pack, far, measured=[OPTIONS[1]])
    assert len(asked) == len(names)
    ratios = [scaled[name][each] / measured[name][each] for name in names for each in OPTIONS]
    assert np.quantile(ratios, 0.1) > 0.5 and np.quantile(ratios, 0.9) < 2  # where costs differ by thousands


def test_groups_that_do_not_divide_are_no_choice() -> None:
    class Net:
        weight = mx.ones((2, 96))

        def named_modules(self) -> list[tuple[str, object]]:
            return [("only", self)]

    options = [Packing(4, 32), Packing(4, 64)]
    costs = budget.sensitivities(Net(), ["only"], options, lambda _, w, p: rtn.pack(w, p), lambda net: 1.0)  # type: ignore[arg-type]
    assert costs == {"only": {Packing(4, 32): 1.0}}
