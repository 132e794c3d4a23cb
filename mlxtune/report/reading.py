"""The files of a run folder, checked for their shapes, and their hashes. Knows names and shapes; never measures."""

import hashlib
import json
from pathlib import Path
from typing import Any

from mlxtune.errors import InputError
from mlxtune.report.shapes import COMPARISON, EVALUATION, PREDICTION, Lookup, Maybe, misfit
from mlxtune.report.words import visible
from mlxtune.rundir import RunDir, read_json

CURVE_POINTS = 500
HINT = "it is damaged or from another program; remove it"
TRAINING = {
    **dict.fromkeys(("steps", "best_step", "trained_tokens", "rows", "trainable_parameters", "parameters"), int),
    **dict.fromkeys(("seconds", "epochs", "tokens_per_second", "peak_memory_gb"), float),
    **dict.fromkeys(("best_valid_loss", "first_valid_loss"), Maybe(float)),
}
_LOSSES = ("kept", "base_loss", "adapter_loss", "fused_loss", "kl", "same_top", "bits_per_weight")
FUSE = {
    **dict.fromkeys(_LOSSES, Maybe(float)),
    "rows": int,
    "bits": Maybe(int),
    "layers": int,
    "raised": Maybe(Lookup(int)),
}
FINDING = {"kind": str, "severity": str, "count": int, "detail": str, "advice": str}
AUDIT = {"rows": int, "findings": [FINDING]}
ORIGIN = {
    "model": {"name": str, "path": str, "bytes": int, "revision": Maybe(str), "sha256": Maybe(Lookup(str))},
    "data": {"path": Maybe(str), "sha256": Lookup(str)},
    "machine": {"system": str, "device": str, "device_name": str, "cores": int, "memory_bytes": int},
    "versions": Lookup(str),
}
HASHED_FOLDERS = ("data", "base", "adapter", "eval", "fused", "compare")
NOT_HASHED = {"README.md"}  # written from the others, and may be written over by hand


def value_of(path: Path, shape: Any, needed: tuple[str, ...] = ()) -> dict[str, Any] | None:
    """The JSON object of a file, None where there is no file. Raises InputError for another shape, naming the key.

    `needed` are keys that must be there though their values may be null.
    """
    if not path.exists():
        return None
    found = read_json(path)
    wrong = misfit(found, shape)
    if wrong is None:
        wrong = next((f"lacks `{name}`" for name in needed if name not in found), None)
    if wrong is not None:
        raise InputError(wrong, where=path, hint=HINT)
    checked: dict[str, Any] = found
    return checked


def origin_of(run: RunDir) -> dict[str, Any] | None:
    return value_of(run.origin, ORIGIN)


def training_of(run: RunDir) -> dict[str, Any] | None:
    return value_of(run.adapter / "training.json", TRAINING, ("first_valid_loss", "best_valid_loss"))


def fuse_of(run: RunDir) -> dict[str, Any] | None:
    return value_of(run.fused / "fuse.json", FUSE, ("kept",))


def audit_of(run: RunDir) -> dict[str, Any] | None:
    return value_of(run.data / "audit.json", AUDIT)


def evaluation_of(run: RunDir, name: str) -> dict[str, Any] | None:
    """An evaluation without its predictions; `tables` and `cost` are there at least empty."""
    found = value_of(run.evaluation(name), EVALUATION)
    return None if found is None else {**found, "tables": found.get("tables") or {}, "cost": found.get("cost") or {}}


def comparison_of(run: RunDir) -> dict[str, Any] | None:
    return value_of(run.compare / "compare.json", COMPARISON)


def predictions_of(path: Path) -> list[dict[str, Any]]:
    """The predictions of a file, one a line; none where there is no file. Raises InputError with the line."""
    return lines_of(path, PREDICTION)


def lines_of(path: Path, shape: Any) -> list[dict[str, Any]]:
    """The JSON objects of a file, one a line, each of a shape; as `predictions_of`."""
    found = []
    for number, line in enumerate(_lines(path), start=1):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            raise InputError("not valid JSON", where=f"{path}:{number}", hint=HINT) from None
        wrong = misfit(value, shape)
        if wrong is not None:
            raise InputError(wrong, where=f"{path}:{number}", hint=HINT)
        found.append(value)
    return found


def row_count(path: Path) -> int | None:
    """The lines that hold something; None where there is no file."""
    return sum(1 for line in _lines(path) if line.strip()) if path.exists() else None


def text_of(path: Path) -> str | None:
    """A text without control characters; None where there is no file."""
    return visible("\n".join(_lines(path)) + "\n") if path.exists() else None


def curve_of(run: RunDir, training: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Step, training and validation loss of the log's lines, about CURVE_POINTS of them, from before training on."""
    lines = [line for line in _lines(run.log) if line.strip()]
    curve = []
    for number, line in enumerate(lines, start=1):
        try:
            # a loss that is not a number leaves a gap: JSON has no word for it
            found = json.loads(line, parse_constant=lambda name: None)
        except (ValueError, RecursionError):
            if number == len(lines):
                break  # the run was cut off while it wrote this line
            raise InputError("not valid JSON", where=f"{run.log}:{number}", hint="remove the line") from None
        wrong = misfit(found, {"step": int, "train_loss": Maybe(float), "valid_loss": Maybe(float)})
        wrong = wrong or next((f"lacks `{name}`" for name in ("train_loss", "valid_loss") if name not in found), None)
        if wrong is not None:
            raise InputError(wrong, where=f"{run.log}:{number}", hint=HINT)
        curve.append({name: found[name] for name in ("step", "train_loss", "valid_loss")})
    every = -(-len(curve) // CURVE_POINTS) or 1
    curve = [each for index, each in enumerate(curve) if index % every == every - 1 or each["valid_loss"] is not None]
    if training is not None and training["first_valid_loss"] is not None and not (curve and curve[0]["step"] == 0):
        curve.insert(0, {"step": 0, "train_loss": None, "valid_loss": training["first_valid_loss"]})
    return curve


def hashes(run: RunDir) -> dict[str, str]:
    """The sha256 of every file that a report is built from, and of the weights, by path in the folder."""
    files = [path for path in (run.recipe, run.origin, run.log) if path.is_file()]
    for name in HASHED_FOLDERS:
        files += [path for path in sorted((run.root / name).rglob("*")) if path.is_file()]
    return {
        path.relative_to(run.root).as_posix(): _sha256(path)
        for path in files
        if path.name not in NOT_HASHED and not any(part.startswith(".") for part in path.relative_to(run.root).parts)
    }


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=path) from None


def _lines(path: Path) -> list[str]:
    """The lines of a text file, broken at line feeds alone; none where there is no file."""
    if not path.exists():
        return []
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=path) from None
    return text.removesuffix("\n").split("\n") if text else []
