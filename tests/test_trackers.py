"""Trackers: what each library is told, that all are closed, and what is said of one that fails or is missing."""

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mlxtune import pipeline, trackers
from mlxtune.errors import Interrupted, RecipeError, StorageError
from mlxtune.recipe import DataRecipe, Recipe, TrainRecipe
from mlxtune.recipe.settings import TRACKERS
from mlxtune.rundir import RunDir, read_json
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
    """A library that remembers its calls by name, is its own run, and fails where it is told to."""

    id = run_id = "r1"
    step = _next_step = 2

    def __init__(self, *failing: str) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        self.failing = failing
        self.info = self

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append((name, args, kwargs))
            sys.stdout.write(f"chatter of {name}\n")
            if name in self.failing:
                raise OSError(f"{name}: no\n  route")
            return [SimpleNamespace(step=1)] if name == "get_metric_history" else self

        return call

    def named(self, *names: str) -> list[tuple[str, tuple[Any, ...], dict[str, Any]]]:
        return [call for call in self.calls if call[0] in names]


Library = Callable[..., Told]


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    """Puts a `Told` in the place of a tracker's module."""

    def put(module: str, *failing: str) -> Told:
        told = Told(*failing)
        monkeypatch.setitem(sys.modules, module, told)
        return told

    return put


def test_every_tracker_of_the_recipe_can_be_opened() -> None:
    assert tuple(trackers.OPENERS) == TRACKERS


def test_the_figures_of_a_line() -> None:
    assert trackers.figures(LINE) == FIGURES
    assert "valid/loss" not in trackers.figures(QUIET)


LOG = {
    "wandb": ("log", (FIGURES,), {"step": 3}),
    "mlflow": ("log_metrics", (FIGURES,), {"step": 3}),
    "trackio": ("log", (FIGURES,), {"step": 3}),
}
CLOSED: list[tuple[str, BaseException | None, tuple[str, tuple[Any, ...], dict[str, Any]]]] = [
    ("wandb", None, ("finish", (), {"exit_code": 0})),
    ("wandb", KeyError(), ("finish", (), {"exit_code": 1})),
    ("wandb", KeyboardInterrupt(), ("finish", (), {"exit_code": 130})),
    ("mlflow", None, ("end_run", ("FINISHED",), {})),
    ("mlflow", KeyError(), ("end_run", ("FAILED",), {})),
    ("mlflow", Interrupted("stopped", signal_number=15), ("end_run", ("KILLED",), {})),
    ("trackio", None, ("finish", (), {})),
    ("trackio", KeyError(), ("finish", (), {})),
]


@pytest.mark.parametrize(("name", "ending", "close"), CLOSED)
def test_what_a_library_is_told(
    name: str,
    ending: BaseException | None,
    close: Any,
    library: Library,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    told = library(name)
    run = RunDir(tmp_path / "tickets")
    with contextlib.suppress(KeyError, KeyboardInterrupt, Interrupted), trackers.opened([name], run, Recipe()) as send:
        send(LINE)
        if ending is not None:
            raise ending
    assert LOG[name] in told.calls
    assert told.calls[-1] == close
    ((_, _, opened),) = told.named("init", "start_run")
    assert opened.get("name", opened.get("run_name")).startswith("tickets")
    out, err = capsys.readouterr()
    assert out == ""  # which is for results
    assert f"chatter of {close[0]}" in err


@pytest.mark.parametrize("name", LOG)
def test_a_run_goes_on_where_the_tracker_is(name: str, library: Library, tmp_path: Path) -> None:
    told = library(name)
    run = RunDir(tmp_path)
    for _ in range(2):
        with trackers.opened([name], run, Recipe()) as send:
            for step in (1, 2):
                send(StepLog(**{each: getattr(LINE, each) for each in StepLog.__slots__} | {"step": step}))
    steps = [call[2]["step"] for call in told.named("log", "log_metrics")]
    assert steps == [1, 2, 2]  # the second time it has 1 already
    first, second = (call[2] for call in told.named("init", "start_run"))
    (known,) = read_json(tmp_path / "trackers.json").values()
    changed = {key: value for key, value in second.items() if key != "settings" and value != first[key]}
    wanted = {"wandb": {"id": known, "resume": "allow"}, "mlflow": {"run_id": known}, "trackio": {"resume": "allow"}}
    assert changed == wanted[name]
    assert len(told.named("log_params")) == (name == "mlflow")


def test_a_tracker_that_fails_is_told_no_more(library: Library, tmp_path: Path) -> None:
    failing, well = library("wandb", "log", "finish"), library("trackio", "finish")
    said: list[str] = []
    with trackers.opened(["wandb", "trackio"], RunDir(tmp_path), Recipe(), said.append) as send:
        send(LINE)
        send(QUIET)
    assert len(failing.named("log")) == len(failing.named("finish")) == 1
    assert len(well.named("log")) == 2
    everything = f"{tmp_path / 'log.jsonl'} has everything"
    assert said == [
        f"wandb failed and gets no more: log: no route; {everything}",
        f"trackio failed and gets no more: finish: no route; {everything}",
    ]


def test_one_that_does_not_open_ends_a_run_that_has_nothing_yet(library: Library, tmp_path: Path) -> None:
    told, _ = library("wandb"), library("trackio", "init")
    with (
        pytest.raises(StorageError) as caught,
        trackers.opened(["wandb", "trackio"], RunDir(tmp_path), Recipe()),
    ):
        pytest.fail("it was opened")
    assert str(caught.value) == "train.report_to: trackio does not open: init: no route"
    assert told.calls[-1] == ("finish", (), {"exit_code": 3})


def test_one_that_does_not_open_keeps_no_run_from_going_on(library: Library, tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.checkpoints.mkdir()
    library("trackio", "init")
    said: list[str] = []
    with trackers.opened(["trackio"], run, Recipe(), said.append) as send:
        send(LINE)
    assert said == [f"trackio does not open and gets nothing: init: no route; {run.log} has everything"]


def test_a_project_of_the_users_own(library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "theirs")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "theirs")
    wandb, mlflow = library("wandb"), library("mlflow")
    with trackers.opened(["wandb", "mlflow"], RunDir(tmp_path), Recipe()):
        pass
    assert wandb.named("init")[0][2]["project"] == "theirs"
    assert not mlflow.named("set_experiment")


def test_a_training_outlives_its_tracker(library: Library, tmp_path: Path) -> None:
    told = library("wandb", "log", "finish")
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(f'{{"prompt": "number {row}", "completion": "{row * row}"}}\n' for row in range(12)))
    recipe = Recipe(
        model="tiny", data=DataRecipe(path=str(data)), train=TrainRecipe(iters=2, batch_size=2, report_to=["wandb"])
    )
    events: list[pipeline.Event] = []
    pipeline.run(recipe, tmp_path / "run", stages=pipeline.TRAIN_STAGES, on_event=events.append)
    assert (tmp_path / "run" / "adapter").is_dir()
    assert len(told.named("log")) == 1
    (warning,) = [event.detail for event in events if event.kind == "warning"]
    assert warning.startswith("wandb failed and gets no more: ")


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(RecipeError) as caught:
        trackers.check(["wandb"])
    assert str(caught.value) == "train.report_to: wandb is not installed; run `pip install 'mlxtune[wandb]'`"
