import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxtune.data import matching
from mlxtune.errors import DataError, InputError
from mlxtune.metrics.intervals import share
from mlxtune.metrics.pattern import compiled, matches, occurs, pattern


def test_a_whole_answer_must_match() -> None:
    answers = ["AB-12", " AB-12\n", "AB-12.", "order AB-12", "ab-12", ""]
    assert pattern(answers, r"[A-Z]{2}-\d+") == share("pattern", 2, 6)
    assert pattern(["yes", "no", "yes, no"], "yes|no") == share("pattern", 2, 3)
    assert pattern(["YES"], "(?i)yes").value == 1
    assert pattern(["a\nb"], "a.b").value == 0


def test_occurs_looks_anywhere() -> None:
    assert occurs("b", "abc")
    assert not occurs("^b", "abc")


def test_no_answer_holds_up_an_expression(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matching, "SECONDS", 0.02)
    # Python's own matching would take longer than anyone lives
    assert not matches("(a|aa)+", "a" * 80 + "!")
    assert not occurs("^(a|aa)+$", "a" * 80 + "!")
    assert matches("(a|aa)+", "a" * 80)


def test_no_expression() -> None:
    for call in (lambda: pattern(["a"], "("), lambda: compiled("(")):
        with pytest.raises(InputError) as caught:
            call()
        assert str(caught.value) == "evaluate.pattern: '(' is no regular expression: missing ) at position 1"


def test_no_rows_are_refused() -> None:
    with pytest.raises(DataError, match="there are no rows to score"):
        pattern([], "a")


def test_brackets_within_brackets_are_what_they_are_in_python() -> None:
    assert matches("[[a]+", "[a")  # without a warning, as warnings are errors here


@given(st.text("ab1 \n", max_size=8))
def test_the_syntax_is_pythons(text: str) -> None:
    for expression in (r"\w+", r"(?P<x>a)b(?P=x)?", r"[^a]*", r"a{1,2}(?=b).*", r"(?s)a.*?b", r"\bab\b|1+"):
        assert matches(expression, text) == (re.fullmatch(expression, text.strip()) is not None)
