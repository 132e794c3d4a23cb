"""The parts of a page that a comparison and labels bring: candidates, classes, flips. Knows their values, not files."""

from typing import Any

from mlxtune.report import chart, plots, words
from mlxtune.report.markup import bullets, cell, facts, mark, note, pair, row, section, table, text
from mlxtune.report.markup import words as shown
from mlxtune.report.score import Score

MOST_CLASSES = 100  # in the table


def comparison(report: dict[str, Any]) -> str:
    """All candidates on the same rows, and the rest of their scores."""
    found = report["comparison"]
    if found is None:
        return ""
    headings, rows = words.comparison_table(found)
    body = []
    for each, (name, *cells) in zip(found["candidates"], rows, strict=True):
        about = f"<span>{text(each['description'])}</span>" if each.get("description") else ""
        tuned = ' class="tuned"' if each["kind"] == "tuned" else ""
        body.append(f"<tr{tuned}><td><b>{text(name)}</b>{about}</td>{''.join(cell(words) for words in cells)}</tr>")
    against = next((each["difference"]["against"] for each in found["candidates"] if each.get("difference")), None)
    told = "Below each figure: its 95 % interval. "
    if against is not None:
        told += f"Difference: from {against.replace('_', ' ')}, the best candidate that was not tuned, "
        told += "in points where the score is a share; p is adjusted for the number of comparisons (Holm)."
    extra = f"<p>{text(words.judged_words(found['judged']))}</p>" if found["judged"] else ""
    extra += bullets(
        [f"{name.replace('_', ' ')} was left out: {why}" for name, why in (found["left_out"] or {}).items()]
    )
    return section(
        f"Compared on the same {found['rows']:,} rows",
        table(headings, body, "wide")
        + note(told)
        + extra
        + _other_scores(found)
        + _contamination(found["contamination"]),
    )


def _other_scores(found: dict[str, Any]) -> str:
    names = [each["name"].replace("_", " ") for each in found["candidates"]]
    by_candidate = [{each["metric"]: Score(**each) for each in one["scores"]} for one in found["candidates"]]
    every = dict.fromkeys(metric for scores in by_candidate for metric in scores)
    rows = [
        row([words.metric_name(metric), *(words.figure(s[metric]) if metric in s else "-" for s in by_candidate)])
        for metric in every
        if metric != found["metric"]
    ]
    if not rows:
        return ""
    return f"<details><summary>All other scores</summary>\n{table(['', *names], rows)}</details>"


def _contamination(found: dict[str, Any] | None) -> str:
    if found is None or not found["count"]:
        return ""
    lines = [f"{each['test']} is like {each['train']} ({each['similarity']:.2f})" for each in found["near"]]
    without = []
    for each in found["without"]:
        figures = [f"{words.metric_name(s['metric'])} {words.figure(Score(**s))}" for s in each["scores"]]
        without.append(f"{each['name'].replace('_', ' ')} without them: {', '.join(figures)}")
    return (
        f"<p>{text(words.contamination_words(found))}</p>"
        f"{bullets(without)}<details><summary>These rows</summary>{bullets(lines)}</details>"
    )


def charts(report: dict[str, Any]) -> str:
    """Every drawing that the report has something for, in a grid."""
    best = report["training"]["best_step"] if report["training"] else None
    columns, metric = shares(report)
    column = labelled(report)
    tables: dict[str, Any] = report["tables"][column] if column else {}
    calibration = tables.get("calibration")
    forgetting = (report["comparison"] or {}).get("forgetting")
    learning = (report["comparison"] or {}).get("learning_curve")
    drawn = section("Loss while training", chart.loss_curve(report["curve"], best))
    drawn += section(words.metric_name(metric).capitalize(), chart.bars(columns)) if metric else ""
    if calibration:
        told = note("Bars: the share of right labels among rows of a confidence; numbers: how many rows there are.")
        drawing = plots.reliability(calibration["bins"], calibration["ece"])
        drawn += section("Does it know when it is right?", drawing + told if drawing else "")
    if forgetting:
        told = note(words.forgetting_words(forgetting))
        drawn += section("Learned and forgotten", plots.forgetting(words.forgetting_rows(report)) + told)
    if learning:
        drawing = plots.learning_curve(words.metric_name(learning["metric"]), learning["points"], learning.get("fit"))
        drawn += section("Would more rows help?", drawing + note(learning.get("sentence") or ""))
    return f'<div class="charts">\n{drawn}</div>\n' if drawn else ""


