"""The files of a run folder -> one report. Knows what the files mean, not how they were made; never measures."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlxtune.errors import InputError
from mlxtune.report import chart, html, markdown, reading
from mlxtune.report.verdict import BETTER, UNCLEAR, verdict
from mlxtune.report.words import COLUMNS, scores, shorten, visible
from mlxtune.rundir import RunDir, write_json, write_text

SHOWN, SHOWN_WRONG = 8, 3  # sample rows, and how many of them are wrong ones where there are enough
SHOWN_FLIPS, SHOWN_NEAR = 12, 20
OUTCOMES = {"tune": BETTER, "prompt": "enough", "retrieve": "enough", "cannot_tell": UNCLEAR}


def build(run: RunDir) -> dict[str, Any]:
    """The report of a run as one JSON value; what the run does not have (yet) is None or [], and named in `missing`.

    Raises InputError for a folder that holds no run, and for a file whose content is not what its name says.
    """
    check(run)
    origin, training, fuse = reading.origin_of(run), reading.training_of(run), reading.fuse_of(run)
    evaluations = {column: reading.evaluation_of(run, column) for column in COLUMNS}
    predictions = {
        column: reading.predictions_of(run.predictions(column)) if evaluation else []
        for column, evaluation in evaluations.items()
    }
    comparison = _comparison(reading.comparison_of(run))
    report: dict[str, Any] = {
        "outcome": None,
        "verdict": None,
        "reasons": [],
        "change": None,
        **{column: each["scores"] if each else [] for column, each in evaluations.items()},
        "comparison": comparison,
        "tables": {column: each["tables"] for column, each in evaluations.items() if each is not None},
        "cost": {column: each["cost"] for column, each in evaluations.items() if each is not None},
        "training": training,
        "fuse": fuse,
        "paths": {
            "run": str(run.root),
            "report": str(run.report("html")),
            "model": origin["model"]["path"] if origin else None,
            "base": _present(run.base),
            "adapter": _present(run.adapter),
            "fused": _present(run.fused),
        },
        "sizes_bytes": {
            "base": origin["model"]["bytes"] if origin else None,
            "quantized": _weights_bytes(run.base),
            "adapter": _weights_bytes(run.adapter),
            "fused": _weights_bytes(run.fused),
        },
        "rows": {name: reading.row_count(run.data / f"{name}.jsonl") for name in ("train", "valid", "test")},
        "audit": _audit(run),
        "origin": origin,
        "recipe_text": reading.text_of(run.recipe),
        "curve": reading.curve_of(run, training),
        "samples": _samples(predictions),
        "files": reading.hashes(run),
    }
    report["missing"] = _missing(run, report["recipe_text"] or "")
    base, tuned, fused = (scores(report, column) for column in COLUMNS)
    report["outcome"], report["change"] = verdict(base, tuned, fused, fuse, training)
    report["verdict"] = report["change"]
    if comparison is not None:
        told = comparison["verdict"]
        if report["outcome"] == UNCLEAR:  # by intervals that overlap: the comparison's paired test sees more
            report["change"] = None
        report["outcome"] = OUTCOMES.get(told["decision"], UNCLEAR)
        report["verdict"], report["reasons"] = told["sentence"], told["reasons"]
    return report


def check(run: RunDir) -> None:
    """Raises InputError for a folder that holds no run."""
    if not any(each.exists() for each in (run.recipe, run.origin, run.log, run.adapter / "training.json")):
        raise InputError("holds no run", where=run.root, hint="give a folder that `mlxtune run` wrote")


def write(run: RunDir) -> dict[str, Any]:
    """Builds the report and writes `report.json`, `report.md` and `report.html`, each whole. Returns the report."""
    report = build(run)
    written = pages(report)
    write_json(run.report("json"), report)
    for suffix, page in written.items():
        write_text(run.report(suffix), page)
    return report


def pages(report: dict[str, Any]) -> dict[str, str]:
    """The pages of a report by their suffix."""
    return {"md": markdown.render(report), "html": html.render(report)}


def loss_picture(run: RunDir) -> str:
    """The losses in the log of a run, finished or not, as an SVG file; empty before the first one."""
    training = reading.training_of(run)
    curve = reading.curve_of(run, training)
    measured = [each for each in curve if each["valid_loss"] is not None]
    best = (
        training["best_step"]
        if training
        else min(measured, key=lambda each: each["valid_loss"], default={}).get("step")
    )
    drawing = chart.loss_curve(curve, best)
    return chart.picture(drawing) if drawing else ""


def _comparison(found: dict[str, Any] | None) -> dict[str, Any] | None:
    """A comparison whose texts of models and data are cut and made visible."""
    if found is None:
        return None
    near = found.get("contamination")
    if near is not None:
        near = {**near, "near": near["near"][:SHOWN_NEAR]}
    flips = {name: _flips(found.get(name)) for name in ("flips", "flips_since")}
    missing: dict[str, Any] = dict.fromkeys(("forgetting", "learning_curve", "judged", "left_out"))
    return {**missing, **found, **flips, "contamination": near}


def _flips(found: dict[str, Any] | None) -> dict[str, Any] | None:
    if found is None:
        return None
    examples = [
        {**each, **{name: _cut(each.get(name)) for name in ("where", "prompt", "expected", "before", "after")}}
        for each in found["examples"][:SHOWN_FLIPS]
    ]
    return {**found, "examples": examples}


def _audit(run: RunDir) -> dict[str, Any] | None:
    found = reading.audit_of(run)
    if found is None:
        return None
    findings: dict[str, int] = {}
    details = [{name: each[name] for name in reading.FINDING} for each in found["findings"]]
    for each in details:
        findings[each["kind"]] = findings.get(each["kind"], 0) + each["count"]
    return {"rows": found["rows"], "findings": findings, "details": details}


def _present(folder: Path) -> str | None:
    return str(folder) if folder.is_dir() else None


def _weights_bytes(folder: Path) -> int | None:
    """Bytes of a folder's weight files, as `origin.json` counts them: a tokenizer would blur the comparison."""
    if not folder.is_dir():
        return None
    return sum(file.stat().st_size for file in folder.glob("*.safetensors") if file.is_file())


