"""A report as Markdown: what the HTML page says, without its drawings. Knows the report's value, not files."""

import html
import re
from typing import Any

from mlxtune.report.words import (
    chat_command,
    comparison_table,
    contamination_words,
    coverage_words,
    finding,
    flips_words,
    forgetting_words,
    fuse_facts,
    judged_words,
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
    if report["reasons"]:
        parts.append("\n".join(f"- {_plain(each)}" for each in report["reasons"]))
    if report["missing"]:
        parts += ["## What is missing", "\n".join(f"- {_plain(each)}" for each in report["missing"])]
    parts += _comparison(report["comparison"])
    parts += ["## Before and after", _table(["", "base", "tuned", "fused"], table(report, metrics(report)))]
    parts.append("In parentheses: 95 % intervals over the held-out rows. `tuned` is the base with its adapter.")
    if report["change"] not in (None, report["verdict"]):
        parts.append(_plain(report["change"]))
    parts += _labels(report["tables"])
    parts += _samples(report["samples"])
    parts += _audit(report)
    if report["training"] is not None:
        parts += ["## Training", _facts(training_facts(report))]
    if report["fuse"] is not None:
        parts += ["## What fusing cost", _facts(fuse_facts(report))]
    command = chat_command(report)
    if command is not None:
        parts += ["## How to use it", _fenced(command, "sh")]
    if report["origin"] is not None:
        parts += ["## Where it comes from", _facts(provenance(report))]
    if report["recipe_text"] is not None:
        parts += ["## Recipe", _fenced(report["recipe_text"].rstrip("\n"), "yaml")]
    if report["files"]:
        hashed = "\n".join(f"{digest}  {name}" for name, digest in report["files"].items())
        parts += ["## sha256 of the files", _fenced(hashed)]
    return "\n\n".join(parts) + "\n"


def _comparison(found: dict[str, Any] | None) -> list[str]:
    """The candidates, what was forgotten, what more rows would bring, and the answers that changed."""
    if found is None:
        return []
    parts = [f"## Compared on the same {found['rows']:,} rows", _table(*comparison_table(found))]
    if found["judged"]:
        parts.append(_plain(judged_words(found["judged"])))
    if found["left_out"]:
        parts.append(
            "\n".join(f"- {_plain(name)} was left out: {_plain(why)}" for name, why in found["left_out"].items())
        )
    if found["contamination"] is not None and found["contamination"]["count"]:
        parts.append(contamination_words(found["contamination"]))
    if found["forgetting"] is not None:
        parts.append(_plain(forgetting_words(found["forgetting"])))
    if found["learning_curve"] is not None and found["learning_curve"].get("sentence"):
        parts.append(_plain(found["learning_curve"]["sentence"]))
    for name, title in (("flips", "What changed"), ("flips_since", "What changed since the run before")):
        one = found[name]
        if one is None:
            continue
        parts += [f"## {title}", _plain(flips_words(one))]
        for each in one["examples"]:
            parts.append(f"### {_plain(each['where'])}: {_plain(each['kind'])}")
            texts = [("Prompt", each["prompt"]), ("Expected", each.get("expected"))]
            texts += [(one["from"], each.get("before")), (one["to"], each.get("after"))]
            parts += [f"{_plain(name)}:\n\n{_fenced(text or '')}" for name, text in texts]
    return parts


def _labels(tables: dict[str, Any]) -> list[str]:
    column = next((name for name in ("fused", "tuned", "base") if tables.get(name)), None)
    found = tables[column] if column else {}
    parts = []
    if found.get("classes"):
        rows = [
            [each["label"], *(f"{each[name]:.2f}" for name in ("precision", "recall", "f1")), f"{each['support']:,}"]
            for each in found["classes"]
        ]
        parts += [f"## Label by label, {column} model", _table(["label", "precision", "recall", "F1", "rows"], rows)]
    if found.get("coverage"):
        parts.append(_plain(coverage_words(found["coverage"])))
    return parts


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
        rows = [[finding(each["kind"]), f"{each['count']:,}", each["detail"]] for each in audit["details"]]
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
