"""A report as Markdown: what the HTML page says, without its drawings. Knows the report's value, not files."""

import html
import re
from typing import Any

from mlxtune.report.words import (
    chat_command,
    metrics,
    provenance,
    samples_words,
    table,
    training_facts,
    visible,
)


def render(report: dict[str, Any]) -> str:
    """The page, ending with a line end."""
    parts = ["# Tuning report", f"**{_plain(report['verdict'])}**"]
    if report["missing"]:
        parts += ["## What is missing", "\n".join(f"- {_plain(each)}" for each in report["missing"])]
    parts += ["## Before and after", _table(["", "base", "tuned", "fused"], table(report, metrics(report)))]
    parts.append("In parentheses: 95 % intervals over the held-out rows. `tuned` is the base with its adapter.")
    parts += _samples(report["samples"])
    parts += _audit(report)
    if report["training"] is not None:
        parts += ["## Training", _facts(training_facts(report))]
    command = chat_command(report)
    if command is not None:
        parts += ["## How to use it", _fenced(command, "sh")]
    if report["origin"] is not None:
        parts += ["## Where it comes from", _facts(provenance(report))]
    if report["recipe_text"] is not None:
        parts += ["## Recipe", _fenced(report["recipe_text"].rstrip("\n"), "yaml")]
    return "\n\n".join(parts) + "\n"


def _samples(samples: dict[str, Any] | None) -> list[str]:
    if samples is None:
        return []
    parts = ["## What it answers now", samples_words(samples)]
    for each in samples["shown"]:
        parts.append(f"### {_plain(each['where'])}: {'right' if each['right'] else 'wrong'}")
        answers = [("Prompt", each["prompt"]), ("Expected", each["expected"])]
        if each["base"] is not None:
            answers.append((f"Base ({'right' if each['base_right'] else 'wrong'})", each["base"]))
        answers.append((samples["column"].capitalize(), each["answer"]))
        parts += [f"{name}:\n\n{_fenced(text)}" for name, text in answers]
    return parts


def _audit(report: dict[str, Any]) -> list[str]:
    parts = ["## Data"]
    counts = [f"{count:,} {name}" for name, count in report["rows"].items() if count is not None]
    if counts:
        parts.append(f"Rows: {', '.join(counts)}.")
    audit = report["audit"]
    if audit is not None and audit["details"]:
        rows = [[each["kind"].replace("_", " "), f"{each['count']:,}", each["detail"]] for each in audit["details"]]
        parts.append(_table(["finding", "rows", "detail"], rows))
    elif audit is not None:
        parts.append(f"The audit of {audit['rows']:,} rows found nothing to mend.")
    return parts if len(parts) > 1 else []


def _table(headings: list[str], rows: list[list[str]]) -> str:
    lines = [headings, ["---"] + ["---:"] * (len(headings) - 1), *([_plain(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _facts(facts: list[tuple[str, str]]) -> str:
    return "\n".join(f"- {_plain(name)}: {_plain(text)}" for name, text in facts)


def _plain(text: str) -> str:
    """A text on one line in which nothing is markup."""
    escaped = html.escape(" ".join(visible(text).split()), quote=False)
    return re.sub(r"([\\`*_\[\]|~#])", r"\\\1", escaped)


def _fenced(text: str, language: str = "") -> str:
    """A text as it is, in a fence longer than any run of backticks in it."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{visible(text)}\n{fence}"
