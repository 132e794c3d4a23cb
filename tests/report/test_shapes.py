from typing import Any

import pytest

from mlxtune.report.shapes import EVALUATION, SCORE, Lookup, Maybe, misfit

GOOD = {"metric": "loss", "value": 1.0, "unit": "", "ci_low": 0.5, "ci_high": 2, "n": 3, "better": "lower"}


@pytest.mark.parametrize(
    ("value", "shape", "wrong"),
    [
        ({"a": 1, "more": 2}, {"a": int}, None),
        ({}, {"a": int}, "lacks `a`"),
        ({}, {"a": Maybe(int)}, None),
        ({"a": None}, {"a": Maybe(int)}, None),
        ({"a": None}, {"a": int}, "`a` is not a whole number"),
        ({"a": True}, {"a": int}, "`a` is not a whole number"),
        ({"a": 1}, {"a": float}, None),
        ({"a": float("nan")}, {"a": float}, "`a` is not a number"),
        ({"a": float("inf")}, {"a": float}, "`a` is not a number"),
        ({"a": [1, "x"]}, {"a": [int]}, "`a[1]` is not a whole number"),
        ({"a": {}}, {"a": [int]}, "`a` is not a list"),
        ({"a": [{"b": 3}]}, {"a": [{"b": str}]}, "`a[0].b` is not a text"),
        ({"a": [{}]}, {"a": [{"b": str}]}, "lacks `a[0].b`"),
        ([], {"a": int}, "lacks `a`"),
        ({"x": 1, "y": "z"}, Lookup(int), "`y` is not a whole number"),
        ({"d": []}, {"d": Lookup(int)}, "`d` is not an object"),
        (GOOD, SCORE, None),
        ({**GOOD, "more": 1}, SCORE, "`more` is unknown"),
        ({**GOOD, "n": 1.5}, SCORE, "`n` is not a whole number"),
    ],
)
def test_what_does_not_fit_is_named(value: Any, shape: Any, wrong: str | None) -> None:
    assert misfit(value, shape) == wrong


def test_the_place_in_an_evaluation_is_named() -> None:
    value = {"model": "m", "n": 3, "scores": [GOOD, {**GOOD, "value": "high"}]}
    assert misfit(value, EVALUATION) == "`scores[1].value` is not a number"
