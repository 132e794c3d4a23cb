import pytest

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
