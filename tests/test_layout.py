"""The layout of a run: few shapes, each row once, packing and sharing where they are right and worth it."""

import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxtune import layout, machine, model, packing, prefix
from mlxtune.data.batches import MOST_SHAPES
from mlxtune.data.render import Sample
from mlxtune.errors import Interrupted
from mlxtune.gradient import update_order
from mlxtune.recipe import LoraRecipe, Recipe, TrainRecipe
from mlxtune.train import train
from mlxtune.workers import Workers
from tests import zoo

CPU = machine.compute_policy(device="cpu", memory_bytes=10**10, float32_bytes=10**6, blas="OpenBLAS")
METAL = machine.compute_policy(device="metal", memory_bytes=10**10, float32_bytes=10**6, blas="Accelerate")


def samples(count: int, beginning: int = 0, seed: int = 0, longest: int = 200) -> list[Sample]:
    """Rows of very different lengths, with a common beginning of as many tokens."""
    random = np.random.default_rng(seed)
    head = random.integers(0, zoo.VOCABULARY, beginning).tolist()
    made = []
    for number in range(count):
        length = int(random.integers(3, longest) * random.random()) + 3
        rest = [number, *random.integers(0, zoo.VOCABULARY, length).tolist()]
        tokens = [token % zoo.VOCABULARY for token in head + rest]
        made.append(Sample(f"a:{number}", tokens, [place > beginning + 1 for place in range(len(tokens))], 0, None))
    return made


def recipe(lora: LoraRecipe | None = None, **settings: Any) -> Recipe:
    return Recipe(lora=lora or LoraRecipe(), train=TrainRecipe(**{"batch_size": 8, **settings}))


def chosen(rows: Sequence[Sample], wanted: Recipe, name: str = "llama", policy: Any = CPU) -> tuple[Any, list[str]]:
    warnings: list[str] = []
    return layout.choose(zoo.build(name), rows, wanted, policy, on_warning=warnings.append), warnings


