"""Resume: a run that was stopped, or killed at any step, ends with the bits of the run that never stopped.

The slow tests kill for good, by SIGKILL in a fork of `faults.py`, mostly between two checkpoints.
"""

import hashlib
import json
import random
import signal
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from mlxtune import model
from mlxtune.data.render import Sample
from mlxtune.errors import Interrupted
from mlxtune.recipe import LoraRecipe, Recipe, TrainRecipe
from mlxtune.train import train
from tests.forks import DEAD, Forks, in_memory, started

OPTIMIZERS = ["adam", "adamw", "sgd", "adafactor", "muon"]
METHODS = ["lora", "dora", "full"]
EXTRAS: dict[str, dict[str, Any]] = {
    "dropout": {},
    "accumulation": {"grad_accumulation_steps": 2},
    "neftune": {"neftune": 5.0},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "adamw": {"weight_decay": 0.1},  # else it is adam
    "sgd": {"optimizer_options": {"momentum": 0.9}},  # else it has nothing to remember
}
UPDATES, SAVE_EVERY, DEATHS = 14, 3, 10
COURSE = {"iters": UPDATES, "eval_every": 2, "report_every": 1, "save_every": SAVE_EVERY}


def sample(number: int, length: int, learned: int) -> Sample:
    """A row of `length` tokens whose last `learned` are supervised; its tokens follow from its number."""
    tokens = [(7 * number + 3 * place) % 900 + 10 for place in range(length)]
    trained = [place >= length - learned for place in range(length)]
    return Sample(f"rows.jsonl:{number + 1}", tokens, trained, length - learned, "x")


SAMPLES = [sample(number, 8 + 5 * (number % 4), 2 + number % 6) for number in range(11)]
VALID = [sample(number, 9 + number % 3, 3) for number in range(5)]
UNRELATED = [sample(number, 9 + number % 3, 3) for number in range(20, 25)]


@pytest.fixture
def scratch() -> Iterator[Path]:
    yield from in_memory()


def recipe(optimizer: str, method: str, extras: list[str], **settings: Any) -> Recipe:
    """A run whose loss on `VALID` falls to the end, so that its adapter is that of the last step."""
    rate = {"sgd": 0.05, "muon": 5e-3}.get(optimizer, 2e-3) / (20 if method == "full" else 1)
    named: dict[str, Any] = {"optimizer": optimizer, "learning_rate": rate, "batch_size": 4, "show_answer": False}
    for extra in extras:
        named |= EXTRAS[extra]
    lora = LoraRecipe(method=method, rank=4, dropout=0.2 if "dropout" in extras else 0.0)
    return Recipe(seed=3, lora=lora, train=TrainRecipe(**(named | OPTIONS.get(optimizer, {}) | settings)))


