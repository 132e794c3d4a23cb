import pytest

from mlxtune.errors import DataError
from mlxtune.metrics.intervals import mean_share, share
from mlxtune.metrics.label_accuracy import label_accuracy, outside_labels


def test_the_most_likely_label_is_the_expected_one_or_not() -> None:
    scored, expected = ["a", "b", None, "a"], ["a", "a", "a", "a"]
    assert label_accuracy(scored, expected) == share("label_accuracy", 2, 4)
    groups = [1, 2, 2, 3]
    assert label_accuracy(scored, expected, groups) == mean_share("label_accuracy", [1, 0, 0, 1], groups=groups)


def test_answers_outside_the_labels_are_counted() -> None:
    assert outside_labels(["a", "A", None, "", "b"], ["a", "b"]) == share("outside_labels", 3, 5, better="lower")


def test_no_rows_are_refused() -> None:
    with pytest.raises(DataError, match="there are no rows to score"):
        label_accuracy([], [])
    with pytest.raises(DataError, match="there are no rows to score"):
        outside_labels([], ["a"])
    with pytest.raises(ValueError, match="zip"):
        label_accuracy(["a"], ["a", "b"])
