import pytest

from mlxtune.data.labels import find_labels, label_in
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
        [f"answer {number}" for number in range(51)] * 20,
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
