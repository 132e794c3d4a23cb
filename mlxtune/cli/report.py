"""`mlxtune report`: the report of a run folder, rebuilt from its files. Knows what to show, not how it is computed."""

import shutil
import sys
from pathlib import Path
from typing import Any

import click

from mlxtune.cli import display


def show(report: dict[str, Any]) -> None:
    """Prints the short table of a report, its verdict, and what to open and type next."""
    from mlxtune.report import words

    found = words.metrics(report)
    share = next((metric for metric in ("accuracy", "exact_match") if metric in found), None)
    shown = [metric for metric in ("loss", share) if metric in found]
    display.table(["", *words.COLUMNS], words.table(report, shown))
    display.result()
    display.result(report["verdict"])
    for each in report["missing"]:
        display.result(f"missing: {each}")
    display.result()
    display.result(f"report  {report['paths']['report']}")
    command = words.chat_command(report)
    if command is not None:
        display.result(f"chat    {command.replace('mlxtune', _program(), 1)}")


def _program() -> str:
    """How to call mlxtune here: by its name where that is found, else as it was called."""
    called = Path(sys.argv[0])
    if shutil.which("mlxtune") or called.name != "mlxtune":
        return "mlxtune"
    return str(called.relative_to(Path.cwd())) if called.is_relative_to(Path.cwd()) else str(called)


@click.command("report")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the whole report as JSON.")
def command(run: Path, as_json: bool) -> None:
    """Rebuild report.json, report.md and report.html of a run folder, and show the result.

    Reads only what the run left there, so it is quick and gives the same pages each time.

    \b
    Example:
      mlxtune report runs/quickstart
    """
    from mlxtune.report import build
    from mlxtune.rundir import RunDir

    report = build.write(RunDir(run))
    if as_json:
        display.result_json(report)
    else:
        show(report)
