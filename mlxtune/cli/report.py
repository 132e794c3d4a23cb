"""`mlxtune report`: the report of a run, rebuilt from its files, or two runs side by side. Knows what to show."""

import shutil
import sys
import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlxtune.cli import display
from mlxtune.errors import InputError

if TYPE_CHECKING:
    from mlxtune.rundir import RunDir

SHOWN = 60  # characters of an answer that changed


def show(report: dict[str, Any]) -> None:
    """Prints the short table of a report, its verdict, and what to open and type next."""
    from mlxtune.report import words

    found = words.metrics(report)
    share = next((metric for metric in ("accuracy", "exact_match") if metric in found), None)
    shown = [metric for metric in ("loss", share) if metric in found]
    display.table(["", *words.COLUMNS], words.table(report, shown))
    display.result()
    if report["comparison"] is not None:
        display.table(*words.comparison_table(report["comparison"]))
        display.result()
    display.result(display.harmless(report["verdict"]))
    for each in report["reasons"]:
        display.result(display.harmless(f"  {each}"))
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
@click.argument("runs", nargs=-1, required=True, metavar="RUN [OTHER]", type=click.Path(path_type=Path))
@click.option("--open", "opens", is_flag=True, help="Open the page in a browser.")
@click.option("--json", "as_json", is_flag=True, help="Print the whole report as JSON.")
def command(runs: tuple[Path, ...], opens: bool, as_json: bool) -> None:
    """Rebuild report.json, report.md and report.html of a run folder, and show the result.

    Reads only what the run left there, so it is quick and gives the same pages each time. Of two runs it prints what
    differs, and writes nothing: scores, recipes, and the answers that became right or wrong.

    \b
    Example:
      mlxtune report runs/quickstart --open
      mlxtune report runs/quickstart runs/rank8
    """
    from mlxtune.report import build
    from mlxtune.rundir import RunDir

    if len(runs) > 2:
        raise InputError(f"are {len(runs)} runs", where="RUN", hint="give one or two")
    if len(runs) == 2:
        if opens:
            raise InputError("is of use with one run only", where="--open", hint="leave it out")
        _show_both(RunDir(runs[0]), RunDir(runs[1]), as_json=as_json)
        return
    report = build.write(RunDir(runs[0]))
    if as_json:
        display.result_json(report)
    else:
        show(report)
    if opens and not webbrowser.open(RunDir(runs[0]).report("html").resolve().as_uri()):
        display.warn("no browser could be opened")


def _show_both(first: "RunDir", second: "RunDir", *, as_json: bool) -> None:
    """Prints two runs side by side."""
    from mlxtune.comparison.versus import versus
    from mlxtune.report import words

    found = versus(first, second)
    if as_json:
        display.result_json(found.to_dict())
        return
    rows = []
    for column, by_metric in found.scores.items():
        for metric, scores in by_metric.items():
            figures = ["-" if score is None else words.figure(score) for score in scores]
            rows.append([f"{column} {words.metric_name(metric)}", *figures])
    display.table(["", *found.runs], rows)
    display.result()
    if found.difference is not None and found.metric is not None:
        score = next(each for each in found.scores[found.column or ""][found.metric] if each is not None)
        moved = words.difference_words(found.difference, score)
        display.result(
            f"{words.metric_name(found.metric)} of the {found.column} model, second minus first, "
            f"on {found.common:,} rows that both have: {moved}, p {found.difference['p']:.3g}"
        )
    else:
        display.result("no row is in both: differences between them may come from their rows")
    if found.flips is not None:
        display.result(words.flips_words(found.flips))
        for each in found.flips["examples"]:
            display.result(display.harmless(f"  {each['kind']} {each['where']}: {_answers(each)}"))
    display.result()
    for line in found.recipe:
        display.result(display.harmless(line))
    if not found.recipe:
        display.result("the recipes are the same")


def _answers(example: dict[str, Any]) -> str:
    """`'before' → 'after'`, each short and on one line."""
    from mlxtune.report.words import shorten

    texts = [shorten(" ".join((example[name] or "").split()), SHOWN) for name in ("before", "after")]
    return " → ".join(f"'{text}'" for text in texts)