def _samples(predictions: dict[str, list[dict[str, Any]]]) -> dict[str, Any] | None:
    """A few answered rows of the fused model, else of the tuned one, and how many rows changed sides.

    Rows are taken evenly through the file, wrong and right ones apart, so that nobody picks the pretty ones.
    """
    column = "fused" if predictions["fused"] else "tuned"
    rows = [each for each in predictions[column] if each.get("answer") is not None]
    if not rows:
        return None
    before = {(each["where"], each["prompt"]): each for each in predictions["base"]}
    pairs = [(each, before.get((each["where"], each["prompt"]))) for each in rows]
    wrong = [index for index, each in enumerate(rows) if not is_right(each)]
    right = [index for index, each in enumerate(rows) if is_right(each)]
    shown_wrong = min(len(wrong), max(SHOWN_WRONG, SHOWN - len(right)))
    shown = sorted([*_evenly(wrong, shown_wrong), *_evenly(right, SHOWN - shown_wrong)])
    compared = [(is_right(now), is_right(then)) for now, then in pairs if then is not None]
    return {
        "column": column,
        "measure": "label" if any(each.get("right") is not None for each in rows) else "exact match",
        "rows": len(rows),
        "wrong": len(wrong),
        "newly_right": sum(now and not then for now, then in compared) if compared else None,
        "newly_wrong": sum(then and not now for now, then in compared) if compared else None,
        "shown": [_sample(*pairs[index]) for index in shown],
    }


def is_right(prediction: dict[str, Any]) -> bool:
    """By its label where the evaluation compared labels (`right`), else by the exact text."""
    right = prediction.get("right")
    return bool(prediction.get("exact") if right is None else right)


def _sample(now: dict[str, Any], then: dict[str, Any] | None) -> dict[str, Any]:
    return {
        "where": visible(now["where"]),
        "prompt": shorten(visible(now["prompt"])),
        "expected": _cut(now.get("expected")) or "",
        "base": (_cut(then.get("answer")) or "") if then else None,
        "answer": _cut(now["answer"]),
        "base_right": is_right(then) if then else None,
        "right": is_right(now),
    }


def _cut(text: str | None) -> str | None:
    return None if text is None else shorten(visible(text).strip())


def _evenly(indices: Sequence[int], count: int) -> list[int]:
    """Up to `count` of them, from the first on at equal distances."""
    count = min(count, len(indices))
    return [indices[place * len(indices) // count] for place in range(count)]


def _missing(run: RunDir, recipe: str) -> list[str]:
    """What a finished run would have and this one has not."""
    names = {"base": "the base model", "tuned": "the tuned model", "fused": "the fused model"}
    compares = re.search(r"^compare:[ \t]*$", recipe, re.MULTILINE) is not None
    pieces = [
        (run.recipe, "the recipe"),
        (run.origin, "where the model and the data come from"),
        (run.data / "audit.json", "the data's audit"),
        (run.log, "the training log"),
        (run.adapter, "the trained adapter"),
        (run.fused, "the fused model"),
        *((run.evaluation(column), f"the evaluation of {names[column]}") for column in COLUMNS),
        *([(run.compare, "the comparison with prompts and retrieval")] if compares else []),
    ]
    return [f"{words} ({path.relative_to(run.root)})" for path, words in pieces if not path.exists()]