def epoch(rows: Sequence[Sample], wanted: Recipe) -> list[list[int]]:
    order = update_order(rows, wanted)
    return [batch for _ in range(-(-len(rows) // wanted.train.batch_size)) for batch in next(order)]


@pytest.mark.parametrize("packing", ["off", "on", "auto"])
@pytest.mark.parametrize("share_prefix", ["off", "on"])
@pytest.mark.parametrize("policy", [CPU, METAL])
def test_every_row_once_whatever_the_layout(packing: str, share_prefix: str, policy: machine.ComputePolicy) -> None:
    rows, wanted = samples(101, beginning=20), recipe(packing=packing, share_prefix=share_prefix)
    found, _ = chosen(rows, wanted, policy=policy)
    assert bool(found.prefix) == (share_prefix == "on")
    for indices in epoch(rows, wanted):
        batch = found.batch(indices)
        assert sorted(batch.rows) == sorted(indices)
        assert batch.trained[:, 1:].sum() == sum(rows[row].trained_count for row in indices)
        tokens = sum(len(rows[row].tokens) - len(found.prefix) for row in indices)
        assert batch.tokens.size >= tokens


@pytest.mark.parametrize("packing", ["off", "on"])
@pytest.mark.parametrize("workers", [Workers(), Workers(1, 3)])
@pytest.mark.parametrize(("count", "batch_size"), [(1003, 8), (5, 8), (260, 32)])
def test_a_run_has_few_shapes_where_graphs_are_compiled(
    packing: str, workers: Workers, count: int, batch_size: int
) -> None:
    rows = samples(count, longest=1500)
    wanted = recipe(packing=packing, batch_size=batch_size)
    found = layout.choose(zoo.build("llama"), rows, wanted, METAL, workers)
    order = update_order(rows, wanted)
    shapes, used, padded = set(), 0, 0
    for _ in range(3 * -(-count // batch_size)):
        for share in filter(None, map(workers.share, next(order))):
            batch = found.batch(share)
            shapes.add(batch.tokens.shape)
            used += sum(len(rows[row].tokens) for row in share)
            padded += batch.tokens.size
    assert len(shapes) <= MOST_SHAPES
    if count > 1000 and workers.size == 1:
        assert padded < 1.3 * used  # with any number of shapes it would be 1.12


def test_on_a_cpu_rows_are_padded_to_the_longest_only() -> None:
    rows, wanted = samples(50), recipe(packing="off")
    found, _ = chosen(rows, wanted)
    for indices in epoch(rows, wanted):
        assert found.batch(indices).tokens.shape == (len(indices), max(len(rows[row].tokens) for row in indices))


def test_packing_is_for_batches_whose_longest_part_gets_shorter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "batch_parts", lambda device, cores: 2)
    rows = samples(8, longest=400)
    found, warnings = chosen(rows, recipe())
    assert found.pack is not None and found.batch(list(range(8))).segments is not None
    assert warnings == []
    like = [replace(rows[0], tokens=[number] * 20, trained=[False] + [True] * 19) for number in range(8)]
    for asked in ("auto", "on"):
        found, warnings = chosen(like, recipe(packing=asked))
        assert found.pack is None
    assert warnings == ["train.packing: no two rows of a batch fit in a line"]


@pytest.mark.parametrize(
    ("settings", "name", "warning"),
    [
        ({"packing": "on"}, "mamba", "train.packing: this architecture cannot keep packed rows apart"),
        ({"packing": "on", "neftune": 5.0}, "llama", "train.packing: NEFTune's noise goes by the length of a row"),
        ({"packing": "auto"}, "mamba", None),
        ({"share_prefix": "on"}, "mamba", "train.share_prefix: this architecture cannot share the beginning of rows"),
        (
            {"share_prefix": "on", "neftune": 5.0},
            "llama",
            "train.share_prefix: with dropout or NEFTune each row needs noise of its own",
        ),
        ({"share_prefix": "auto", "neftune": 5.0}, "llama", None),
    ],
)
def test_what_is_asked_for_in_vain_is_said(settings: dict[str, Any], name: str, warning: str | None) -> None:
    settings = {"packing": "off", "share_prefix": "off"} | settings
    found, warnings = chosen(samples(8, beginning=100, longest=400), recipe(**settings), name)
    assert (found.pack, found.prefix) == (None, [])
    assert warnings == ([] if warning is None else [warning])


def test_dropout_keeps_rows_whole() -> None:
    rows = samples(8, beginning=100)
    found, _ = chosen(rows, recipe(LoraRecipe(dropout=0.1)))
    assert found.prefix == []
    found, _ = chosen(rows, recipe())
    assert len(found.prefix) == 99  # and the last one begins what is left of each row
    assert [len(sample.tokens) for sample in found.samples] == [len(sample.tokens) - 99 for sample in rows]


@pytest.mark.parametrize("beginning", [0, 10, 50])
def test_a_short_beginning_is_not_worth_it(beginning: int) -> None:
    found, warnings = chosen(samples(8, beginning=beginning), recipe())
    assert (found.prefix, warnings) == ([], [])


LEVERS = {
    "plain": {"packing": "off", "share_prefix": "off"},
    "packed": {"packing": "on", "share_prefix": "off"},
    "shared": {"packing": "off", "share_prefix": "on"},
}


def trained(tiny: Path, out: Path, lever: str, stop: Any = lambda: None, **settings: Any) -> dict[str, np.ndarray]:
    rows = samples(10, beginning=6, longest=150)
    lora = LoraRecipe(rank=4, method=settings.pop("method", "lora"), dropout=settings.pop("dropout", 0.0))
    wanted = recipe(lora, iters=4, batch_size=5, learning_rate=1e-3, eval_every=2, **LEVERS[lever], **settings)
    result = train(model.load(tiny), rows, rows[:3], wanted, out, stop=stop)
    found = mx.load(str(out / "adapter" / "adapters.safetensors"))
    assert isinstance(found, dict) and result.best_valid_loss is not None
    return {name: np.array(value) for name, value in found.items()} | {"loss": np.array(result.best_valid_loss)}


@pytest.mark.parametrize(
    "settings",
    [{}, {"grad_accumulation_steps": 2, "grad_checkpoint": True}, {"method": "dora"}, {"method": "full"}],
    ids=str,
)
def test_every_layout_trains_the_same_adapter(tiny: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    rate = {"optimizer": "sgd"}  # an optimizer that divides by the gradient makes rounding large
    plain, *others = (trained(tiny, tmp_path / lever, lever, **rate, **settings) for lever in LEVERS)
    for other in others:
        assert other.keys() == plain.keys()
        assert all(np.allclose(other[name], plain[name], atol=1e-6) for name in plain)


def test_the_levers_are_pulled(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    monkeypatch.setattr(packing.Segments, "update_and_fetch", lambda self, *kv: used.append("packed") or kv)
    whole = prefix.Prefix.update_and_fetch
    monkeypatch.setattr(prefix.Prefix, "update_and_fetch", lambda *kv: used.append("shared") or whole(*kv))
    for lever in LEVERS:
        used.clear()
        trained(tiny, tmp_path / lever, lever)
        assert set(used) == {lever} - {"plain"}


@pytest.mark.parametrize("lever", LEVERS)
@pytest.mark.parametrize("settings", [{}, {"dropout": 0.1, "grad_accumulation_steps": 2}], ids=str)
def test_a_stopped_run_ends_with_the_same_bits(
    tiny: Path, tmp_path: Path, lever: str, settings: dict[str, Any]
) -> None:
    whole = trained(tiny, tmp_path / "whole", lever, **settings)
    stops = iter([None, signal.SIGTERM])
    with pytest.raises(Interrupted):
        trained(tiny, tmp_path / "stopped", lever, stop=lambda: next(stops), **settings)
    again = trained(tiny, tmp_path / "stopped", lever, **settings)
    assert all(np.array_equal(again[name], whole[name]) for name in whole)


@pytest.mark.slow
@pytest.mark.skipif(machine.facts().compiler is None, reason="needs a C++ compiler, as mx.compile on a CPU does")
@pytest.mark.parametrize("lever", LEVERS)
def test_compiled_layouts_train_the_same_adapter(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lever: str
) -> None:
    """What Metal and CUDA do, on this device."""
    plain = trained(tiny, tmp_path / "plain", "plain", optimizer="sgd")
    monkeypatch.setattr(machine, "batch_parts", lambda device, cores: 1)
    monkeypatch.setattr(machine, "compute_policy", lambda **_: replace(METAL, float32=True, expand=True))
    mx.enable_compile()
    try:
        compiled = trained(tiny, tmp_path / "compiled", lever, optimizer="sgd")
    finally:
        mx.disable_compile()
    assert all(np.allclose(compiled[name], plain[name], atol=1e-5) for name in plain)
