"""Whether a model is right as often as it is sure. Knows confidences and whether rows are right."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mlxtune.errors import DataError, ModelError
from mlxtune.metrics.intervals import Z, resampled
from mlxtune.report.score import Score

BINS = 10
Numbers = npt.NDArray[np.float64]
Rows = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bin:
    """The `count` rows whose confidence is in (low, high]: their mean confidence and the share that is right."""

    low: float
    high: float
    confidence: float
    accuracy: float
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """The expected calibration error, in [0, 1], and the bins that have rows, for a reliability plot."""

    ece: float
    bins: list[Bin]


def calibration(confidence: Sequence[float], right: Sequence[bool], bins: int = BINS) -> Calibration:
    """ECE = sum over bins of count / N · |accuracy - mean confidence|, with bins of equal width; both (N,).

    Source: C. Guo, G. Pleiss, Y. Sun and K. Q. Weinberger, "On calibration of modern neural networks", ICML 2017.
    Raises DataError for no rows, ModelError for a confidence that is not in [0, 1].
    """
    sure, wins = _checked(confidence, right)
    place = _places(sure, bins)
    edges = np.linspace(0, 1, bins + 1)
    found = [
        Bin(
            low=float(edges[i]),
            high=float(edges[i + 1]),
            confidence=float(sure[place == i].mean()),
            accuracy=float(wins[place == i].mean()),
            count=int((place == i).sum()),
        )
        for i in np.unique(place)
    ]
    return Calibration(ece=_error(sure, wins, place, bins), bins=found)


def ece(
    confidence: Sequence[float],
    right: Sequence[bool],
    groups: Sequence[object] | None = None,
    seed: int = 0,
    bins: int = BINS,
) -> Score:
    """The expected calibration error as a Score, with an interval that knows that the figure is too large by nature.

    In a bin of few rows the accuracy is off by chance, and every such difference adds to the error: below some
    hundred rows even a calibrated model has an ECE well above 0. With the jackknife's standard error s and the mean b
    by which resampled figures exceed the figure, the interval is [ECE - b - zs, ECE + zs], cut at 0 and 1; and it
    begins at 0 where one in 40 calibrated models, right with just the probabilities given, would have this ECE.
    """
    sure, wins = _checked(confidence, right)
    place = _places(sure, bins)
    value, found, without = resampled(
        lambda rows: _error(sure[rows], wins[rows], place[rows], bins), sure.size, groups, seed
    )
    n = without.size
    error = math.sqrt((n - 1) / n * float(((without - without.mean()) ** 2).sum()))
    low = value - max(0.0, float(found.mean()) - value) - Z * error
    if value <= np.quantile(_by_chance(sure, place, bins, seed), 0.975):
        low = 0.0
    return Score(
        metric="ece",
        value=value,
        unit="share",
        ci_low=max(0.0, low),
        ci_high=min(1.0, value + Z * error),
        n=sure.size,
        better="lower",
    )


def _by_chance(sure: Numbers, place: Rows, bins: int, seed: int, times: int = 1000) -> Numbers:
    """The ECE (times,) of models that are right with just the probabilities `sure` (N,)."""
    generator = np.random.default_rng(seed)
    return np.array(
        [_error(sure, (generator.random(sure.size) < sure).astype(np.float64), place, bins) for _ in range(times)]
    )


def _checked(confidence: Sequence[float], right: Sequence[bool]) -> tuple[Numbers, Numbers]:
    if not len(confidence):
        raise DataError("there are no rows to score")
    if len(right) != len(confidence):
        raise ValueError(f"{len(confidence)} confidences and {len(right)} rows that are right or not")
    sure, wins = np.asarray(confidence, dtype=np.float64), np.asarray(right, dtype=np.float64)
    wrong = np.flatnonzero(~((sure >= 0) & (sure <= 1)))
    if wrong.size:
        raise ModelError(f"the probability of row {wrong[0] + 1} of the scored rows is {sure[wrong[0]]}")
    return sure, wins


def _places(sure: Numbers, bins: int) -> Rows:
    """Each row's bin (N,): bin i holds (i / bins, (i + 1) / bins], and the first one 0 as well."""
    return np.searchsorted(np.linspace(0, 1, bins + 1)[1:-1], sure, side="left").astype(np.int64)


def _error(sure: Numbers, wins: Numbers, place: Rows, bins: int) -> float:
    return float(np.abs(np.bincount(place, wins - sure, minlength=bins)).sum() / sure.size)
