"""Whether a JSON value has the shape that a file of a run must have, and where it has not. Knows shapes, not meanings.

A shape is a type (int stands for whole numbers, float for all finite ones), a list of one shape for lists, a dict for
objects of at least these keys, `Exact` of one for just these, `Maybe` of one for what may be null, and `Lookup` of one
for objects of any keys.
"""

import sys
from dataclasses import dataclass
from typing import Any

LARGEST = 2**63  # of whole numbers: larger ones are no counts, and no array holds them
NAMES = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", dict: "an object"}


@dataclass(frozen=True, slots=True)
class Maybe:
    """A value of the shape, or null; in an object, its key may be absent."""

    shape: Any


@dataclass(frozen=True, slots=True)
class Lookup:
    """An object whose values all have the shape."""

    shape: Any


@dataclass(frozen=True, slots=True)
class Exact:
    """An object of the keys of a shape and no others."""

    shape: dict[str, Any]


SCORE = Exact({"metric": str, "value": float, "unit": str, "ci_low": float, "ci_high": float, "n": int, "better": str})
COST = {name: Maybe(float) for name in ("prompt_tokens", "answer_tokens", "seconds_per_row", "peak_memory_gb")}
TABLES = {
    "classes": Maybe([{"label": str, "precision": float, "recall": float, "f1": float, "support": int}]),
    "confusion": Maybe({"labels": [str], "counts": [[int]]}),
    "calibration": Maybe(
        {
            "ece": float,
            "bins": [{"low": float, "high": float, "confidence": float, "accuracy": float, "count": int}],
        }
    ),
    "coverage": Maybe(
        {"target": float, "coverage": float, "threshold": Maybe(float), "precision": Maybe(float), "n": int}
    ),
}
EVALUATION = {"model": str, "n": int, "scores": [SCORE], "tables": Maybe(TABLES), "cost": Maybe(COST)}
PREDICTION = {
    "where": str, "prompt": str, "expected": Maybe(str), "answer": Maybe(str), "loss": Maybe(float),
    "exact": Maybe(bool), "right": Maybe(bool),
}  # fmt: skip
# lines of what a comparison's other figures are summed from
WINDOW = {"tokens": int, "base_nats": float, "tuned_nats": float, "kl": float, "positions": int}
CHOSEN = {"where": str, "right": int, "base": int, "tuned": int}
JUDGED_PAIR = {"where": str, "verdicts": [str]}
_POINT = {"rows": int, "value": float, "ci_low": float, "ci_high": float}
_FLIPS = {
    "from": str, "to": str, "fixed": int, "broken": int,
    "examples": [
        {"where": str, "prompt": str, "expected": Maybe(str), "before": Maybe(str), "after": Maybe(str), "kind": str}
    ],
}  # fmt: skip
COMPARISON = {
    "rows": int,
    "metric": Maybe(str),
    "candidates": [
        {
            "name": str,
            "kind": str,
            "description": Maybe(str),
            "scores": [SCORE],
            "difference": Maybe(
                {
                    "against": str, "metric": str, "value": float, "ci_low": float, "ci_high": float,
                    "p": Maybe(float), "p_adjusted": Maybe(float), "n": int,
                }
            ),
            "cost": Maybe({**COST, "bytes": Maybe(float)}),
        }
    ],
    "verdict": {"decision": str, "sentence": str, "reasons": [str], "rows_needed": Maybe(int)},
    "flips": Maybe(_FLIPS),
    "flips_since": Maybe(_FLIPS),
    "forgetting": Maybe(
        {
            "anchor": str, "tokens": int, "base_loss": float, "tuned_loss": float, "kl": Maybe(float),
            "kl_error": Maybe(float), "budget": float,
            "choices": Maybe({"file": str, "n": int, "base": SCORE, "tuned": SCORE}),
        }
    ),
    "left_out": Maybe(Lookup(str)),
    "judged": Maybe({"judge": str, "better": str, "than": str, "wins": int, "ties": int, "losses": int}),
    "contamination": Maybe(
        {
            "near": [{"test": str, "train": str, "similarity": float}],
            "count": int,
            "without": [{"name": str, "scores": [SCORE]}],
        }
    ),
    "learning_curve": Maybe(
        {"metric": str, "points": [_POINT], "fit": Maybe(_POINT), "sentence": Maybe(str)}
    ),
    "settings": Maybe({}),
    "evaluate": Maybe({}),
    "labels": Maybe([str]),
}  # fmt: skip


def misfit(value: Any, shape: Any, name: str = "") -> str | None:
    """What is wrong, as "lacks `steps`" or "`scores[2].value` is not a number"; None where the value fits."""
    if isinstance(shape, Maybe):
        return None if value is None else misfit(value, shape.shape, name)
    if isinstance(shape, Exact):
        more = sorted(value.keys() - shape.shape.keys()) if isinstance(value, dict) else []
        return f"`{_join(name, more[0])}` is unknown" if more else misfit(value, shape.shape, name)
    if isinstance(shape, Lookup):
        shape = dict.fromkeys(value, shape.shape) if isinstance(value, dict) else {}
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            first = next(iter(shape), None)
            return f"lacks `{_join(name, first)}`" if first is not None else _not(name, dict)
        return _first_of(value, shape, name)
    if isinstance(shape, list):
        if not isinstance(value, list):
            return f"`{name}` is not a list"
        found = (misfit(each, shape[0], f"{name}[{at}]") for at, each in enumerate(value))
        return next((each for each in found if each is not None), None)
    return None if _is(value, shape) else _not(name, shape)


def _first_of(value: dict[str, Any], shape: dict[str, Any], name: str) -> str | None:
    for key, inner in shape.items():
        if key not in value:
            if isinstance(inner, Maybe):
                continue
            return f"lacks `{_join(name, key)}`"
        found = misfit(value[key], inner, _join(name, key))
        if found is not None:
            return found
    return None


def _is(value: Any, kind: type) -> bool:
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) < LARGEST
    return isinstance(value, kind)


def _not(name: str, kind: type) -> str:
    return f"`{name}` is not {NAMES[kind]}"


def _join(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key
