import math

import pytest

from mlxtune.errors import DataError, ModelError
from mlxtune.metrics.intervals import bootstrap_ratio
from mlxtune.metrics.loss import loss
from mlxtune.report.score import Score


def test_loss_is_all_nats_over_all_tokens() -> None:
    low, high = bootstrap_ratio([6.0, 1.0, 3.0], [3, 1, 4])
    # (6 + 1 + 3) / (3 + 1 + 4); the mean of the rows' own losses would be 1.25 only by accident: 1.5833
    assert loss([6.0, 1.0, 3.0], [3, 1, 4]) == Score(
        metric="loss", value=1.25, unit="nats per token", ci_low=low, ci_high=high, n=3, better="lower"
    )
    assert low < 1.25 < high


def test_one_row_has_an_interval_without_width() -> None:
    score = loss([3.0], [2])
    assert (score.value, score.ci_low, score.ci_high, score.n) == (1.5, 1.5, 1.5, 1)


def test_no_rows_are_refused() -> None:
    with pytest.raises(DataError, match="there are no rows to score"):
        loss([], [])


def test_a_row_without_tokens_is_named() -> None:
    with pytest.raises(DataError, match="row 2 of the scored rows has no token to score"):
        loss([1.0, 0.0], [1, 0])


@pytest.mark.parametrize("nats", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_named(nats: float) -> None:
    with pytest.raises(ModelError, match=f"the loss of row 3 of the scored rows is {nats}"):
        loss([1.0, 2.0, nats], [1, 1, 1])


def test_lengths_must_agree() -> None:
    with pytest.raises(ValueError, match="zip"):
        loss([1.0, 2.0], [1])
