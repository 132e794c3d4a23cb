import pytest

from mlxtune.errors import DataError
from mlxtune.metrics.answer_length import answer_length, answer_length_median
from mlxtune.metrics.intervals import bootstrap
from mlxtune.report.score import Score


def test_mean_and_median_tokens() -> None:
    tokens = [3, 5, 4, 100, 2, 6, 7, 8]
    low, high = bootstrap([float(each) for each in tokens])
    assert answer_length(tokens) == Score(
        metric="answer_length", value=135 / 8, unit="tokens", ci_low=max(0, low), ci_high=high, n=8, better="lower"
    )
    # of 8 coins, no heads: 1/256; at most one: 9/256, too many
    assert answer_length_median(tokens) == Score(
        metric="answer_length_median", value=5.5, unit="tokens", ci_low=2, ci_high=100, n=8, better="lower"
    )


def test_no_length_is_below_zero() -> None:
    assert bootstrap([0.0, 0.0, 9.0])[0] < 0 == answer_length([0, 0, 9]).ci_low


def test_rows_of_a_group_count_as_one() -> None:
    groups = ["a", "a", "b", "b", "c"]
    assert answer_length([5, 5, 6, 6, 7], groups).ci_high == bootstrap([5.0, 5, 6, 6, 7], groups=groups)[1]


def test_no_rows_are_refused() -> None:
    for figure in (answer_length, answer_length_median):
        with pytest.raises(DataError, match="there are no rows to score"):
            figure([])
