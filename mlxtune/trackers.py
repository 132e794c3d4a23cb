"""Experiment trackers: the log of a run sent to tensorboard, wandb, mlflow or trackio. Knows lines, not networks.

To add one: a function `(run, recipe) -> Tracker` and a line in `OPENERS`.
"""

import contextlib
import importlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from mlxtune.errors import RecipeError
from mlxtune.recipe import Recipe, to_dict
from mlxtune.rundir import RunDir
from mlxtune.steplog import StepLog

PROJECT = "mlxtune"


@dataclass(frozen=True, slots=True)
class Tracker:
    """Where figures go: `log(figures, step)`, and `close()` at the end."""

    log: Callable[[dict[str, float], int], Any]
    close: Callable[[], Any]


def _tensorboard(run: RunDir, recipe: Recipe) -> Tracker:
    writer = _library("tensorboard").SummaryWriter(str(run.root / "tensorboard"))

    def log(figures: dict[str, float], step: int) -> None:
        for name, value in figures.items():
            writer.add_scalar(name, value, step)

    return Tracker(log, writer.close)


def _wandb(run: RunDir, recipe: Recipe) -> Tracker:
    started = _library("wandb").init(project=PROJECT, name=run.root.name, dir=str(run.root), config=to_dict(recipe))
    return Tracker(lambda figures, step: started.log(figures, step=step), started.finish)


def _mlflow(run: RunDir, recipe: Recipe) -> Tracker:
    mlflow = _library("mlflow")
    mlflow.set_experiment(PROJECT)
    mlflow.start_run(run_name=run.root.name)
    mlflow.log_params(_flat(to_dict(recipe)))
    return Tracker(lambda figures, step: mlflow.log_metrics(figures, step=step), mlflow.end_run)


def _trackio(run: RunDir, recipe: Recipe) -> Tracker:
    trackio = _library("trackio")
    trackio.init(project=PROJECT, name=run.root.name, config=to_dict(recipe))
    return Tracker(lambda figures, step: trackio.log(figures, step=step), trackio.finish)


# tracker: the module that it needs, and what opens it
OPENERS: dict[str, tuple[str, Callable[[RunDir, Recipe], Tracker]]] = {
    "tensorboard": ("tensorboardX", _tensorboard),
    "wandb": ("wandb", _wandb),
    "mlflow": ("mlflow", _mlflow),
    "trackio": ("trackio", _trackio),
}


def _library(name: str) -> Any:
    try:
        return importlib.import_module(OPENERS[name][0])
    except ImportError:
        raise RecipeError(
            f"{name} is not installed", where="train.report_to", hint=f"run `pip install 'mlxtune[{name}]'`"
        ) from None


def check(names: list[str]) -> None:
    """Raises RecipeError for a tracker whose library is missing: found before anything is loaded."""
    for name in names:
        _library(name)


@contextlib.contextmanager
def opened(names: list[str], run: RunDir, recipe: Recipe) -> Iterator[Callable[[StepLog], None]]:
    """A function that sends a line of the log to all trackers; they are closed when the block ends, however it does."""
    with contextlib.ExitStack() as stack:
        trackers = []
        for name in names:
            tracker = OPENERS[name][1](run, recipe)
            stack.callback(tracker.close)
            trackers.append(tracker)

        def send(line: StepLog) -> None:
            for tracker in trackers:
                tracker.log(figures(line), line.step)

        yield send


def figures(line: StepLog) -> dict[str, float]:
    """The numbers of a line by name, `train/loss` and the like."""
    names = {
        "train_loss": "train/loss",
        "valid_loss": "valid/loss",
        "anchor_loss": "anchor/loss",
        "learning_rate": "train/learning_rate",
        "tokens_per_second": "train/tokens_per_second",
        "peak_memory_gb": "train/peak_memory_gb",
    }
    values = asdict(line)
    return {told: float(values[name]) for name, told in names.items() if values[name] is not None}


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
