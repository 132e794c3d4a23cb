"""Precision, recall and F1 of each class, and the mean of F1 over classes. Knows labels, not how they were found."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mlxtune.errors import DataError
from mlxtune.metrics.intervals import bootstrap_sums, group_numbers, wilson
from mlxtune.report.score import Score

Numbers = npt.NDArray[np.float64]
Rows = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassRow:
    """One class: precision, recall and F1 in [0, 1], and in how many rows it is expected."""

    label: str
    precision: float
    recall: float
    f1: float
    support: int


def per_class(given: Sequence[str | None], expected: Sequence[str]) -> list[ClassRow]:
    """The figures of each expected class, in the order of labels; given, expected: (N,).

    A given label that is never expected, or None, is wrong for the row's class and counts for no other. A precision
    of a class that is never given is 0. Raises DataError for no rows.
    """
    labels, wanted, got = _numbered(given, expected)
    right, support, answered = _counts(wanted, got, len(labels))
    return [
        ClassRow(
            label=label,
            precision=float(right[i] / answered[i]) if answered[i] else 0.0,
            recall=float(right[i] / support[i]),
            f1=float(2 * right[i] / (support[i] + answered[i])),
            support=int(support[i]),
        )
        for i, label in enumerate(labels)
    ]


def macro_f1(
    given: Sequence[str | None], expected: Sequence[str], groups: Sequence[object] | None = None, seed: int = 0
) -> Score:
    """The mean over the expected classes of F1 = 2 · right / (expected + given), in [0, 1]; see `per_class`.

    The interval is `bootstrap_sums` over rows (groups); a resample's mean is over the classes that it expects. Where
    every row is right, or none, no resample differs: the other end is then Wilson's of that many rows.
    """
    labels, wanted, got = _numbered(given, expected)
    value = float(_macro(np.concatenate(_counts(wanted, got, len(labels)))[None])[0])
    same = wanted == got
    if same.all() or not same.any():
        n = len(wanted) if groups is None else len(set(groups))
        low, high = wilson(n if same.all() else 0, n)
    else:
        place = np.arange(len(wanted)) if groups is None else group_numbers(groups)
        low, high = bootstrap_sums(_macro, _columns(wanted, got, len(labels), place), seed)
        low, high = max(0.0, low), min(1.0, high)
    return Score(metric="macro_f1", value=value, unit="share", ci_low=low, ci_high=high, n=len(wanted), better="higher")


def _macro(sums: Numbers) -> Numbers:
    """The mean F1 (B,) of right, expected and given rows of each class (B, 3K)."""
    right, support, answered = np.split(sums, 3, axis=1)
    there = support > 0
    f1 = 2 * right / np.where(there, support + answered, 1)
    mean: Numbers = (f1 * there).sum(axis=1) / there.sum(axis=1)
    return mean


def _columns(wanted: Rows, got: Rows, classes: int, place: Rows) -> Numbers:
    """What each row, or each group of rows of equal `place` (N,), adds to right, expected and given: (G, 3K)."""
    labels = np.stack([np.where(wanted == got, wanted, classes), wanted, got])  # (3, N), K for none of them
    at = (3 * place + np.arange(3)[:, None]) * (classes + 1) + labels
    groups = int(place.max()) + 1
    columns = np.bincount(at.ravel(), minlength=groups * 3 * (classes + 1)).reshape(groups, 3, classes + 1)
    return columns[:, :, :classes].reshape(groups, 3 * classes).astype(np.float64)


def _numbered(given: Sequence[str | None], expected: Sequence[str]) -> tuple[list[str], Rows, Rows]:
    """The expected labels, sorted, and the number (N,) of each row's; a given one that is none of them gets K."""
    if not expected:
        raise DataError("there are no rows to score")
    labels = sorted(set(expected))
    number: dict[str | None, int] = {label: i for i, label in enumerate(labels)}
    if len(given) != len(expected):
        raise ValueError(f"{len(given)} given and {len(expected)} expected labels")
    wanted = np.array([number[one] for one in expected], dtype=np.int64)
    return labels, wanted, np.array([number.get(one, len(labels)) for one in given], dtype=np.int64)


def _counts(wanted: Rows, got: Rows, classes: int) -> tuple[Numbers, Numbers, Numbers]:
    """Of each class (K,): rows where it is right, expected, and given."""
    right = np.bincount(wanted[wanted == got], minlength=classes)
    support = np.bincount(wanted, minlength=classes)
    answered = np.bincount(got, minlength=classes + 1)[:classes]
    return right.astype(np.float64), support.astype(np.float64), answered.astype(np.float64)
