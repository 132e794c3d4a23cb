"""How long answers are. Knows counts of tokens."""

from collections.abc import Sequence

import numpy as np

from mlxtune.errors import DataError
from mlxtune.metrics.intervals import bootstrap, median_interval
from mlxtune.report.score import Score


def answer_length(answer_tokens: Sequence[int], groups: Sequence[object] | None = None) -> Score:
    """The mean tokens of an answer; answer_tokens: (N,). "Lower" is better in that it is cheaper, not truer.

    The interval is the bootstrap's over rows. Raises DataError for no rows.
    """
    if not len(answer_tokens):
        raise DataError("there are no rows to score")
    low, high = bootstrap([float(each) for each in answer_tokens], groups=groups)
    return _score("answer_length", float(np.mean(answer_tokens)), max(0.0, low), high, len(answer_tokens))


def answer_length_median(answer_tokens: Sequence[int]) -> Score:
    """The median tokens of an answer, with the interval of `median_interval`, which knows no groups of rows."""
    if not len(answer_tokens):
        raise DataError("there are no rows to score")
    low, high = median_interval([float(each) for each in answer_tokens])
    return _score("answer_length_median", float(np.median(answer_tokens)), low, high, len(answer_tokens))


def _score(metric: str, value: float, low: float, high: float, n: int) -> Score:
    return Score(metric=metric, value=value, unit="tokens", ci_low=low, ci_high=high, n=n, better="lower")
