"""95 % intervals of shares and of ratios of sums. Knows numbers, not what they measure."""

import math
from collections.abc import Sequence

import numpy as np

from mlxtune.report.score import Score

Z = 1.959963984540054  # the 97.5 % point of the standard normal distribution
DRAWS_AT_ONCE = 1_000_000  # bounds the memory of the bootstrap, whatever the number of rows


def wilson(successes: int, n: int) -> tuple[float, float]:
    """The 95 % score interval of a share `p = successes / n`, both ends in [0, 1].

        (p + z²/2n ± z √(p(1 - p)/n + z²/4n²)) / (1 + z²/n)

    Source: E. B. Wilson, "Probable inference, the law of succession, and statistical inference", Journal of the
    American Statistical Association 22 (1927), 209-212. Raises ValueError unless 0 <= successes <= n and n >= 1.
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n}")
    share = successes / n
    centre = share + Z**2 / (2 * n)
    spread = Z * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
    low = (centre - spread) / (1 + Z**2 / n)
    high = (centre + spread) / (1 + Z**2 / n)
    # the ends are exact at 0 and n successes; rounding would put them a hair outside
    return (0.0 if successes == 0 else low), (1.0 if successes == n else high)


def bootstrap_ratio(
    numerators: Sequence[float], denominators: Sequence[float], seed: int = 0, resamples: int = 2000
) -> tuple[float, float]:
    """The 95 % percentile bootstrap interval of `sum(numerators) / sum(denominators)`, both (N,), over rows.

    Each resample draws N rows with replacement; the ends are the 2.5 and 97.5 percentiles of the resampled ratios.
    One row gives an interval without width: it says nothing about other rows.
    Source: B. Efron and R. J. Tibshirani, "An Introduction to the Bootstrap" (1993), chapter 13.
    Raises ValueError for no rows, different lengths or a denominator that is not positive.
    """
    over, under = np.asarray(numerators, dtype=np.float64), np.asarray(denominators, dtype=np.float64)
    if over.ndim != 1 or over.shape != under.shape or not over.size or not (under > 0).all():
        raise ValueError(f"numerators {over.shape} and denominators {under.shape}, which must be positive")
    generator = np.random.default_rng(seed)
    chunk = max(1, DRAWS_AT_ONCE // over.size)
    ratios = []
    for start in range(0, resamples, chunk):
        drawn = generator.integers(0, over.size, size=(min(chunk, resamples - start), over.size))  # (resamples, N)
        ratios.append(over[drawn].sum(axis=1) / under[drawn].sum(axis=1))
    low, high = np.percentile(np.concatenate(ratios), [2.5, 97.5])
    return float(low), float(high)


def share(metric: str, right: int, n: int) -> Score:
    """The Score of `right` out of `n` rows, as a share in [0, 1] with Wilson's interval."""
    low, high = wilson(right, n)
    return Score(metric=metric, value=right / n, unit="share", ci_low=low, ci_high=high, n=n, better="higher")
