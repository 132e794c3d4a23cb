import contextlib
import re

import pytest

from mlxtune.data import matching
from mlxtune.data.labels import find_labels, label_in, label_span, plain
from mlxtune.errors import InputError


def test_the_first_group_is_the_label() -> None:
    assert label_in("late_delivery\nSorry.", r"^(\w+)") == "late_delivery"
    assert label_in("The answer is 42.", r"answer is (\d+)") == "42"
    assert label_in("none", r"answer is (\d+)") is None
    assert label_in("queue: outage, not queue: billing", r"queue: (\w+)") == "outage"
    assert label_in("none", r"none|queue: (\w+)") is None
    assert label_in(None, r"(\w+)") is None


def test_a_pattern_may_miss_some_answers_but_not_all() -> None:
    assert find_labels(["a 1", "b"], r"(\d)") == ["1", None]
    assert find_labels(["a", "b"], r"(\d)") is None


def test_few_answers_are_labels_by_their_first_line() -> None:
    answers = ["yes\nSure.", "no\nSorry.", "yes\nOf course."] * 11
    assert find_labels(answers, None) == ["yes", "no", "yes"] * 11


@pytest.mark.parametrize(
    "answers",
    [
        ["yes", "no", "maybe"] * 10,  # three of thirty are not fewer than a tenth
        [f"answer {number}" for number in range(201)] * 20,
        ["always the same"] * 100,
        ["yes", "no"] * 50 + [None],
        [],
    ],
)
def test_other_answers_are_not(answers: list[str | None]) -> None:
    assert find_labels(answers, None) is None


def test_a_bad_pattern_is_an_error_even_without_rows() -> None:
    with pytest.raises(InputError, match=r"label '\(': is no regular expression"):
        find_labels([], "(")
    with pytest.raises(InputError, match="has no group"):
        find_labels([], "x")


@pytest.mark.parametrize(
    ("answer", "pattern", "written"),
    [
        ("refund", None, "refund"),
        (" Refund ", None, " Refund "),
        ("\n late \nSorry.", None, "late"),
        ("The queue: billing.", r"queue: (\w+)", "billing"),
        ("none", r"queue: (\w+)", None),
        ("none", r"none|queue: (\w+)", None),
    ],
)
def test_where_a_label_stands(answer: str, pattern: str | None, written: str | None) -> None:
    span = label_span(answer, pattern)
    assert (None if span is None else answer[slice(*span)]) == written


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("refund_request", "Refund request", True),
        ("refund-request", "refund request.", True),
        (" refund\n", "refund", True),
        ("C++", "C#", False),
        ("+1", "-1", False),
        ("level 1.5", "level 15", False),
        ("below -1", "below 1", False),
        ("+", "-", False),
        ("?", "!", False),
    ],
)
def test_what_is_only_spelling(one: str, other: str, same: bool) -> None:
    assert (plain(one) == plain(other)) is same


def test_two_hundred_answers_are_labels() -> None:
    answers = [f"answer {number}" for number in range(200)] * 11
    assert find_labels(answers, None) == answers


ANSWERS = (
    "refund_request Thank you.", "\n  Label: card_arrival.\nSorry", '{"label": "late", "sure": true}', 
    "queue: a\nqueue: b", "", "née, naïve; Straße 12", "Café-Bar (open)", "42 of -1.5 %", "YES", "a\r\nb", "[x] {y}",
    "\u0130stanbul \u017f \u4e2d\u6587",
)  # fmt: skip


@pytest.mark.parametrize(
    "expression",
    [
        r"\A\s*(\w+)", r"^(\w+)", r"(?m)^queue: (\w+)$", r"(?s)\A(.*)\Z", r'"label":\s*"([^"]*)"', r"(?i)\b(yes|no)\b",
        r"(?P<label>\S+)(?=\n|$)", r"(?:label|queue): ([a-z_]+)", r"([^\W\d_]+)", r"(-?\d+(?:\.\d+)?)", r"(a|b)?$",
        r"(?<!\w)([A-Z]\w*)", r"(.+?)[.,;]", r"([[x]+)", r"(\w)\w*\1", r"(?x) ( \w+ )  # a word", r"(\D{2,5})",
        r"((?i:sT)\w+)",
    ],
)  # fmt: skip
def test_labels_are_those_that_pythons_own_expressions_find(expression: str) -> None:
    with pytest.warns(FutureWarning) if "[[" in expression else contextlib.nullcontext():
        peer = re.compile(expression)
    for answer in ANSWERS:
        found = peer.search(answer)
        assert label_in(answer, expression) == (found.group(1) if found else None)
        there = found is not None and found.group(1) is not None
        assert label_span(answer, expression) == (found.span(1) if found is not None and there else None)


def test_a_letter_has_its_marks() -> None:
    assert (
        label_in("\u0939\u093f\u0928\u094d\u0926\u0940 1", r"(\w+)") == "\u0939\u093f\u0928\u094d\u0926\u0940"
    )  # Hindi


@pytest.mark.parametrize("expression", [r"\A((?:a|aa)+)\Z", r"(?:a|aa)+(b)", r"^((?:\w|\w\w)+),$"])
def test_no_answer_holds_up_an_expression(expression: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matching, "SECONDS", 0.02)
    hostile = "a" * 80 + "!"  # Python's own matching would take longer than anyone lives
    assert label_in(hostile, expression) is None
    assert label_span(hostile, expression) is None
    assert find_labels([hostile, "aaab", "aa,"], expression) in (None, [None, "b", None], [None, None, "aa"])


def test_a_machine_that_stood_still_once_changes_nothing() -> None:
    tries = []

    def slow(text: str, timeout: float) -> str:
        tries.append(timeout)
        if len(tries) == 1:
            raise TimeoutError
        return text

    assert matching.decided(slow, "a") == "a"
    assert tries == [matching.SECONDS] * 2
