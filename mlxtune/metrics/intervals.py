"""95 % intervals of shares, of means, and of any figure of rows. Knows numbers, not what they measure."""

import math
from collections.abc import Callable, Iterator, Sequence
from statistics import NormalDist
from typing import Literal

import numpy as np
import numpy.typing as npt

from mlxtune.report.score import Score

Numbers = npt.NDArray[np.float64]
Rows = npt.NDArray[np.int64]
NORMAL = NormalDist()
Z = 1.959963984540054  # the 97.5 % point of the standard normal distribution
RESAMPLES = 2000
DRAWS_AT_ONCE = 1_000_000  # bounds the memory of the bootstrap, whatever the number of rows
LEFT_OUT = 1000  # most blocks of rows that are left out, one at a time
LEAST_ERROR = 0.25  # of a resample's standard error, as a share of that of the rows: see `bootstrap_ratio`


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


def share(metric: str, right: int, n: int, better: Literal["higher", "lower"] = "higher") -> Score:
    """The Score of `right` out of `n` rows, as a share in [0, 1] with Wilson's interval."""
    low, high = wilson(right, n)
    return Score(metric=metric, value=right / n, unit="share", ci_low=low, ci_high=high, n=n, better=better)


def mean_share(
    metric: str,
    values: Sequence[float],
    weights: Sequence[float] | None = None,
    groups: Sequence[object] | None = None,
    seed: int = 0,
    better: Literal["higher", "lower"] = "higher",
) -> Score:
    """The Score of the (weighted) mean of `values` (N,), each in [0, 1]; other arguments as for `bootstrap`.

    Unweighted zeros and ones without groups get Wilson's interval, all else the bootstrap's, cut at 0 and 1. Where
    every value is 0, or every value 1, no resample differs: the other end is then Wilson's for as many rows (groups).
    A single row or group that is neither says nothing about others: 0 to 1.
    """
    x, w, place = _checked(values, weights, groups)
    if not ((x >= 0) & (x <= 1)).all():
        raise ValueError("a share outside [0, 1]")
    count = int(place.max()) + 1
    value = float((x * w).sum() / w.sum())
    if weights is None and count == x.size and ((x == 0) | (x == 1)).all():
        low, high = wilson(round(float(x.sum())), count)
    elif (x == x[0]).all() and x[0] in (0, 1):
        low, high = wilson(count * round(x[0]), count)
    elif count == 1:
        low, high = 0.0, 1.0
    else:
        low, high = bootstrap(values, weights, groups, seed)
    low, high = max(0.0, min(low, value)), min(1.0, max(high, value))
    return Score(metric=metric, value=value, unit="share", ci_low=low, ci_high=high, n=x.size, better=better)


def bootstrap(
    values: Sequence[float],
    weights: Sequence[float] | None = None,
    groups: Sequence[object] | None = None,
    seed: int = 0,
) -> tuple[float, float]:
    """The 95 % interval of the mean of `values` (N,), each counted `weights` (N,) times.

    groups (N,): rows of equal groups belong together and are drawn together. Method and errors: `bootstrap_ratio`.
    """
    x, w, place = _checked(values, weights, groups)
    return bootstrap_ratio(np.bincount(place, x * w).tolist(), np.bincount(place, w).tolist(), seed)


