"""The files of a run folder -> one report. Knows file names and shapes, not how they were made; never measures."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlxtune.errors import InputError
from mlxtune.report import chart, html, markdown
from mlxtune.report.score import Score
from mlxtune.report.verdict import verdict
from mlxtune.report.words import COLUMNS, scores, shorten, visible
from mlxtune.rundir import RunDir, read_json, write_json, write_text

SHOWN, SHOWN_WRONG = 8, 3  # sample rows, and how many of them are wrong ones where there are enough
CURVE_POINTS = 500
TRAINING_FIELDS = (
    *("steps", "best_step", "best_valid_loss", "first_valid_loss", "seconds", "trained_tokens", "rows", "epochs"),
    *("tokens_per_second", "peak_memory_gb", "trainable_parameters", "parameters"),
)
FINDING_FIELDS = ("kind", "severity", "count", "detail", "advice")
EVALUATION_FIELDS = ("model", "adapter", "n", "scores", "predictions")
PREDICTION_FIELDS = ("where", "prompt", "expected", "answer", "exact")
FUSE_FIELDS = ("kept", "base_loss", "adapter_loss", "fused_loss", "rows", "bits", "layers")
ORIGIN_FIELDS: dict[str, tuple[str, ...]] = {
    "model": ("name", "path", "bytes"),
    "data": ("path", "sha256"),
    "machine": ("system", "device", "device_name", "cores", "memory_bytes"),
    "versions": (),
}


def build(run: RunDir) -> dict[str, Any]:
    """The report of a run as one JSON value; what the run does not have (yet) is None or [], and named in `missing`.

    Raises InputError for a folder that holds no run, and for a file whose content is not what its name says.
    """
    if not any(each.exists() for each in (run.recipe, run.origin, run.log, run.adapter / "training.json")):
        raise InputError("holds no run", where=run.root, hint="give a folder that `mlxtune run` wrote")
    origin = _object(run.origin, tuple(ORIGIN_FIELDS))
    if origin is not None:
        for section, names in ORIGIN_FIELDS.items():
            _check(origin[section], names, run.origin)
    training = _object(run.adapter / "training.json", TRAINING_FIELDS)
    fuse = _object(run.fused / "fuse.json", FUSE_FIELDS)
    evaluations = {column: _evaluation(run.evaluation(column)) for column in COLUMNS}
    quantized = _weights_bytes(run.base)
    report: dict[str, Any] = {
        "outcome": None,
        "verdict": None,
        **{column: evaluation["scores"] if evaluation else [] for column, evaluation in evaluations.items()},
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
            "quantized": quantized,
            "adapter": _weights_bytes(run.adapter),
            "fused": _weights_bytes(run.fused),
        },
        "rows": {name: _row_count(run.data / f"{name}.jsonl") for name in ("train", "valid", "test")},
        "audit": _audit(run.data / "audit.json"),
        "origin": origin,
        "recipe_text": _text(run.recipe),
        "curve": _curve(run.log, training),
        "samples": _samples(evaluations),
        "missing": _missing(run, evaluations),
    }
    base, tuned, fused = (scores(report, column) for column in COLUMNS)
    report["outcome"], report["verdict"] = verdict(base, tuned, fused, fuse, training)
    return report


def write(run: RunDir) -> dict[str, Any]:
    """Builds the report and writes `report.json`, `report.md` and `report.html`, each whole. Returns the report."""
    report = build(run)
    pages = {"md": markdown.render(report), "html": html.render(report)}
    write_json(run.report("json"), report)
    for suffix, page in pages.items():
        write_text(run.report(suffix), page)
    return report


def loss_picture(run: RunDir) -> str:
    """The losses in the log of a run, finished or not, as an SVG file; empty before the first one."""
    training = _object(run.adapter / "training.json", TRAINING_FIELDS)
    curve = _curve(run.log, training)
    measured = [each for each in curve if each["valid_loss"] is not None]
    best = (
        training["best_step"]
        if training
        else min(measured, key=lambda each: each["valid_loss"], default={}).get("step")
    )
    drawing = chart.loss_curve(curve, best)
    return chart.picture(drawing) if drawing else ""


def _object(path: Path, names: Sequence[str]) -> dict[str, Any] | None:
    """The JSON object of a file with these keys at least; None where there is no file."""
    if not path.exists():
        return None
    found = read_json(path)
    return _check(found, names, path)


def _check(found: Any, names: Sequence[str], path: Path) -> dict[str, Any]:
    lacking = [name for name in names if name not in found] if isinstance(found, dict) else list(names)
    if lacking:
        raise InputError(f"lacks `{lacking[0]}`", where=path, hint="it is damaged or from another program; remove it")
    checked: dict[str, Any] = found
    return checked


def _evaluation(path: Path) -> dict[str, Any] | None:
    found = _object(path, EVALUATION_FIELDS)
    if found is None:
        return None
    for prediction in found["predictions"]:
        _check(prediction, PREDICTION_FIELDS, path)
    try:
        checked = [Score(**each).to_dict() for each in found["scores"]]
    except TypeError:
        raise InputError("has a score of another shape", where=path, hint="remove it and evaluate again") from None
    return {**found, "scores": checked}


def _audit(path: Path) -> dict[str, Any] | None:
    found = _object(path, ("rows", "findings"))
    if found is None:
        return None
    findings: dict[str, int] = {}
    details = []
    for each in found["findings"]:
        checked = _check(each, FINDING_FIELDS, path)
        details.append({name: checked[name] for name in FINDING_FIELDS})
    for each in details:
        findings[each["kind"]] = findings.get(each["kind"], 0) + each["count"]
    return {"rows": found["rows"], "findings": findings, "details": details}


def _present(folder: Path) -> str | None:
    return str(folder) if folder.is_dir() else None


def _weights_bytes(folder: Path) -> int | None:
    """Bytes of a folder's weight files, as `origin.json` counts them: a tokenizer would blur the comparison."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) if folder.is_dir() else None


