import pytest

from mlxtune.errors import DataError
from mlxtune.metrics.accuracy import accuracy
from mlxtune.metrics.intervals import mean_share, wilson
from mlxtune.report.score import Score

PATTERN = r"queue: (\w+)"


def test_labels_are_compared_wherever_they_stand() -> None:
    answers = ["queue: billing", "I think queue: access, surely", "queue: outage", "billing", "Queue: billing", ""]
    wanted = ["queue: billing", "queue: access", "queue: billing", *["queue: billing"] * 3]
    low, high = wilson(2, 6)
    assert accuracy(answers, wanted, PATTERN) == Score(
        metric="accuracy", value=2 / 6, unit="share", ci_low=low, ci_high=high, n=6, better="higher"
    )


def test_a_group_that_took_no_part_is_no_label() -> None:
    # an answer without a label is wrong, never equal to another absence
    assert accuracy(["none"], ["queue: billing"], r"none|queue: (\w+)").value == 0


def test_an_expected_answer_without_a_label_is_refused() -> None:
    with pytest.raises(DataError) as caught:
        accuracy(["queue: a", "queue: a"], ["queue: a", "to billing"], PATTERN)
    assert str(caught.value) == (
        r"evaluate.label: the pattern 'queue: (\\w+)' finds no label in the expected answer 'to billing'; "
        "change the pattern or that row's answer"
    )


def test_no_rows_are_refused() -> None:
    with pytest.raises(DataError, match="there are no rows to score"):
        accuracy([], [], PATTERN)


def test_rows_of_a_group_count_as_one() -> None:
    answers, groups = ["queue: a", "queue: a", "queue: b", "queue: b"], [1, 1, 2, 2]
    assert accuracy(answers, ["queue: a"] * 4, PATTERN, groups) == mean_share("accuracy", [1, 1, 0, 0], groups=groups)
