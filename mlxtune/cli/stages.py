"""Shows a pipeline at work: a line a stage, live progress, signals that let training save. For `run` and `train`."""

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlxtune import machine
from mlxtune.cli import display, signals
from mlxtune.errors import Interrupted
from mlxtune.report import words

if TYPE_CHECKING:
    from mlxtune.recipe import Recipe
    from mlxtune.stages import Event

WIDTH = 15


def run_stages(recipe: "Recipe", out: Path, stages: tuple[str, ...] | None = None) -> dict[str, Any]:
    """Runs a recipe's stages with progress on stderr; returns the report. A worker that only helps ends in silence."""
    from mlxtune import pipeline
    from mlxtune.stages import STAGES

    helps = bool(machine.worker_rank(os.environ))
    with signals.caught() as caught:
        shown = _Shown(caught, silent=helps)
        try:
            report = pipeline.run(recipe, out, stages=stages or STAGES, on_event=shown.event, stop=caught.stop)
        finally:
            shown.close()
    if helps:
        raise click.exceptions.Exit
    return report


class _Shown:
    """The progress line of the stage at work."""

    def __init__(self, caught: signals.Signals, silent: bool = False):
        self.caught, self.silent = caught, silent
        self.bar: display.Progress | None = None

    def event(self, event: "Event") -> None:
        if event.kind == "started":
            self.caught.saving = event.stage == "train"
        elif self.silent:
            self.caught.saving &= event.kind not in ("finished", "skipped")
        elif event.kind == "progress":
            bar = self.bar
            if bar is None or (bar.label, bar.total) != (event.stage, event.total) or event.done < bar.done:
                bar = self.bar = display.Progress(event.stage, event.total)
            bar.update(event.done, event.detail)
        elif event.kind == "validated":
            self.close()
            width = shutil.get_terminal_size().columns - 1
            display.note(click.style(f"   {display.harmless(event.detail)}"[:width], dim=True))
        elif event.kind == "warning":
            self.close()
            display.warn(f"{event.stage}: {event.detail}")
        else:
            self.close()
            self.caught.saving = False
            self.line(event)
            if self.caught.received is not None:  # it came too late for a checkpoint: the stage is done
                raise Interrupted(
                    f"stopped after {event.stage}", signal_number=self.caught.received, hint="run it again to go on"
                )

    def line(self, event: "Event") -> None:
        label = click.style(event.stage.ljust(WIDTH), bold=event.kind == "finished", dim=event.kind == "skipped")
        mark = click.style("✓", fg="green") if event.kind == "finished" else click.style("·", dim=True)
        took = click.style(f"  {words.duration(event.seconds)}", dim=True) if event.seconds >= 1 else ""
        text = event.detail if event.kind == "finished" else click.style(f"skipped: {event.detail}", dim=True)
        display.note(f" {mark} {label}{text}{took}")

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