def _text(path: Path) -> str | None:
    if not path.exists():
        return None
    try:
        return visible(path.read_text(encoding="utf-8", errors="replace"))
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=path) from None


def _row_count(path: Path) -> int | None:
    if not path.exists():
        return None
    try:
        with path.open("rb") as lines:
            return sum(bool(line.strip()) for line in lines)
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=path) from None


def _curve(path: Path, training: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Step, training and validation loss of the log's lines, about CURVE_POINTS of them, from before training on."""
    lines = [line for line in (_text(path) or "").split("\n") if line.strip()]
    curve = []
    for number, line in enumerate(lines, start=1):
        try:
            # a loss that is not a number leaves a gap: JSON has no word for it
            found = json.loads(line, parse_constant=lambda name: None)
        except json.JSONDecodeError:
            if number == len(lines):
                break  # the run was cut off while it wrote this line
            raise InputError("not valid JSON", where=f"{path}:{number}", hint="remove the line") from None
        _check(found, ("step", "train_loss", "valid_loss"), path)
        curve.append({name: found[name] for name in ("step", "train_loss", "valid_loss")})
    every = -(-len(curve) // CURVE_POINTS) or 1
    curve = [each for index, each in enumerate(curve) if index % every == every - 1 or each["valid_loss"] is not None]
    if training is not None and training["first_valid_loss"] is not None and not (curve and curve[0]["step"] == 0):
        curve.insert(0, {"step": 0, "train_loss": None, "valid_loss": training["first_valid_loss"]})
    return curve


def _samples(evaluations: dict[str, dict[str, Any] | None]) -> dict[str, Any] | None:
    """A few answered rows of the fused model, else of the tuned one, and how many rows changed sides.

    Rows are taken evenly through the file, wrong and right ones apart, so that nobody picks the pretty ones.
    """
    column = "fused" if evaluations["fused"] else "tuned"
    evaluation, base = evaluations[column], evaluations["base"]
    rows = [each for each in (evaluation["predictions"] if evaluation else []) if each["answer"] is not None]
    if not rows:
        return None
    before = {(each["where"], each["prompt"]): each for each in (base["predictions"] if base else [])}
    pairs = [(each, before.get((each["where"], each["prompt"]))) for each in rows]
    wrong = [index for index, each in enumerate(rows) if not _is_right(each)]
    right = [index for index, each in enumerate(rows) if _is_right(each)]
    shown_wrong = min(len(wrong), max(SHOWN_WRONG, SHOWN - len(right)))
    shown = sorted([*_evenly(wrong, shown_wrong), *_evenly(right, SHOWN - shown_wrong)])
    compared = [(_is_right(now), _is_right(then)) for now, then in pairs if then is not None]
    return {
        "column": column,
        "measure": "label" if any(each.get("right") is not None for each in rows) else "exact match",
        "rows": len(rows),
        "wrong": len(wrong),
        "newly_right": sum(now and not then for now, then in compared) if compared else None,
        "newly_wrong": sum(then and not now for now, then in compared) if compared else None,
        "shown": [_sample(*pairs[index]) for index in shown],
    }


def _is_right(prediction: dict[str, Any]) -> bool:
    """By its label where the evaluation compared labels (`right`), else by the exact text."""
    right = prediction.get("right")
    return bool(prediction["exact"] if right is None else right)


def _sample(now: dict[str, Any], then: dict[str, Any] | None) -> dict[str, Any]:
    return {
        "where": visible(now["where"]),
        "prompt": shorten(visible(now["prompt"])),
        "expected": shorten(visible(now["expected"] or "").strip()),
        "base": shorten(visible(then["answer"] or "").strip()) if then else None,
        "answer": shorten(visible(now["answer"]).strip()),
        "base_right": _is_right(then) if then else None,
        "right": _is_right(now),
    }


def _evenly(indices: list[int], count: int) -> list[int]:
    """Up to `count` of them, from the first on at equal distances."""
    count = min(count, len(indices))
    return [indices[place * len(indices) // count] for place in range(count)]


def _missing(run: RunDir, evaluations: dict[str, dict[str, Any] | None]) -> list[str]:
    """What a finished run would have and this one has not."""
    pieces = [
        (run.recipe, "the recipe"),
        (run.origin, "where the model and the data come from"),
        (run.data / "audit.json", "the data's audit"),
        (run.log, "the training log"),
        (run.adapter, "the trained adapter"),
        (run.fused, "the fused model"),
    ]
    names = {"base": "the base model", "tuned": "the tuned model", "fused": "the fused model"}
    lacking = [f"{words} ({path.relative_to(run.root)})" for path, words in pieces if not path.exists()]
    return lacking + [
        f"the evaluation of {names[column]} ({run.evaluation(column).relative_to(run.root)})"
        for column in COLUMNS
        if evaluations[column] is None
    ]