def end(folder: Path) -> tuple[str, list[tuple[int, float, float | None]]]:
    """What must be equal: the sha256 of the adapter; step, training and validation loss of each line of the log."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    adapter = (folder / "adapter" / "adapters.safetensors").read_bytes()
    return hashlib.sha256(adapter).hexdigest(), [(x["step"], x["train_loss"], x["valid_loss"]) for x in lines]


# --- stopped, in this process


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("extra", EXTRAS)
def test_a_stopped_run_ends_with_the_same_bits(
    tiny: Path, scratch: Path, optimizer: str, method: str, extra: str
) -> None:
    wanted = recipe(optimizer, method, [extra], iters=4, eval_every=2, report_every=1)
    train(model.load(tiny), SAMPLES, VALID, wanted, scratch / "whole")
    stops = iter([None, signal.SIGTERM])
    with pytest.raises(Interrupted):
        train(model.load(tiny), SAMPLES, VALID, wanted, scratch / "stopped", stop=lambda: next(stops))
    result = train(model.load(tiny), SAMPLES, VALID, wanted, scratch / "stopped")
    assert (result.resumed_at, result.best_step) == (2, 4)
    assert end(scratch / "stopped") == end(scratch / "whole")


@pytest.mark.parametrize("optimizer", [*OPTIMIZERS, "lion", "plus"])
def test_an_interrupted_run_ends_with_the_same_adapter(tiny: Path, scratch: Path, optimizer: str) -> None:
    """It is stopped between two checkpoints and two lines of the log. `plus` has two optimizers (LoRA+)."""
    settings: dict[str, Any] = {
        "grad_accumulation_steps": 2,
        "batch_size": 2,
        "save_every": 2,
        "iters": 6,
        "eval_every": 4,
    }
    lora = LoraRecipe(rank=4, dropout=0.1, plus=4.0 if optimizer == "plus" else None)
    named = "adamw" if optimizer == "plus" else optimizer
    wanted = Recipe(seed=3, lora=lora, train=TrainRecipe(optimizer=named, learning_rate=5e-3, **settings))
    train(model.load(tiny), SAMPLES, VALID, wanted, scratch / "whole")
    steps: list[int] = []
    with pytest.raises(Interrupted) as stopped:
        train(
            model.load(tiny),
            SAMPLES,
            VALID,
            wanted,
            scratch / "broken",
            on_step=lambda line, _: steps.append(line.step),
            stop=lambda: signal.SIGTERM if len(steps) == 3 else None,
        )
    assert stopped.value.exit_code == 143
    assert steps == [1, 2, 3]
    assert not (scratch / "broken" / "adapter").exists()
    result = train(model.load(tiny), SAMPLES, VALID, wanted, scratch / "broken")
    assert result.resumed_at == 3
    assert end(scratch / "broken") == end(scratch / "whole")


# --- killed, in a process of its own


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    yield from started(tmp_path_factory.mktemp("resume"))


def trained(forks: Forks, base: Path, wanted: Recipe, folder: Path, death: int = 0, valid: list[Sample] = VALID) -> int:
    """Trains in `folder` or goes on there, and dies after update `death`, before it is saved. Returns the exit code."""
    rows = [[asdict(each) for each in samples] for samples in (SAMPLES, valid)]
    settings = [wanted.seed, asdict(wanted.lora), asdict(wanted.train)]
    ended = forks.run("train", folder, [str(base), *rows, *settings, death], watch=False)
    assert ended.code in (0, DEAD), ended.output
    return ended.code


def saved_before(death: int) -> int:
    """The step of the last checkpoint of a run that dies at `death`, or 0."""
    return (death - 1) // SAVE_EVERY * SAVE_EVERY


def told(folder: Path) -> dict[str, Any]:
    """What the run said of itself."""
    result: dict[str, Any] = json.loads((folder / "adapter" / "training.json").read_text())
    return result


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("extra", EXTRAS)
def test_a_killed_run_ends_with_the_same_bits(
    forks: Forks, tiny: Path, scratch: Path, optimizer: str, method: str, extra: str
) -> None:
    """Ten times, each at another random step."""
    wanted = recipe(optimizer, method, [extra], **COURSE)
    assert trained(forks, tiny, wanted, scratch / "whole") == 0
    whole = end(scratch / "whole")
    assert told(scratch / "whole")["best_step"] == UPDATES
    deaths = random.Random(f"{optimizer} {method} {extra}").sample(range(1, UPDATES + 1), DEATHS)
    differing = []
    for death in deaths:
        folder = scratch / f"killed-{death}"
        assert trained(forks, tiny, wanted, folder, death) == DEAD
        assert not (folder / "adapter").exists()
        assert trained(forks, tiny, wanted, folder) == 0
        assert (told(folder)["resumed_at"] or 0) == saved_before(death)
        differing += [death] if end(folder) != whole else []
    assert differing == []


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("method", METHODS)
def test_a_run_killed_again_and_again_ends_with_the_same_bits(
    forks: Forks, tiny: Path, scratch: Path, optimizer: str, method: str
) -> None:
    """With dropout, accumulation and noise at once; checkpoints are no lines of the log."""
    wanted = recipe(optimizer, method, list(EXTRAS), **(COURSE | {"report_every": 5}))
    assert trained(forks, tiny, wanted, scratch / "whole") == 0
    draws = random.Random(f"{optimizer} {method}")
    deaths = [draws.randint(1, 5)]
    while deaths[-1] < UPDATES:
        at = saved_before(deaths[-1])
        deaths.append(draws.randint(at + 1, min(at + 5, UPDATES)))
    for death in deaths:
        assert trained(forks, tiny, wanted, scratch / "killed", death) == DEAD
    assert trained(forks, tiny, wanted, scratch / "killed") == 0
    assert told(scratch / "killed")["resumed_at"] == saved_before(deaths[-1])
    assert end(scratch / "killed") == end(scratch / "whole")


@pytest.mark.slow
@pytest.mark.parametrize(("method", "optimizer", "rate"), [("dora", "adafactor", 6e-3), ("full", "muon", 3e-3)])
def test_the_best_adapter_from_before_the_death_is_kept(
    forks: Forks, tiny: Path, scratch: Path, method: str, optimizer: str, rate: float
) -> None:
    wanted = recipe(optimizer, method, list(EXTRAS), learning_rate=rate, **COURSE)
    assert trained(forks, tiny, wanted, scratch / "whole", valid=UNRELATED) == 0
    assert told(scratch / "whole")["best_step"] == 4
    for death in (7, 11, 13):
        folder = scratch / f"killed-{death}"
        assert trained(forks, tiny, wanted, folder, death, UNRELATED) == DEAD
        assert trained(forks, tiny, wanted, folder, valid=UNRELATED) == 0
        assert told(folder)["resumed_at"] == saved_before(death)
        assert end(folder) == end(scratch / "whole")
