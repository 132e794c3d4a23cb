"""How much a model can answer alone: the share of rows so sure that few are wrong. Knows confidences and rights."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mlxtune.errors import DataError
from mlxtune.metrics.intervals import wilson


@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """Of `n` rows, the share `coverage` has at least the confidence `threshold`, and `precision` of these are right.

    `answered` is their number, `precision_low` to `precision_high` Wilson's interval. All None, and no row answered,
    where no threshold reaches the `target`. The threshold is chosen on the rows that it is measured on, so the
    precision on others tends to be somewhat lower.
    """

    target: float
    coverage: float
    threshold: float | None
    precision: float | None
    precision_low: float | None
    precision_high: float | None
    answered: int
    n: int


def coverage(confidence: Sequence[float], right: Sequence[bool], target: float) -> Coverage:
    """The smallest threshold at which the rows of at least that confidence are right in a share of `target`.

    confidence, right: (N,). Raises DataError for no rows.
    """
    if not len(confidence):
        raise DataError("there are no rows to score")
    if len(right) != len(confidence):
        raise ValueError(f"{len(confidence)} confidences and {len(right)} rows that are right or not")
    sure, wins = np.asarray(confidence, dtype=np.float64), np.asarray(right, dtype=np.int64)
    order = np.argsort(-sure, kind="stable")
    sorted_sure, right_so_far = sure[order], np.cumsum(wins[order])
    # rows of equal confidence are answered together, or not at all
    last = np.append(sorted_sure[1:] != sorted_sure[:-1], True)
    reached = np.flatnonzero(last & (right_so_far >= target * np.arange(1, sure.size + 1)))
    if not reached.size:
        return Coverage(
            target=target,
            coverage=0.0,
            threshold=None,
            precision=None,
            precision_low=None,
            precision_high=None,
            answered=0,
            n=sure.size,
        )
    answered, wins_there = int(reached[-1]) + 1, int(right_so_far[reached[-1]])
    low, high = wilson(wins_there, answered)
    return Coverage(
        target=target,
        coverage=answered / sure.size,
        threshold=float(sorted_sure[answered - 1]),
        precision=wins_there / answered,
        precision_low=low,
        precision_high=high,
        answered=answered,
        n=sure.size,
    )
