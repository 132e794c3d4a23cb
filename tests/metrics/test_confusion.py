import random

import pytest

from mlxtune.errors import DataError
from mlxtune.metrics.confusion import Confusion, confusion


def test_lines_are_expected_and_columns_given() -> None:
    expected, given = ["b", "a", "a", "a", "b"], ["a", "a", None, "A", "b"]
    assert confusion(given, expected) == Confusion(labels=["a", "b"], counts=[[1, 0, 2], [1, 1, 0]])


def test_labels_may_be_more_than_those_expected_and_in_any_order() -> None:
    found = confusion(["c", "b"], ["a", "b"], ["c", "b", "a", "b"])
    assert found == Confusion(labels=["c", "b", "a"], counts=[[0, 0, 0, 0], [0, 1, 0, 0], [1, 0, 0, 0]])


def test_an_expected_label_outside_the_labels_is_refused() -> None:
    with pytest.raises(DataError) as caught:
        confusion(["a"], ["b"], ["a"])
    assert str(caught.value) == "evaluate.labels: the expected label 'b' is not among the labels"


def test_no_rows_are_refused() -> None:
    with pytest.raises(DataError, match="there are no rows to score"):
        confusion([], [])
    with pytest.raises(ValueError, match="zip"):
        confusion(["a"], ["a", "b"])


@pytest.mark.interop
def test_counts_are_scikit_learns() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    draw = random.Random(0)
    expected, given = draw.choices("abcde", k=200), draw.choices("abcde?", k=200)
    counts = metrics.confusion_matrix(expected, given, labels=[*"abcde", "?"])
    assert confusion(given, expected).counts == counts[:5].tolist()
