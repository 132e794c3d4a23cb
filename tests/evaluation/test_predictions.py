"""Predictions as lines of JSON: what is written is what is read, and what is no prediction is refused."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from mlxtune.errors import DataError, InputError
from mlxtune.evaluation import predictions
from mlxtune.evaluation.predictions import Prediction

ROW = Prediction(
    where="test.jsonl:3", prompt="Is it\u2028here?", expected="yes", answer="n\u00f6\x85\n", loss=0.25, tokens=3,
    exact=False, right=False, label="n\u00f6", label_expected="yes", label_scored="yes", label_probability=0.75,
    prompt_tokens=9, answer_tokens=2, tokens_right=1, group="g",
)  # fmt: skip
BARE = Prediction(
    where="test.jsonl:4", prompt="", expected=None, answer=None, loss=2.0, tokens=7, exact=None, right=None
)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    file = tmp_path / "eval" / "base.jsonl"
    predictions.write(file, [ROW, BARE])
    assert file.read_bytes().count(b"\n") == 2  # no other line end counts
    assert predictions.read(file) == [ROW, BARE]
    first = json.loads(file.read_text(encoding="utf-8").split("\n")[0])
    assert first == asdict(ROW)


def test_fields_that_may_be_missing(tmp_path: Path) -> None:
    value = {name: each for name, each in asdict(BARE).items() if each is not None}
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({**value, "extra": 1}) + "\n")
    assert predictions.read(file) == [BARE]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"where": None}, "`where` is not str"),
        ({"tokens": None}, "`tokens` is not int"),
        ({"tokens": True}, "`tokens` is not int"),
        ({"tokens": 2.5}, "`tokens` is not int"),
        ({"loss": "0.2"}, "`loss` is not float"),
        ({"loss": float("nan")}, "`loss` is not float"),
        ({"exact": 1}, "`exact` is not bool"),
        ({"answer": ["x"]}, "`answer` is not str"),
    ],
)
def test_a_field_of_another_type(tmp_path: Path, change: dict[str, object], message: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(predictions.to_lines([ROW]) + json.dumps({**asdict(ROW), **change}) + "\n", encoding="utf-8")
    with pytest.raises(DataError, match=message) as caught:
        predictions.read(file)
    assert caught.value.where == f"{file}:2"


@pytest.mark.parametrize("text", ["{", "[]", "1", "[" * 100_000])
def test_a_line_that_is_no_object(tmp_path: Path, text: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(text + "\n")
    with pytest.raises(DataError, match="is no JSON object"):
        predictions.read(file)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        predictions.read(tmp_path / "absent.jsonl")
    (tmp_path / "a.jsonl").write_bytes(b"\xff\n")
    with pytest.raises(DataError, match="is not UTF-8"):
        predictions.read(tmp_path / "a.jsonl")


def test_groups() -> None:
    other = replace(ROW, where="b:1", group=None)
    assert predictions.groups_of([other, replace(other, where="b:2")]) is None
    assert predictions.groups_of([other, other]) == ["b:1", "b:1"]  # two samples of a row
    assert predictions.groups_of([ROW, replace(ROW, where="c:1"), other]) == ["g", "g", "b:1"]
    assert predictions.groups_of([ROW, other]) is None
