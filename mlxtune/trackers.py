"""Experiment trackers: the log of a run sent to tensorboard, wandb, mlflow or trackio. Knows lines, not networks.

A run that goes on after a stop goes on in the trackers too: `trackers.json` keeps what each calls it.
To add one: a function `(library, run, recipe, known) -> Tracker` and a line in `OPENERS`.
"""

import contextlib
import importlib
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from mlxtune.errors import RecipeError, StorageError
from mlxtune.recipe import Recipe, dump, to_dict
from mlxtune.rundir import RunDir, read_json, write_json
from mlxtune.steplog import StepLog

PROJECT = "mlxtune"
SILENCED = {"MLFLOW_DISABLE_TELEMETRY": "true", "WANDB_ERROR_REPORTING": "false"}  # read when they are imported


@dataclass(frozen=True, slots=True, kw_only=True)
class Tracker:
    """Where figures go: `log(figures, step)` from the step `first` on, and `close(exit_code)` at the end.

    `name` is what finds the tracker's run again.
    """

    log: Callable[[dict[str, float], int], Any]
    close: Callable[[int], Any]
    name: str | None = None
    first: int = 0


def _tensorboard(library: Any, run: RunDir, recipe: Recipe, known: str | None) -> Tracker:
    # its SummaryWriter writes in a thread, which a full disk ends: the training would then wait for it for ever
    writer = importlib.import_module("tensorboardX.event_file_writer")
    proto = importlib.import_module("tensorboardX.proto.event_pb2")
    summary = importlib.import_module("tensorboardX.summary")
    folder = run.root / "tensorboard"
    new = not folder.exists()
    folder.mkdir(exist_ok=True)
    events = writer.EventsWriter(str(folder / "events"), f".{os.getpid()}")
    begun = False

    def write(step: int, **what: Any) -> None:
        events.write_event(proto.Event(wall_time=time.time(), step=step, **what))

    def log(figures: dict[str, float], step: int) -> None:
        nonlocal begun
        if not begun:  # an earlier process may have died behind its last checkpoint: what it wrote from here on goes
            write(step, session_log=proto.SessionLog(status=proto.SessionLog.START))
            begun = True
        for name, value in figures.items():
            write(step, summary=summary.scalar(name, value))
        events.flush()

    if new:
        write(0, summary=summary.text("recipe", "".join(f"    {line}\n" for line in dump(recipe).splitlines())))
    return Tracker(log=log, close=lambda code: events.close())


def _wandb(library: Any, run: RunDir, recipe: Recipe, known: str | None) -> Tracker:
    started = library.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        name=run.root.name,
        id=known,
        resume="allow" if known else None,
        dir=str(run.root),
        config=to_dict(recipe),
        settings=library.Settings(console="off"),  # or it takes hold of the terminal, and keeps each progress line
    )
    return Tracker(
        log=lambda figures, step: started.log(figures, step=step),
        close=lambda code: started.finish(exit_code=code),
        name=started.id,
        first=started.step if known else 0,
    )


def _mlflow(library: Any, run: RunDir, recipe: Recipe, known: str | None) -> Tracker:
    if not os.environ.get("MLFLOW_EXPERIMENT_NAME") and not os.environ.get("MLFLOW_EXPERIMENT_ID"):
        library.set_experiment(PROJECT)
    name = library.start_run(run_id=known, run_name=run.root.name).info.run_id
    first = 0
    if known is None:
        library.log_params(_flat(to_dict(recipe)))
    else:
        first = 1 + max(
            (each.step for each in library.MlflowClient().get_metric_history(name, "train/loss")), default=0
        )
    return Tracker(
        log=lambda figures, step: library.log_metrics(figures, step=step),
        close=lambda code: library.end_run("FINISHED" if code == 0 else "KILLED" if code > 128 else "FAILED"),
        name=name,
        first=first,
    )


def _trackio(library: Any, run: RunDir, recipe: Recipe, known: str | None) -> Tracker:
    name = known or f"{run.root.name}-{secrets.token_hex(2)}"  # it finds runs by name, and folders may be named alike
    started = library.init(project=PROJECT, name=name, config=to_dict(recipe), resume="allow" if known else "never")
    return Tracker(
        log=lambda figures, step: started.log(figures, step=step),
        close=lambda code: library.finish(),
        name=name,
        first=getattr(started, "_next_step", 0) if known else 0,  # there is no public way to ask
    )


# tracker: the module that it needs, and what opens it
OPENERS: dict[str, tuple[str, Callable[[Any, RunDir, Recipe, str | None], Tracker]]] = {
    "tensorboard": ("tensorboardX", _tensorboard),
    "wandb": ("wandb", _wandb),
    "mlflow": ("mlflow", _mlflow),
    "trackio": ("trackio", _trackio),
}


def _library(name: str) -> Any:
    for variable, value in SILENCED.items():
        os.environ.setdefault(variable, value)
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
def opened(
    names: list[str], run: RunDir, recipe: Recipe, on_warning: Callable[[str], None] = lambda text: None
) -> Iterator[Callable[[StepLog], None]]:
    """A function that sends a line of the log to all trackers; they are closed when the block ends, however it does.

    Raises StorageError where one doesn't open. Once there are checkpoints, and whenever one fails later, the training
    matters more: `on_warning` is told once, and the tracker gets no more.
    """
    file = run.root / "trackers.json"
    known = read_json(file) if file.exists() else {}
    trackers: dict[str, Tracker] = {}
    failed: set[str] = set()
    code = 0

    def attempt(name: str, action: Callable[..., Any], *arguments: Any) -> None:
        try:
            with _chatter_to_stderr():
                action(*arguments)
        except Exception as error:
            if name not in failed:
                failed.add(name)
                on_warning(f"{name} failed and gets no more: {_reason(error)}; {run.log} has everything")

    def send(line: StepLog) -> None:
        for name, tracker in trackers.items():
            if name not in failed and line.step >= tracker.first:
                attempt(name, tracker.log, figures(line), line.step)

    try:
        for name in names:
            library = _library(name)
            try:
                with _chatter_to_stderr():
                    trackers[name] = OPENERS[name][1](library, run, recipe, known.get(name))
            except Exception as error:
                if not run.checkpoints.exists():
                    raise StorageError(f"{name} does not open: {_reason(error)}", where="train.report_to") from error
                on_warning(f"{name} does not open and gets nothing: {_reason(error)}; {run.log} has everything")
        found = {name: tracker.name for name, tracker in trackers.items() if tracker.name is not None}
        if not found.items() <= known.items():
            write_json(file, known | found)
        yield send
    except BaseException as error:
        code = getattr(error, "exit_code", 1 if isinstance(error, Exception) else 130)
        raise
    finally:
        for name, tracker in trackers.items():
            attempt(name, tracker.close, code)


def _chatter_to_stderr() -> contextlib.AbstractContextManager[Any]:
    return contextlib.redirect_stdout(sys.stderr)


def _reason(error: Exception) -> str:
    """An error as part of a line: libraries raise whole pages."""
    return (" ".join(str(error).split()) or type(error).__name__)[:200]


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


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    """The settings as `section.name`; what a user named in them stays in the value."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= {f"{name}.{inner}": each for inner, each in value.items()} if isinstance(value, dict) else {name: value}
    return flat
