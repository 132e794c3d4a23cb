"""A recipe -> the verbs in order; skips stages that are done. Knows the run folder, not the terminal."""

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mlxtune import compare, evaluate, hub, machine, model, origin, trackers, workers
from mlxtune.data import load
from mlxtune.errors import InputError
from mlxtune.export import card
from mlxtune.optimizer import make_optimizer
from mlxtune.recipe import Recipe
from mlxtune.report import build
from mlxtune.rundir import RunDir
from mlxtune.stages import STAGES, Event, OnEvent, Stages
from mlxtune.train import Stop
from mlxtune.workers import Workers

TRAIN_STAGES = ("audit", "split", "convert", "quantize", "train")


def run(
    recipe: Recipe,
    out: Path,
    *,
    stages: tuple[str, ...] = STAGES,
    on_event: OnEvent = lambda event: None,
    stop: Stop = lambda: None,
) -> dict[str, Any]:
    """Does the `stages` of a recipe in the folder `out` and returns its report. A stage that is done is skipped.

    Of several workers the first does this; the others help it to train, in scratch folders, and return {}.
    Raises OutputError if `out` holds another recipe's run or another process works in it, and what the verbs raise.
    """
    machine.configure(save_memory=recipe.train.grad_checkpoint)
    folder = RunDir(out)
    files = load.files_of(recipe.data)  # a wrong path is found before anything is fetched or made
    trackers.check(recipe.train.report_to)
    make_optimizer(recipe.train)  # a wrong option is found first
    evaluate.check(recipe.evaluate)
    if recipe.compare is not None:
        compare.check(recipe.compare)
    if recipe.train.anchor is not None:
        load.anchor_text(recipe.train.anchor)
    if files.get("all") == Path("-"):
        raise InputError("a run must find its data again", where="-", hint="save it to a file first")
    origin.refuse_other(folder, recipe, files)
    together = workers.join()
    if not together.first:
        return _help(recipe, files, on_event, stop, together)
    source = hub.fetch(recipe.model, recipe.revision or origin.revision(folder), _fetching(on_event))
    model.check(source)
    origin.refuse_changed_model(folder, source)
    new = [each for each in (folder.root, *folder.root.parents) if not each.exists()]
    with folder.lock(), _taken_back(folder, new):
        together.value_from_first("train" in stages and not folder.adapter.exists())
        work = Stages(recipe, folder, source, files, on_event, stop, together)
        for stage in STAGES:
            if stage in stages:
                work.do(stage)
        return reported(folder) if "report" in stages else build.build(folder)


def reported(folder: RunDir) -> dict[str, Any]:
    """Writes the report of a run, finished or not, and the cards of its models; returns the report."""
    report = build.write(folder)
    if folder.adapter.is_dir():
        card.write_adapter(folder)
    if folder.fused.is_dir():
        card.write_fused(folder.fused, folder)
    return report


def _help(recipe: Recipe, files: dict[str, Path], on_event: OnEvent, stop: Stop, together: Workers) -> dict[str, Any]:
    """Trains with the first worker, if it trains at all, and leaves nothing."""
    if not together.value_from_first(None):
        return {}
    source = hub.fetch(recipe.model, recipe.revision)
    model.check(source)
    with tempfile.TemporaryDirectory(prefix="mlxtune-worker-") as scratch:
        work = Stages(recipe, RunDir(Path(scratch)), source, files, on_event, stop, together)
        for stage in TRAIN_STAGES:
            work.do(stage)
    return {}


def _fetching(on_event: OnEvent) -> Callable[[int, int], None]:
    """Tells of a download in whole megabytes."""
    return lambda done, total: on_event(
        Event(kind="progress", stage="fetch (MB)", done=done // 10**6, total=total // 10**6)
    )


@contextlib.contextmanager
def _taken_back(folder: RunDir, new: list[Path]) -> Iterator[None]:
    """Leaves nothing of a run whose input is wrong: the folder would refuse the recipe that mends it.

    `new` are the folders that were not there before, the innermost first. What was trained is never removed.
    """
    begins = not folder.recipe.exists()
    try:
        yield
    except InputError:
        if begins and not folder.checkpoints.exists() and not folder.adapter.exists():
            for each in folder.root.iterdir():
                shutil.rmtree(each) if each.is_dir() else each.unlink()
        raise
    finally:
        if not folder.recipe.exists():
            (folder.root / ".lock").unlink(missing_ok=True)
            for each in new:
                with contextlib.suppress(OSError):
                    each.rmdir()
