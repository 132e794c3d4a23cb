import pytest

from mlxtune.errors import DataError
from mlxtune.metrics.exact_match import exact_match, is_exact
from mlxtune.metrics.intervals import wilson
from mlxtune.report.score import Score


def test_only_surrounding_white_space_is_forgiven() -> None:
    answers = ["yes", " yes\n", "Yes", "yes.", "y es", ""]
    low, high = wilson(2, 6)
    assert exact_match(answers, ["yes"] * 6) == Score(
        metric="exact_match", value=2 / 6, unit="share", ci_low=low, ci_high=high, n=6, better="higher"
    )


def test_the_expected_text_may_have_white_space_around_it() -> None:
    assert is_exact("no", " no ")
    assert not is_exact("no\nno", "no no")


def test_no_rows_are_refused() -> None:
    with pytest.raises(DataError, match="there are no rows to score"):
        exact_match([], [])


def test_lengths_must_agree() -> None:
    with pytest.raises(ValueError, match="zip"):
        exact_match(["a", "b"], ["a"])
