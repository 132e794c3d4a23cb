"""Scores and tables from predictions: hand-worked figures, and which metrics suit which answers."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mlxtune.errors import DataError, InputError, RecipeError
from mlxtune.evaluation import tally
from mlxtune.evaluation.predictions import Prediction
from mlxtune.recipe import EvaluateRecipe

READ = ["loss", "perplexity", "token_accuracy"]
FREE = ["rouge_l", "chrf", "answer_length", "refusals"]


def row(line: int, expected: str | None, answer: str | None, **more: Any) -> Prediction:
    values: dict[str, Any] = {
        "where": f"a:{line}", "prompt": "?", "expected": expected, "answer": answer, "loss": 0.5, "tokens": 4,
        "exact": None if answer is None else answer == expected, "right": None, "prompt_tokens": 5,
        "answer_tokens": None if answer is None else len(answer), "tokens_right": 2,
    }  # fmt: skip
    return Prediction(**values | more)


def labelled(line: int, expected: str, given: str | None, scored: str, probability: float) -> Prediction:
    return row(
        line, expected, given or "?", right=given == expected, label=given, label_expected=expected,
        label_scored=scored, label_probability=probability,
    )  # fmt: skip


LABELLED = [
    labelled(1, "a", "a", "a", 0.9),
    labelled(2, "a", "b", "a", 0.6),
    labelled(3, "b", "b", "b", 0.95),
    labelled(4, "b", None, "a", 0.55),
]


def scores(
    rows: list[Prediction], value: object = None, labels: tuple[str, ...] = (), **settings: Any
) -> dict[str, Any]:
    made, _ = tally.tally(tally.Rows(rows, EvaluateRecipe(**settings), labels, value))
    assert len({each.metric for each in made}) == len(made)
    return {each.metric: each for each in made}


def test_plain_text_is_only_read() -> None:
    found = scores([row(1, None, None, loss=1.0, tokens=1, tokens_right=1), row(2, None, None, loss=0.0, tokens=3)])
    assert list(found) == READ
    assert (found["loss"].value, found["token_accuracy"].value) == (0.25, 0.75)


def test_free_answers() -> None:
    found = scores([row(1, "the cat sat", "the cat sat"), row(2, "on a mat", "I cannot help with that.")])
    assert list(found) == [*READ, "exact_match", *FREE]
    assert (found["exact_match"].value, found["refusals"].value) == (0.5, 0.5)
    assert found["answer_length"].value == (11 + 24) / 2


def test_labels_by_hand() -> None:
    found = scores(LABELLED, labels=("a", "b", "c"))
    assert list(found) == [
        *READ, "exact_match", "accuracy", "macro_f1", "outside_labels", "label_accuracy", "ece",
    ]  # fmt: skip
    assert found["accuracy"].value == 0.5
    # a: precision 1, recall 1/2; b: precision 1/2, recall 1/2
    assert found["macro_f1"].value == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert found["outside_labels"].value == 0.25
    assert found["label_accuracy"].value == 0.75
    # a bin has 0.55 and 0.6, one of them right; 0.9 and 0.95 have one each
    assert found["ece"].value == pytest.approx(2 / 4 * (0.575 - 0.5) + 1 / 4 * 0.1 + 1 / 4 * 0.05)


def test_tables_of_labels_by_hand() -> None:
    _, tables = tally.tally(tally.Rows(LABELLED, EvaluateRecipe(target_precision=1.0), ("c",)))
    assert tables["confusion"] == {"labels": ["a", "b", "c"], "counts": [[1, 1, 0, 0], [0, 1, 0, 1], [0, 0, 0, 0]]}
    assert [each["label"] for each in tables["classes"]] == ["a", "b"]
    assert (tables["coverage"]["threshold"], tables["coverage"]["coverage"]) == (0.6, 0.75)
    assert sum(each["count"] for each in tables["calibration"]["bins"]) == 4
    json.dumps(tables, allow_nan=False)


def test_numbers_as_answers_are_no_classes() -> None:
    rows = [labelled(line, f"{line}", f"{line}", f"{line}", 0.5) for line in range(201)]
    made, tables = tally.tally(tally.Rows([replace(each, label_probability=None) for each in rows], EvaluateRecipe()))
    assert [each.metric for each in made] == [*READ, "exact_match", "accuracy"]
    assert tables == {}


def test_json_answers() -> None:
    rows = [row(1, '{"a": 1}', '{"a": 2}'), row(2, "[1]", '{"a": "x"}'), row(3, "{}", "{")]
    found = scores(rows)
    assert list(found) == [*READ, "exact_match", "json_valid"]
    assert found["json_valid"].value == pytest.approx(2 / 3)
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    found = scores(rows, schema, schema="schema.json", pattern=r"\{.*\}")
    assert (found["json_schema"].value, found["pattern"].value) == (pytest.approx(1 / 3), pytest.approx(2 / 3))


def test_metrics_by_name() -> None:
    rows = [row(1, "The cat.", "the cat")]
    assert list(scores(rows, metrics=["exact_match_normalized"])) == ["loss", "perplexity", "exact_match_normalized"]
    assert "exact_match_normalized" in scores(rows, metrics=["auto", "exact_match_normalized"])
    with pytest.raises(RecipeError, match=r"these rows cannot tell 'label_accuracy'; set evaluate.label"):
        scores(rows, metrics=["label_accuracy"])
    with pytest.raises(RecipeError, match="these rows cannot tell 'chrf'"):
        scores([row(1, None, None)], metrics=["chrf"])


def test_a_server_tells_no_losses() -> None:
    assert list(scores([row(1, "x", "x", loss=None, tokens=0, tokens_right=None)])) == ["exact_match", *FREE]


SHARES = [
    "exact_match",
    "accuracy",
    "outside_labels",
    "label_accuracy",
    "json_valid",
    "json_schema",
    "pattern",
    "refusals",
]


@pytest.mark.parametrize("metric", SHARES)
def test_groups_widen_intervals(metric: str) -> None:
    refused = "I cannot say."
    rows = [
        replace(
            labelled(line, "1", "1" if good else refused, "1" if good else "2", 0.5), answer="1" if good else refused
        )
        for line, good in ((line, line % 8 < 4) for line in range(80))
    ]
    grouped = [replace(each, group=f"{line % 8}", exact=each.answer == "1") for line, each in enumerate(rows)]
    settings = {"metrics": [metric], "schema": "s.json", "pattern": "1"}
    alone, together = (scores(each, True, ("1", "2"), **settings)[metric] for each in (rows, grouped))
    assert together.value == alone.value == 0.5
    assert together.ci_high - together.ci_low > 1.5 * (alone.ci_high - alone.ci_low)


def test_settings_that_no_rows_could_do(tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "object"}')
    assert tally.check(EvaluateRecipe()) is None
    assert tally.check(EvaluateRecipe(schema=str(schema))) == {"type": "object"}
    for settings, message in (
        ({"metrics": ["f1"]}, "'f1' is no metric; known: loss, "),
        ({"metrics": ["pattern"]}, "'pattern' needs evaluate.pattern"),
        ({"metrics": ["json_schema"]}, "'json_schema' needs evaluate.schema"),
        ({"labels": ["a", " "]}, "evaluate.labels: a label is empty"),
    ):
        with pytest.raises(RecipeError, match=message):
            tally.check(EvaluateRecipe(**settings))
    with pytest.raises(InputError, match="evaluate.pattern"):
        tally.check(EvaluateRecipe(pattern="("))
    schema.write_text('{"type": 3}')
    with pytest.raises(InputError) as caught:
        tally.check(EvaluateRecipe(schema=str(schema)))
    assert caught.value.where == str(schema)


def test_what_has_to_be_computed() -> None:
    assert tally.needs_answers(EvaluateRecipe()) and tally.needs_labels(EvaluateRecipe())
    assert not tally.needs_answers(EvaluateRecipe(metrics=["loss", "ece"]))
    assert tally.needs_labels(EvaluateRecipe(metrics=["loss", "ece"]))
    assert not tally.needs_labels(EvaluateRecipe(metrics=["accuracy"]))


def test_no_rows() -> None:
    with pytest.raises((DataError, RecipeError)):
        scores([], metrics=["loss"])
