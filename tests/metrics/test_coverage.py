import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxtune.errors import DataError
from mlxtune.metrics.coverage import Coverage, coverage
from mlxtune.metrics.intervals import wilson


def test_the_least_confidence_at_which_enough_are_right() -> None:
    #         1/1   -    2/3  3/4  3/5: rows of 0.8 are answered together
    sure, right = [0.6, 0.9, 0.8, 0.7, 0.8], [False, True, False, True, True]
    low, high = wilson(3, 4)
    assert coverage(sure, right, 0.75) == Coverage(
        target=0.75, coverage=0.8, threshold=0.7, precision=0.75, precision_low=low, precision_high=high,
        answered=4, n=5,
    )  # fmt: skip
    assert coverage(sure, right, 0.8).threshold == 0.9
    assert coverage(sure, right, 0.6).coverage == 1


def test_precision_may_fall_and_rise_again() -> None:
    found = coverage([0.9, 0.8, 0.7, 0.6, 0.5], [False, True, True, True, False], 0.75)
    assert (found.threshold, found.answered, found.precision) == (0.6, 4, 0.75)


def test_a_target_that_is_never_reached() -> None:
    assert coverage([0.9, 0.8], [False, True], 0.9) == Coverage(
        target=0.9, coverage=0, threshold=None, precision=None, precision_low=None, precision_high=None, answered=0, n=2
    )


def test_no_rows_are_refused() -> None:
    with pytest.raises(DataError, match="there are no rows to score"):
        coverage([], [], 0.9)
    with pytest.raises(ValueError, match="1 confidences and 2 rows"):
        coverage([0.5], [True, False], 0.9)


@given(
    st.lists(st.tuples(st.sampled_from([0.1, 0.4, 0.5, 0.8, 1.0]), st.booleans()), min_size=1, max_size=20),
    st.sampled_from([0.5, 0.75, 0.9, 1.0]),
)
def test_it_is_the_best_of_all_thresholds(rows: list[tuple[float, bool]], target: float) -> None:
    reached = []
    for threshold in {sure for sure, _ in rows}:
        answered = [right for sure, right in rows if sure >= threshold]
        if sum(answered) >= target * len(answered):
            reached.append((threshold, len(answered), sum(answered) / len(answered)))
    found = coverage([sure for sure, _ in rows], [right for _, right in rows], target)
    best = min(reached, default=(None, 0, None))
    assert (found.threshold, found.answered, found.precision) == best
    assert found.coverage == best[1] / len(rows)
