"""Trackers: what each library is told, that all are closed, and that a missing one is found early."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mlxtune import trackers
from mlxtune.errors import RecipeError
from mlxtune.recipe import Recipe, TrainRecipe
from mlxtune.recipe.settings import TRACKERS
from mlxtune.rundir import RunDir
from mlxtune.steplog import StepLog

LINE = StepLog(
    step=3, train_loss=2.5, valid_loss=2.0, learning_rate=1e-3, tokens_per_second=100.0, peak_memory_gb=0.5, answer="x"
)
QUIET = StepLog(
    step=4, train_loss=2.4, valid_loss=None, learning_rate=1e-3, tokens_per_second=100.0, peak_memory_gb=0.5
)
FIGURES = {
    "train/loss": 2.5,
    "valid/loss": 2.0,
    "train/learning_rate": 1e-3,
    "train/tokens_per_second": 100.0,
    "train/peak_memory_gb": 0.5,
}


class Told:
    """A library that remembers its calls by name."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> "Told":
            self.calls.append((name, args, kwargs))
            return self

        return call

    def names(self) -> list[str]:
        return [name for name, _, _ in self.calls]


def test_every_tracker_of_the_recipe_can_be_opened() -> None:
    assert tuple(trackers.OPENERS) == TRACKERS


def test_the_figures_of_a_line() -> None:
    assert trackers.figures(LINE) == FIGURES
    assert "valid/loss" not in trackers.figures(QUIET)


@pytest.mark.parametrize(
    ("name", "module", "log", "close"),
    [
        ("wandb", "wandb", ("log", (FIGURES,), {"step": 3}), "finish"),
        ("mlflow", "mlflow", ("log_metrics", (FIGURES,), {"step": 3}), "end_run"),
        ("trackio", "trackio", ("log", (FIGURES,), {"step": 3}), "finish"),
    ],
)
def test_what_a_library_is_told(
    name: str, module: str, log: Any, close: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = Told()
    monkeypatch.setitem(sys.modules, module, told)
    recipe = Recipe(train=TrainRecipe(report_to=[name]))
    with pytest.raises(KeyError), trackers.opened([name], RunDir(tmp_path / "tickets"), recipe) as send:
        send(LINE)
        raise KeyError
    assert log in told.calls
    assert told.names()[-1] == close  # also where the training failed
    opened = next(kwargs for called, _, kwargs in told.calls if called in ("init", "start_run"))
    assert opened.get("name", opened.get("run_name")) == "tickets"


def test_tensorboard_is_told_each_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = Told()
    monkeypatch.setitem(sys.modules, "tensorboardX", SimpleNamespace(SummaryWriter=lambda folder: told))
    with trackers.opened(["tensorboard"], RunDir(tmp_path), Recipe()) as send:
        send(LINE)
    assert [call for call in told.calls if call[0] == "add_scalar"] == [
        ("add_scalar", (name, value, 3), {}) for name, value in trackers.figures(LINE).items()
    ]
    assert told.names()[-1] == "close"


@pytest.mark.interop
def test_tensorboard_writes_events(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX", reason="needs tensorboardX")
    with trackers.opened(["tensorboard"], RunDir(tmp_path), Recipe()) as send:
        send(LINE)
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"train/loss" in events.read_bytes()


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(RecipeError) as caught:
        trackers.check(["wandb"])
    assert str(caught.value) == "train.report_to: wandb is not installed; run `pip install 'mlxtune[wandb]'`"