def shares(report: dict[str, Any]) -> tuple[list[tuple[str, Score]], str | None]:
    """What the bars show: the share that the candidates, or base, tuned and fused, are compared by."""
    found = report["comparison"]
    if found is not None and found["metric"] is not None:
        named = [(each["name"], Score(**s)) for each in found["candidates"] for s in each["scores"]]
        columns = [(name, each) for name, each in named if each.metric == found["metric"] and each.unit == "share"]
        if columns:
            return columns, str(found["metric"])
    by_column = {column: words.scores(report, column) for column in words.COLUMNS}
    for metric in ("accuracy", "exact_match"):
        columns = [(column, scores[metric]) for column, scores in by_column.items() if metric in scores]
        if columns:
            return columns, metric
    return [], None


def labelled(report: dict[str, Any]) -> str | None:
    """The column whose labels are shown: the last of base, tuned and fused that has tables."""
    return next((name for name in ("fused", "tuned", "base") if report["tables"].get(name)), None)


def classes(report: dict[str, Any]) -> str:
    """Precision, recall and F1 of each label, what was taken for what, and which rows are for a person."""
    column = labelled(report)
    tables = report["tables"][column] if column else {}
    body = ""
    if tables.get("confusion"):
        labels, counts = tables["confusion"]["labels"], tables["confusion"]["counts"]
        if counts and all(len(line) == len(counts[0]) for line in counts) and len(counts) == len(labels):
            drawing = plots.confusion(labels, counts)
            told = "Rows: the expected label; columns: the one that was given. Shades: shares of the row."
            if len(labels) > plots.MOST_CLASSES:
                told += f" Shown are the {plots.MOST_CONFUSED} labels of {len(labels):,} that were confused most."
            body += f'<div class="scroll">{drawing}</div>{note(told)}' if drawing else ""
    if tables.get("coverage"):
        body += f"<p>{text(words.coverage_words(tables['coverage']))}</p>"
    if tables.get("classes"):
        rows = [
            row(
                [
                    each["label"],
                    *(f"{each[name]:.2f}" for name in ("precision", "recall", "f1")),
                    f"{each['support']:,}",
                ]
            )
            for each in tables["classes"][:MOST_CLASSES]
        ]
        each_label = table(["label", "precision", "recall", "F1", "rows"], rows)
        body += f"<details{' open' if len(rows) <= 12 else ''}><summary>Each label</summary>\n{each_label}</details>"
    return section(f"Label by label, {column} model", body, "long")


def flips(report: dict[str, Any]) -> str:
    """Rows that a candidate answers right and another wrong, their answers side by side."""
    found = report["comparison"] or {}
    parts = []
    for name, title in (("flips", "What changed"), ("flips_since", "What changed since the run before")):
        one = found.get(name)
        if one is not None:
            examples = "".join(_flip(each, one) for each in one["examples"])
            parts.append(section(title, f"<p>{text(words.flips_words(one))}</p>\n{examples}", "long"))
    return "".join(parts)


def _flip(each: dict[str, Any], one: dict[str, Any]) -> str:
    before, after = pair(each.get("before") or "", each.get("after") or "")
    fixed = each["kind"] == "fixed"
    return sample(
        each["where"],
        each["prompt"],
        each.get("expected") or "",
        [(one["from"], not fixed, before), (one["to"], fixed, after)],
    )


def sample(where: str, prompt: str, expected: str, answers: list[tuple[str, bool, str]]) -> str:
    """A row with its answers side by side: (name, whether it is right, its answer as HTML) each."""
    columns = f'<div><h4>expected</h4><div class="text">{shown(expected)}</div></div>' + "".join(
        f'<div><h4>{text(name.replace("_", " "))} {mark(right)}</h4><div class="text">{answer}</div></div>'
        for name, right, answer in answers
    )
    return (
        f'<div class="sample"><h3>{text(where)}</h3><div class="text prompt">{shown(prompt)}</div>'
        f'<div class="answers">{columns}</div></div>\n'
    )


def fusing(report: dict[str, Any]) -> str:
    """What fusing and quantizing cost."""
    return section("What fusing cost", facts(words.fuse_facts(report)))
