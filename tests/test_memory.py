"""Predicted memory: from shapes alone, the same loaded or not, close to what MLX holds."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from mlxtune import adapter, machine, memory, model
from mlxtune.convert import convert
from mlxtune.data.render import Sample
from mlxtune.memory import Job, Place, Rows
from mlxtune.recipe import LoraRecipe, QuantizeRecipe, Recipe, TrainRecipe

BENCH = Path(__file__).parent.parent / "scripts" / "bench_memory.py"
FLOAT32 = machine.ComputePolicy(float32=True, expand=True, spread=False, compile=False, pad_multiple=1)
STORED = machine.ComputePolicy(float32=False, expand=False, spread=False, compile=True, pad_multiple=32)
CPU = Place(
    usable_bytes=10**9,
    parts=2,
    most_tokens=None,
    attention=(None, 0),
    pad_multiple=1,
    chunk_bytes=2**23,
    policy=FLOAT32,
)
GPU = Place(
    usable_bytes=10**9,
    parts=1,
    most_tokens=None,
    attention=(None, 0),
    pad_multiple=32,
    chunk_bytes=2**26,
    policy=STORED,
)
ROWS = Rows(longest=128, supervised=32, count=100)


@pytest.fixture(scope="module")
def four_bits(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantized") / "base"
    convert(tiny, folder, quantize=QuantizeRecipe(bits=4))
    return folder


def peak(
    folder: Path, place: Place = CPU, rows: Rows = ROWS, lora: LoraRecipe | None = None, **train: Any
) -> memory.Peak:
    net, config = model.outline(folder)
    recipe = Recipe(lora=lora or LoraRecipe(), train=TrainRecipe(**train))
    return Job(net=net, config=config, rows=rows, place=place).peak(recipe)


def test_nothing_is_loaded(tiny: Path) -> None:
    before = mx.get_active_memory()
    peak(tiny)
    assert mx.get_active_memory() - before < 1000


@pytest.mark.parametrize(
    "lora",
    [
        LoraRecipe(rank=4),
        LoraRecipe(method="dora", targets=["mlp"]),
        LoraRecipe(targets=["q_proj", "*.down_proj"], num_layers=2),
        LoraRecipe(method="full"),
        LoraRecipe(method="full", num_layers=1),
    ],
)
def test_what_is_trained_is_counted(tiny: Path, lora: LoraRecipe) -> None:
    net, config = model.outline(tiny)
    found = memory.describe(net, config, Recipe(lora=lora), FLOAT32)
    lm = model.load(tiny)
    held = sum(value.nbytes for _, value in tree_flatten(lm.net.parameters()))
    adapter.attach(lm, lora, 0)
    trained = adapter.trained(lm.net)
    assert (found.trained, found.arrays) == (sum(value.size for value in trained.values()), len(trained))
    assert found.held_bytes == held
    assert (found.width, found.heads, found.vocabulary) == (192, 3, 1024)


@pytest.mark.parametrize("place", [CPU, GPU])
def test_a_quantizing_recipe_is_planned_as_its_base(tiny: Path, four_bits: Path, place: Place) -> None:
    net, config = model.outline(tiny)
    recipe = Recipe(quantize=QuantizeRecipe(bits=4))
    before = Job(net=net, config=config, rows=ROWS, place=place).peak(recipe)
    net, config = model.outline(four_bits)
    after = Job(net=net, config=config, rows=ROWS, place=place).peak(recipe)
    # the scales of the embedded model are float32, those of most models half as long
    assert before.weights == pytest.approx(after.weights, rel=0.15)
    assert before.training - before.weights == after.training - after.weights


def test_a_network_is_planned_the_same_loaded_and_not(four_bits: Path) -> None:
    net, config = model.outline(four_bits)
    lm = model.load(four_bits)
    plans = [
        Job(net=each, config=settings, rows=ROWS, place=CPU).peak(Recipe())
        for each, settings in ((net, config), (lm.net, lm.config))
    ]
    assert plans[0].training == plans[1].training
    assert plans[0].loading > plans[1].loading  # the packed weights and the expanded ones


def test_more_takes_more(tiny: Path) -> None:
    usual = peak(tiny)
    assert usual.total == usual.training == usual.weights + usual.adapter + usual.activations + usual.logits
    assert usual.weights == 4 * 1_377_600
    assert peak(tiny, batch_size=16).activations > 1.9 * usual.activations
    assert peak(tiny, rows=replace(ROWS, longest=256)).activations > 2 * usual.activations
    assert peak(tiny, lora=LoraRecipe(rank=64)).adapter == 4 * usual.adapter
    # of three blocks' activations and what is handed out ahead
    assert peak(tiny, grad_checkpoint=True).activations < 0.6 * usual.activations
    assert peak(tiny, lora=LoraRecipe(num_layers=1)).activations == usual.activations // 2
    assert peak(tiny, lora=LoraRecipe(method="full")).adapter == 4 * usual.weights
    assert peak(tiny, optimizer="sgd").adapter < usual.adapter
    assert peak(tiny, rows=replace(ROWS, count=3)) == peak(tiny, batch_size=3)


def test_only_the_rows_of_a_round_count(tiny: Path) -> None:
    """Two parts of about 320 tokens: three rows of 128 each at most, or one of 400."""
    rounds = replace(CPU, most_tokens=320)
    assert peak(tiny, rounds, batch_size=4) == peak(tiny, CPU, batch_size=4)
    assert peak(tiny, rounds, batch_size=32) == peak(tiny, CPU, batch_size=6)
    assert peak(tiny, rounds, rows=replace(ROWS, longest=400), batch_size=4) == peak(
        tiny, CPU, rows=replace(ROWS, longest=400), batch_size=2
    )


def test_attention_in_blocks_takes_as_much_for_each_token(tiny: Path) -> None:
    """As long as rows are not shorter than those that it is for."""
    blocks = replace(CPU, attention=(64, 100))
    one, two, four = (peak(tiny, blocks, rows=replace(ROWS, longest=each + 1)).activations for each in (100, 200, 400))
    assert one == pytest.approx(two / 2, rel=1e-6) == pytest.approx(four / 4, rel=1e-6)
    assert peak(tiny, blocks, rows=replace(ROWS, longest=100)) == peak(tiny, CPU, rows=replace(ROWS, longest=100))
    assert peak(tiny, CPU, rows=replace(ROWS, longest=401)).activations > 1.2 * four


def test_rows_of_samples() -> None:
    samples = [
        Sample("a:1", [1, 2, 3, 4], [True, False, True, True], 1, "x"),
        Sample("a:2", [1, 2, 3, 4, 5, 6], [False] * 5 + [True], 5, "x"),
    ]
    assert Rows.of(samples) == Rows(longest=6, supervised=2, count=2)


def test_this_machine(tiny: Path) -> None:
    net, config = model.outline(tiny)
    place = Job.here(net, config, ROWS).place
    assert place.usable_bytes == machine.usable_here()
    assert place.policy == machine.policy_here(1_377_600)


def test_experts_count_as_those_that_a_token_goes_through() -> None:
    from mlxtune.borrow import SwitchLinear

    block = nn.Module()
    block.up_proj = SwitchLinear(8, 16, 6, bias=False)
    (layer,) = memory._layers(block, {"up_proj"}, {"num_experts_per_tok": 2}, False)
    assert (layer.inputs, layer.outputs, layer.experts, layer.active, layer.trained) == (8, 16, 6, 2, True)


def measured(name: str) -> float:
    """Predicted over measured peak of a case of the bench, in a process of its own."""
    done = subprocess.run([sys.executable, BENCH, "--one", name], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    return float(found["predicted"]["training"] / found["training"])


@pytest.mark.skipif(machine.device_kind() != "cpu", reason="measured on a CPU only")
def test_a_prediction_is_close() -> None:
    assert 0.8 < measured("1M") < 1.2


@pytest.mark.slow
@pytest.mark.skipif(machine.device_kind() != "cpu", reason="measured on a CPU only")
@pytest.mark.parametrize("name", ["3M checkpoint", "3M full", "8M dora", "8M attention only", "wide vocabulary"])
def test_predictions_are_close(name: str) -> None:
    assert 0.8 < measured(name) < 1.2
