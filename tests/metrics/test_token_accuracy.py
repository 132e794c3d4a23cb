import pytest

from mlxtune.errors import DataError
from mlxtune.metrics.intervals import mean_share, wilson
from mlxtune.metrics.token_accuracy import token_accuracy


def test_it_is_all_right_tokens_over_all_tokens() -> None:
    score = token_accuracy([1, 5, 0], [1, 10, 5])
    assert score.value == pytest.approx(6 / 16)  # the mean of the rows' own shares is a half
    assert score == mean_share("token_accuracy", [1, 0.5, 0], [1, 10, 5])
    groups = ["a", "a", "b"]
    assert token_accuracy([1, 5, 0], [1, 10, 5], groups) == mean_share(
        "token_accuracy", [1, 0.5, 0], [1, 10, 5], groups
    )


def test_all_right_is_not_sure_to_stay_so() -> None:
    score = token_accuracy([3, 4], [3, 4])
    assert (score.value, score.ci_low, score.ci_high) == (1, *wilson(2, 2))


def test_rows_without_tokens_are_refused() -> None:
    with pytest.raises(DataError, match="there are no rows to score"):
        token_accuracy([], [])
    with pytest.raises(DataError, match="row 2 of the scored rows has no token to score"):
        token_accuracy([1, 0], [1, 0])
    with pytest.raises(ValueError, match="zip"):
        token_accuracy([1], [1, 1])