def bootstrap_ratio(
    numerators: Sequence[float], denominators: Sequence[float], seed: int = 0, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """The 95 % interval of `sum(numerators) / sum(denominators)`, both (N,), over rows: `bootstrap_ratios` of one set.

    Raises ValueError for no rows, different lengths, or denominators that are not positive.
    """
    over, under = np.asarray(numerators, dtype=np.float64), np.asarray(denominators, dtype=np.float64)
    if over.ndim != 1 or over.shape != under.shape or not over.size or not (under > 0).all():
        raise ValueError(f"numerators {over.shape} and denominators {under.shape}, which must be positive")
    low, high = bootstrap_ratios(over[:, None], under[:, None], seed, resamples)
    return float(low[0]), float(high[0])


def bootstrap_ratios(
    over: Numbers, under: Numbers, seed: int = 0, resamples: int = RESAMPLES
) -> tuple[Numbers, Numbers]:
    """The 95 % bootstrap-t intervals of R = Σ over / Σ under, of S sets of N rows at once: (N, S) each -> (S,), (S,).

    Each resample draws N rows with replacement, giving a ratio R* and its standard error s*, as R has s:

        s = √(Σ (over - R · under)²) / Σ under
        t* = (R* - R) / max(s*, s/4)        interval: R - s · (97.5 and 2.5 percentiles of t*)

    Percentile and BCa intervals miss the mean of skewed values, such as losses, too often; see
    `scripts/bench_intervals.py`. The least s* keeps the interval finite where a few rows make up all the spread: a
    resample without them would have an error of nothing. Rows that are all alike, or one row, give an interval
    without width: they say nothing about other rows.
    Source: B. Efron and R. J. Tibshirani, "An Introduction to the Bootstrap" (1993), section 12.5, with the error of
    a ratio from W. G. Cochran, "Sampling Techniques" (1977), section 2.11.
    """
    n, sets = over.shape
    ratio = over.sum(axis=0) / under.sum(axis=0)
    off = over - ratio * under
    error = np.sqrt((off**2).sum(axis=0)) / under.sum(axis=0)
    error[error <= 1e-12 * np.abs(ratio)] = 0  # rounding
    columns = np.stack([off, under, off**2, off * under, under**2], axis=1).reshape(n, 5 * sets)
    parts = []
    for sums in _resampled_sums(columns, seed, resamples):
        sums = sums.reshape(-1, 5, sets)
        off_sum, weight, squares, cross, weights_squared = sums.transpose(1, 0, 2)  # (some resamples, S) each
        moved = off_sum / weight  # R* - R
        squares = np.maximum(squares - 2 * moved * cross + moved**2 * weights_squared, 0)
        least = np.where(error > 0, LEAST_ERROR * error, 1)
        parts.append(moved / np.maximum(np.sqrt(squares) / weight, least))
    low, high = np.percentile(np.concatenate(parts), [2.5, 97.5], axis=0)
    return ratio - high * error, ratio - low * error


def bootstrap_sums(
    figure: Callable[[Numbers], Numbers], columns: Numbers, seed: int = 0, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """The 95 % interval of a figure of sums over rows: `figure` of sums (B, C) is (B,), `columns` (N, C) has the rows.

    Resamples are biased against the rows as these are against the truth: by b, their mean less the figure. Their 2.5
    and 97.5 percentiles are off by 2b; less 2b, they are right where many rows say what b is. With few, each of the two
    holds the truth too seldom: the interval is the one that holds both. `scripts/bench_intervals.py` has how often.
    Source: B. Efron and R. J. Tibshirani, "An Introduction to the Bootstrap" (1993), sections 10.2 and 13.3.
    """
    value = float(figure(columns.sum(axis=0)[None])[0])
    found = np.concatenate([figure(sums) for sums in _resampled_sums(columns, seed, resamples)])
    low, high = np.percentile(found, [2.5, 97.5])
    twice = 2 * (float(found.mean()) - value)
    return float(low) - max(0.0, twice), float(high) - min(0.0, twice)


def resampled(
    statistic: Callable[[Rows], float],
    n: int,
    groups: Sequence[object] | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> tuple[float, Numbers, Numbers]:
    """The figure of rows, that of each resample (B,), and that without each row or group (N,).

    `statistic` gets row numbers (M,), which may repeat. groups (n,): rows of equal groups are drawn together, so that M
    can differ from n. Of a single row or group there is nothing to resample: both arrays hold the figure. Of more than
    LEFT_OUT rows or groups as many blocks are left out instead, every LEFT_OUT-th one together: the time grows with n,
    not its square. Raises ValueError for no rows.
    """
    if n < 1 or (groups is not None and len(groups) != n):
        raise ValueError(f"{n} rows and {n if groups is None else len(groups)} groups")
    place = np.arange(n) if groups is None else group_numbers(groups)
    count = int(place.max()) + 1
    order, sizes = np.argsort(place, kind="stable"), np.bincount(place)
    starts = np.cumsum(sizes) - sizes

    def of(drawn: Rows) -> float:
        if count == n:
            return statistic(order[drawn])
        taken = sizes[drawn]
        within = np.arange(taken.sum()) - np.repeat(np.cumsum(taken) - taken, taken)
        return statistic(order[np.repeat(starts[drawn], taken) + within])

    everything = np.arange(count)
    value = of(everything)
    if count == 1:
        return value, np.array([value]), np.array([value])
    found = np.array([of(each) for part in _resamples(count, seed, resamples) for each in part])
    blocks = min(count, LEFT_OUT)
    return value, found, np.array([of(everything[everything % blocks != block]) for block in range(blocks)])


def _checked(
    values: Sequence[float], weights: Sequence[float] | None, groups: Sequence[object] | None
) -> tuple[Numbers, Numbers, Rows]:
    """Values, weights and group numbers, each (N,)."""
    x = np.asarray(values, dtype=np.float64)
    w = np.ones_like(x) if weights is None else np.asarray(weights, dtype=np.float64)
    if x.ndim != 1 or x.shape != w.shape or not x.size or not (w > 0).all():
        raise ValueError(f"values {x.shape} and weights {w.shape}, which must be positive")
    if groups is not None and len(groups) != x.size:
        raise ValueError(f"values {x.shape} and {len(groups)} groups")
    return x, w, np.arange(x.size) if groups is None else group_numbers(groups)


def group_numbers(groups: Sequence[object]) -> Rows:
    """The number (N,) of each row's group, counted as they come first."""
    numbers: dict[object, int] = {}
    return np.array([numbers.setdefault(each, len(numbers)) for each in groups], dtype=np.int64)


def _resamples(n: int, seed: int, resamples: int) -> Iterator[Rows]:
    """Row numbers drawn with replacement, (some of the resamples, n) at a time."""
    generator = np.random.default_rng(seed)
    chunk = max(1, DRAWS_AT_ONCE // n)
    for start in range(0, resamples, chunk):
        yield generator.integers(0, n, size=(min(chunk, resamples - start), n))


def _resampled_sums(columns: Numbers, seed: int, resamples: int) -> Iterator[Numbers]:
    """The sums of resampled rows of `columns` (N, C), for some resamples at a time: (B, C)."""
    n = len(columns)
    for drawn in _resamples(n, seed, resamples):
        flat = drawn + n * np.arange(len(drawn))[:, None]
        times = np.bincount(flat.ravel(), minlength=n * len(drawn)).reshape(len(drawn), n)
        yield times.astype(np.float64) @ columns


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """The narrowest pair of k-th smallest and k-th largest values that holds the median in at least 95 % of samples.

    P(X < k) of N coin flips at each side; the whole range where N is too small for that (below 6).
    Source: W. J. Conover, "Practical Nonparametric Statistics" (1999), section 3.2. Raises ValueError for no values.
    """
    ordered = sorted(values)
    n = len(ordered)
    if not n:
        raise ValueError("no values")
    ways = tail = 1  # n over k, and the sum of those up to k
    k = 0
    while 40 * tail <= 2**n:  # a tail of 2.5 %
        k += 1
        ways = ways * (n - k + 1) // k
        tail += ways
    k = max(1, k)
    return ordered[k - 1], ordered[n - k]
