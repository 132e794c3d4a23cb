import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxtune.errors import DataError
from mlxtune.metrics.f1 import ClassRow, macro_f1, per_class
from mlxtune.metrics.intervals import wilson

EXPECTED = ["a", "a", "a", "b", "b", "c"]
GIVEN = ["a", "b", "z", "b", "b", None]


def test_the_figures_of_each_class_are_hand_worked() -> None:
    assert per_class(GIVEN, EXPECTED) == [
        ClassRow(label="a", precision=1.0, recall=1 / 3, f1=2 / 4, support=3),
        ClassRow(label="b", precision=2 / 3, recall=1.0, f1=4 / 5, support=2),
        ClassRow(label="c", precision=0.0, recall=0.0, f1=0.0, support=1),  # never given
    ]
    score = macro_f1(GIVEN, EXPECTED)
    assert score.value == pytest.approx((0.5 + 0.8 + 0) / 3, rel=1e-12)
    assert (score.metric, score.unit, score.n, score.better) == ("macro_f1", "share", 6, "higher")
    assert 0 <= score.ci_low < score.value < score.ci_high <= 1


def mean_f1(rows: list[int]) -> float:
    return float(
        np.mean([each.f1 for each in per_class([GIVEN[row] for row in rows], [EXPECTED[row] for row in rows])])
    )


@pytest.mark.parametrize("groups", [[[0], [1], [2], [3], [4], [5]], [[0, 1], [2, 3], [4, 5]]])
def test_the_interval_is_that_of_the_mean_over_classes_that_a_resample_expects(groups: list[list[int]]) -> None:
    draws = np.random.default_rng(0).integers(0, len(groups), (2000, len(groups)))
    found = [mean_f1([row for number in drawn for row in groups[number]]) for drawn in draws]
    bias = np.mean(found) - mean_f1([0, 1, 2, 3, 4, 5])
    low, high = np.quantile(found, [0.025, 0.975])
    expected = max(0.0, low - max(0, 2 * bias)), min(1.0, high - min(0, 2 * bias))
    place = [number for number, group in enumerate(groups) for _ in group]
    score = macro_f1(GIVEN, EXPECTED, None if len(groups) == 6 else place)
    assert (score.ci_low, score.ci_high) == pytest.approx(expected, rel=1e-9)


def test_all_right_and_all_wrong_still_have_an_interval() -> None:
    right, wrong = macro_f1(EXPECTED, EXPECTED), macro_f1(["z"] * 6, EXPECTED, [1, 1, 2, 2, 3, 3])
    assert (right.value, right.ci_low, right.ci_high) == (1, *wilson(6, 6))
    assert (wrong.value, wrong.ci_low, wrong.ci_high) == (0, *wilson(0, 3))


def test_no_rows_are_refused() -> None:
    for figure in (macro_f1, per_class):
        with pytest.raises(DataError, match="there are no rows to score"):
            figure([], [])
        with pytest.raises(ValueError, match="1 given and 2 expected"):
            figure(["a"], ["a", "b"])


@given(st.lists(st.tuples(st.sampled_from("abcz"), st.sampled_from("abc")), min_size=1, max_size=30))
def test_f1_lies_between_precision_and_recall(rows: list[tuple[str, str]]) -> None:
    for each in per_class([got for got, _ in rows], [wanted for _, wanted in rows]):
        assert min(each.precision, each.recall) - 1e-12 <= each.f1 <= max(each.precision, each.recall) + 1e-12
        assert each.support == sum(wanted == each.label for _, wanted in rows)


@pytest.mark.interop
def test_f1_is_scikit_learns() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    random = np.random.default_rng(0)
    for classes, n in ((2, 12), (4, 60), (30, 90)):
        expected = [f"label {number}" for number in random.integers(0, classes, n)]
        given = [f"label {number}" for number in random.integers(0, classes + 3, n)]
        given[: n // 2] = expected[: n // 2]
        labels = sorted(set(expected))
        precision, recall, f1, support = metrics.precision_recall_fscore_support(
            expected, given, labels=labels, zero_division=0
        )
        rows = per_class(given, expected)
        assert [each.label for each in rows] == labels
        np.testing.assert_allclose([each.precision for each in rows], precision, rtol=1e-12)
        np.testing.assert_allclose([each.recall for each in rows], recall, rtol=1e-12)
        np.testing.assert_allclose([each.f1 for each in rows], f1, rtol=1e-12)
        assert [each.support for each in rows] == support.tolist()
        expected_mean = metrics.f1_score(expected, given, labels=labels, average="macro", zero_division=0)
        assert macro_f1(given, expected).value == pytest.approx(expected_mean, rel=1e-12)
