"""What fits: the batch that is chosen, what is refused and what is proposed, for given machines."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mlxtune import fitting, machine, model
from mlxtune.errors import MemoryShort
from mlxtune.memory import Job, Place, Rows
from mlxtune.recipe import LoraRecipe, Recipe, TrainRecipe

FLOAT32 = machine.ComputePolicy(float32=True, expand=True, spread=False, compile=False, pad_multiple=1)
STORED = machine.ComputePolicy(float32=False, expand=False, spread=False, compile=True, pad_multiple=32)
ROWS = Rows(longest=512, supervised=64, count=1000)


@pytest.fixture(scope="module")
def job(tiny: Path) -> Job:
    net, config = model.outline(tiny)
    place = Place(
        usable_bytes=10**9,
        parts=2,
        most_tokens=None,
        attention=(None, 0),
        pad_multiple=1,
        chunk_bytes=2**23,
        policy=FLOAT32,
    )
    return Job(net=net, config=config, rows=ROWS, place=place)


def recipe(lora: LoraRecipe | None = None, **train: Any) -> Recipe:
    return Recipe(lora=lora or LoraRecipe(), train=TrainRecipe(**train))


def with_memory(job: Job, usable: int) -> Job:
    return replace(job, place=replace(job.place, usable_bytes=usable))


def test_the_rows_of_an_update_stay() -> None:
    asked = recipe(batch_size=6, grad_accumulation_steps=2, fit_batch=True)
    assert fitting.batch_sizes(asked) == [12, 6, 4, 3, 2, 1]
    for size in fitting.batch_sizes(asked):
        made = fitting.in_batches(asked, size)
        assert made.train.batch_size == size
        assert fitting.rows_per_update(made) == 12
    assert fitting.in_batches(asked, 6) == replace(asked, train=replace(asked.train, fit_batch=False))


def test_the_largest_batch_that_fits_is_chosen(job: Job) -> None:
    asked = recipe(batch_size=8, fit_batch=True)
    peaks = {size: job.peak(fitting.in_batches(asked, size)).training for size in (8, 4, 2, 1)}
    assert list(peaks.values()) == sorted(peaks.values(), reverse=True)
    for size, peak in peaks.items():
        assert fitting.fitted(with_memory(job, peak), asked) == fitting.in_batches(asked, size)
        assert fitting.chosen(with_memory(job, peak - 1), asked).train.batch_size == max(1, size // 2)


def test_a_fixed_batch_is_kept_or_refused(job: Job) -> None:
    asked = recipe(batch_size=8)
    peak = job.peak(asked).total
    told: list[str] = []
    assert fitting.fitted(with_memory(job, peak), asked, told.append) is asked
    assert told == []
    assert fitting.fitted(with_memory(job, int(peak / 1.2)), asked, told.append) is asked
    (line,) = told
    assert line.endswith("it may not fit")
    with pytest.raises(MemoryShort) as caught:
        fitting.fitted(with_memory(job, int(peak / 1.3)), asked, told.append)
    assert len(told) == 1
    assert caught.value.exit_code == 2
    assert "`--batch-size 4 --grad-accumulation-steps 2` (" in str(caught.value)
    with pytest.raises(MemoryShort, match="; choose a smaller model$"):
        fitting.fitted(with_memory(job, 10**6), asked)


@pytest.mark.parametrize("share", [0.7, 0.4, 0.15, 0.08])
def test_each_proposal_fits(job: Job, share: float) -> None:
    asked = recipe(batch_size=8, max_seq_length=512)
    small = with_memory(job, int(share * job.peak(asked).total))
    found = fitting.changes(small, asked)
    assert found
    for each in found:
        made = fitting.with_settings(asked, each.settings)
        assert fitting.rows_per_update(made) == 8
        length = made.train.max_seq_length
        rows = replace(ROWS, longest=min(512, length))
        peak = replace(small, rows=rows).peak(made).total
        assert peak == each.peak_bytes <= small.place.usable_bytes


def test_what_costs_least_comes_first(job: Job) -> None:
    asked = recipe(batch_size=8, max_seq_length=512)
    found = fitting.changes(with_memory(job, int(0.3 * job.peak(asked).total)), asked)
    assert [sorted(each.settings.keys() - {"train.batch_size", "train.grad_accumulation_steps"}) for each in found] == [
        [],
        ["train.grad_checkpoint"],
        ["train.grad_checkpoint", "train.max_seq_length"],
    ]
    assert found[0].settings == {"train.batch_size": 2, "train.grad_accumulation_steps": 4}


def test_full_tuning_is_told_of_adapters(job: Job) -> None:
    asked = recipe(LoraRecipe(method="full"), batch_size=1)
    found = fitting.changes(with_memory(job, 36_000_000), asked)
    assert found[-1].settings == {"lora.method": "lora", "train.grad_checkpoint": True}


def test_a_four_bit_base_is_proposed_where_it_saves(job: Job, tiny: Path) -> None:
    def proposed(job: Job, asked: Recipe) -> bool:
        return any("quantize.bits" in each.settings for each in fitting.changes(job, asked))

    gpu = replace(job, place=replace(job.place, policy=STORED, parts=1, pad_multiple=32))
    assert not proposed(job, recipe())
    assert proposed(gpu, recipe())
    assert not proposed(gpu, recipe(LoraRecipe(method="full")))
    assert not proposed(replace(gpu, config=gpu.config | {"quantization": {}}), recipe())


def test_settings_as_they_are_typed() -> None:
    settings = {"train.grad_checkpoint": True, "quantize.bits": 4, "lora.method": "lora", "train.batch_size": 2}
    assert fitting.flags(settings) == "--grad-checkpoint --q-bits 4 --fine-tune-type lora --batch-size 2"
