"""`mlxtune data check`: what is wrong with the examples, before anything is trained on them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mlxtune.cli import display

if TYPE_CHECKING:
    from mlxtune.data.audit import Audit, Finding

COLOURS = {"error": "red", "warning": "yellow", "info": "cyan"}
PLACES = 3  # shown of each finding
KINDS = {"near_duplicate": "near-duplicate", "pii": "personal data"}
LABELS = 30  # rows of the label table
LABEL_WIDTH, BAR = 40, 24  # characters


@click.command("check", short_help="what is wrong with the examples")
@click.argument("path", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON value instead of the report.")
@click.option("--strict", is_flag=True, help="Exit with 1 where there are warnings.")
@click.option("--label", metavar="REGEX", help="Its first group, found in an answer, is the row's label.")
@click.option(
    "-c", "--config", type=click.Path(path_type=Path), metavar="RECIPE", help="Read rows as this recipe does."
)
def command(path: str | None, as_json: bool, strict: bool, label: str | None, config: Path | None) -> int:
    """Report malformed rows, duplicates, contradictions, leaks between splits, odd labels and personal data.

    PATH is a JSONL, JSON or CSV file, a folder of {train,valid,test}.jsonl, or `tickets`, the embedded set; without
    it, the data of the recipe. Exit code: 2 with malformed rows, 1 with --strict and warnings, else 0.

    \b
    Examples:
      mlxtune data check tickets
      mlxtune data check my-data/ --strict
      mlxtune data check answers.jsonl --label 'The answer is (\\d+)' --json
    """
    from mlxtune.data.audit import audit
    from mlxtune.data.load import files_of
    from mlxtune.recipe import Recipe, load

    recipe = load(config) if config is not None else Recipe()
    data = recipe.data if path is None else replace(recipe.data, path=path)
    if data.path is None:
        raise click.UsageError("name a file or folder, or a recipe that has data.path")
    files = files_of(data)
    found = audit(files, data, label or recipe.evaluate.label)
    if as_json:
        display.result_json(found.to_dict())
    else:
        # the embedded set lies deep in the package; its name says enough
        show(found, hidden="" if Path(data.path).exists() else f"{files['all'].parent}/")
    if found.has("error"):
        return 2
    return 1 if strict and found.has("warning") else 0


def show(found: Audit, hidden: str = "") -> None:
    """The report for people; `hidden` is left out of places."""
    for file in found.files:
        split = "" if file["split"] == "all" else f"{file['split']}: "
        display.result(f"{split}{file['path'].removeprefix(hidden)}  {display.count(file['rows'], 'row')}")
    for part in ("prompt", "answer"):
        spread = found.stats[f"{part}_characters"]
        if spread:
            display.result(f"{part}s of {spread['min']:,} to {spread['max']:,} characters, median {spread['median']:,}")
    for finding in found.findings:
        show_finding(finding, hidden)
    labels = found.stats.get("labels")
    if labels:
        display.result()
        show_labels(labels)
    display.result()
    display.result(summary(found))


def show_finding(finding: Finding, hidden: str) -> None:
    """One finding: how bad and what, up to three places, and what to do."""
    severity = click.style(f"{finding.severity:<8}", fg=COLOURS[finding.severity], bold=True)
    display.result()
    kind = KINDS.get(finding.kind, finding.kind)
    display.result(f"{severity} {kind}, {display.count(finding.count, 'row')}: {on_one_line(finding.detail)}")
    more = f"and {finding.count - PLACES:,} more" if finding.count > PLACES else ""
    if finding.notes:
        pairs = zip(finding.where[:PLACES], finding.notes[:PLACES], strict=True)
        lines = [f"{where}  {note}" for where, note in pairs]
        lines += [more] if more else []
    else:
        lines = [f"{', '.join(finding.where[:PLACES])} {more}".rstrip()]
    for line in lines:
        display.result(f"         {on_one_line(line.replace(hidden, '') if hidden else line)}")
    display.result(click.style(f"         → {finding.advice}", dim=True))


def show_labels(labels: dict[str, int]) -> None:
    """A table of the labels, the most frequent first, with bars."""
    total, most = sum(labels.values()), max(labels.values())
    rows = [
        [
            on_one_line(label)[:LABEL_WIDTH],
            f"{count:,}",
            f"{count / total:.1%}",
            ("█" * max(1, round(count / most * BAR))).ljust(BAR),
        ]
        for label, count in list(labels.items())[:LABELS]
    ]
    display.table(["label", "rows", "share", ""], rows)
    if len(labels) > LABELS:
        display.result(f"and {display.count(len(labels) - LABELS, 'more label')}")


def on_one_line(text: str) -> str:
    """What stands in a file, harmless to the terminal and without line breaks that could pass for the report's."""
    return display.harmless(text).replace("\n", "\\n")


def summary(found: Audit) -> str:
    """The last line: how many findings of each severity."""
    counts = [
        display.count(sum(finding.severity == severity for finding in found.findings), noun)
        for severity, noun in (("error", "error"), ("warning", "warning"), ("info", "note"))
        if found.has(severity)
    ]
    return f"{display.count(found.rows, 'row')} checked: {', '.join(counts) if counts else 'nothing found'}"
