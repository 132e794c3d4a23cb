"""Bits for each layer within a size: the size is kept, and less is lost than with the same bits for all."""

import json
from pathlib import Path

import pytest

from mlxtune import allotment, fidelity, model
from mlxtune.convert import convert
from mlxtune.errors import InputError
from mlxtune.quant.budget import Costs
from mlxtune.recipe import QuantizeRecipe
from mlxtune.rundir import write_json

SPEC = QuantizeRecipe(bits=4)


@pytest.fixture(scope="module")
def lm(tiny: Path) -> model.LanguageModel:
    return model.load(tiny)


@pytest.fixture(scope="module")
def costs(lm: model.LanguageModel, tiny: Path) -> Costs:
    return dict(allotment.allot(tiny, SPEC, 5.0, fidelity.read_text(lm)).costs)


@pytest.mark.parametrize("target", [3.5, 4.5, 6.0])
def test_the_size_is_what_was_asked_for(tiny: Path, costs: Costs, tmp_path: Path, target: float) -> None:
    found = allotment.allot(tiny, SPEC, target, [], costs=costs)
    done = convert(tiny, tmp_path / "copy", quantize=SPEC, packings=found.packings)
    assert done.bits_per_weight == pytest.approx(found.bits_per_weight, rel=1e-6)
    assert 0.98 * target <= done.bits_per_weight <= target
    assert len({packing.bits for packing in found.packings.values()}) > 1


def test_less_is_lost_than_with_the_same_bits_for_all(
    lm: model.LanguageModel, tiny: Path, costs: Costs, tmp_path: Path
) -> None:
    """4 bits and a float32 scale and bias for 64 weights are 5 bits a weight."""
    samples = fidelity.read_text(lm)
    same = convert(tiny, tmp_path / "same", quantize=SPEC)
    found = allotment.allot(tiny, SPEC, same.bits_per_weight, samples, costs=costs)
    convert(tiny, tmp_path / "own", quantize=SPEC, packings=found.packings)
    one, other = (fidelity.compare(lm, tmp_path / name, samples, name) for name in ("own", "same"))
    assert one.bytes <= 1.01 * other.bytes
    assert one.divergence.kl_mean < other.divergence.kl_mean


def test_costs_are_measured_once(tiny: Path, costs: Costs, tmp_path: Path) -> None:
    write_json(tmp_path / "costs.json", allotment.costs_to_value(costs))
    assert allotment.read_costs(tmp_path / "costs.json") == costs


@pytest.mark.parametrize("text", ["[]", '{"a": 1}', '{"a": [{"bits": 4}]}'])
def test_a_file_without_costs_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "costs.json").write_text(text)
    with pytest.raises(InputError, match="costs"):
        allotment.read_costs(tmp_path / "costs.json")


def test_costs_of_another_model_are_refused(tiny: Path, costs: Costs) -> None:
    other = {f"{name}x": each for name, each in costs.items()}
    with pytest.raises(InputError, match="another model"):
        allotment.allot(tiny, SPEC, 4.0, [], costs=other)
    assert json.dumps(allotment.costs_to_value(costs))


def test_too_few_bits_are_refused(tiny: Path, costs: Costs) -> None:
    with pytest.raises(InputError, match="fewest bits"):
        allotment.allot(tiny, SPEC, 1.5, [], costs=costs)
