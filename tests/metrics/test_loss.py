import math

import pytest

from mlxtune.errors import DataError, ModelError
from mlxtune.metrics.intervals import bootstrap
from mlxtune.metrics.loss import loss
from mlxtune.report.score import Score


def test_loss_is_all_nats_over_all_tokens() -> None:
    nats, tokens = [6.0, 1.0, 3.0, 5.5, 6.5, 2.0], [3, 1, 4, 4, 4, 2]
    low, high = bootstrap([2.0, 1.0, 0.75, 1.375, 1.625, 1.0], tokens)
    # 24 / 18; the mean of the rows' own losses is 1.2917
    assert loss(nats, tokens) == Score(
        metric="loss", value=24 / 18, unit="nats per token", ci_low=low, ci_high=high, n=6, better="lower"
    )
    assert 0 < low < 24 / 18 < high


def test_no_loss_is_below_zero() -> None:
    low, high = bootstrap([2.0, 0.1, 0.0])
    score = loss([2.0, 0.1, 0.0], [1, 1, 1])
    assert low < 0 == score.ci_low
    assert score.ci_high == high


def test_rows_of_a_group_count_as_one() -> None:
    nats, groups = [1.0, 1.1, 4.0, 4.2, 2.0, 2.1], ["a", "a", "b", "b", "c", "c"]
    together, alone = loss(nats, [1] * 6, groups), loss(nats, [1] * 6)
    assert together.value == alone.value
    assert together.ci_high == bootstrap([1.05, 4.1, 2.05], [2, 2, 2])[1] > alone.ci_high


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
