import pytest

from mlxtune.errors import DataError
from mlxtune.metrics.intervals import share
from mlxtune.metrics.json_valid import is_json, json_valid


@pytest.mark.parametrize("answer", ['{"a": [1, 2.5e3, null]}', " [] \n", '"text"', "0", "true"])
def test_json(answer: str) -> None:
    assert is_json(answer)


@pytest.mark.parametrize(
    "answer",
    ["", "{", "{'a': 1}", "{a: 1}", "[1,]", "NaN", '{"a": Infinity}', '{"a": 1, "a": 2}', '```json\n{"a": 1}\n```',
     'Here it is: {"a": 1}', '{"a": 1} {"b": 2}', "[" * 200 + "]" * 200, "[" * 100_000, "9" * 5000],
)  # fmt: skip
def test_no_json(answer: str) -> None:
    assert not is_json(answer)


def test_the_score_is_a_share() -> None:
    assert json_valid(["{}", "{", "[1]"]) == share("json_valid", 2, 3)
    with pytest.raises(DataError, match="there are no rows to score"):
        json_valid([])
