"""Whether a difference between two candidates on the same rows is more than chance. Knows numbers of rows only."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from mlxtune.metrics.intervals import NORMAL, Z, bootstrap, group_numbers
from mlxtune.report.decision import LEVEL

EXACT_FLIPS = 12  # up to so many pairs, all ways to flip their signs are tried
FLIPS = 10_000
POWER_Z = NORMAL.inv_cdf(0.8)


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Mean of after - before over rows, with its 95 % interval, and the two-sided p of "there is none"."""

    value: float
    ci_low: float
    ci_high: float
    p: float


def mcnemar(fixed: int, broken: int) -> float:
    """The exact two-sided p of as many rows fixed and broken, if each were as likely: min(1, 2 · P(X <= the fewer)).

    X is binomial of fixed + broken trials of 1/2. Source: Q. McNemar, "Note on the sampling error of the difference
    between correlated proportions or percentages", Psychometrika 12 (1947), 153-157, in its exact form. Raises
    ValueError for negative numbers.
    """
    if fixed < 0 or broken < 0:
        raise ValueError(f"{fixed} fixed, {broken} broken")
    n = fixed + broken
    tail = ways = 1
    for k in range(min(fixed, broken)):
        ways = ways * (n - k) // (k + 1)
        tail += ways
    return min(1.0, float(Fraction(2 * tail, 2**n)))  # whole numbers: exact however many there are


def holm(ps: Sequence[float]) -> list[float]:
    """p-values of several comparisons, adjusted so that the chance of any false finding stays below the level.

    The k-th smallest of m is multiplied by m - k + 1, never below the one before it, at most 1; order is kept.
    Source: S. Holm, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of Statistics 6
    (1979), 65-70.
    """
    adjusted = [0.0] * len(ps)
    largest = 0.0
    for before, place in enumerate(sorted(range(len(ps)), key=lambda each: ps[each])):
        largest = max(largest, min(1.0, (len(ps) - before) * ps[place]))
        adjusted[place] = largest
    return adjusted


def paired(
    before: Sequence[float],
    after: Sequence[float],
    groups: Sequence[object] | None = None,
    seed: int = 0,
    weights: Sequence[float] | None = None,
) -> Difference:
    """The mean difference after - before, both (N,), over the same rows; `groups` and `weights` as for `bootstrap`.

    Rights and wrongs (zeros and ones) without groups or weights: Bonett and Price's interval, and McNemar's exact p.
    All else: the bootstrap's interval, and p by flipping signs, which takes the differences of rows (groups) as
    symmetric about zero where there is none. Interval and p are of different tests: close to the border, they may
    disagree; p decides. Raises ValueError for no rows or different lengths.
    """
    old, new = np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64)
    if old.shape != new.shape or old.ndim != 1 or not old.size:
        raise ValueError(f"before {old.shape} and after {new.shape}")
    apart = new - old
    rights = bool(np.isin(old, (0, 1)).all() and np.isin(new, (0, 1)).all())
    if rights and weights is None and groups is None:
        fixed, broken = int((apart > 0).sum()), int((apart < 0).sum())
        low, high = paired_shares(fixed, broken, old.size)
        return Difference(value=(fixed - broken) / old.size, ci_low=low, ci_high=high, p=mcnemar(fixed, broken))
    low, high = bootstrap(apart.tolist(), weights, groups, seed)
    place = np.arange(apart.size) if groups is None else group_numbers(groups)
    if rights and not apart.any():  # no resample differs
        low, high = paired_shares(0, 0, int(place.max()) + 1)
    w = np.ones_like(apart) if weights is None else np.asarray(weights, dtype=np.float64)
    sums = np.asarray(np.bincount(place, apart * w), dtype=np.float64)
    return Difference(value=float((apart * w).sum() / w.sum()), ci_low=low, ci_high=high, p=sign_flips(sums, seed))


def paired_shares(fixed: int, broken: int, n: int) -> tuple[float, float]:
    """The 95 % interval of (fixed - broken) / n, cut at -1 and 1.

    Wald's of n + 2 rows with one more row fixed and one more broken. Source: D. G. Bonett and R. M. Price, "Adjusted
    Wald confidence interval for a difference of binomial proportions based on paired data", Journal of Educational
    and Behavioral Statistics 37 (2012), 479-488.
    """
    better, worse = (fixed + 1) / (n + 2), (broken + 1) / (n + 2)
    spread = Z * math.sqrt((better + worse - (better - worse) ** 2) / (n + 2))
    return max(-1.0, better - worse - spread), min(1.0, better - worse + spread)


def sign_flips(differences: npt.NDArray[np.float64], seed: int = 0) -> float:
    """The two-sided p of a sum of `differences` (N,) as far from zero as theirs, if each sign were a coin's.

    All 2^N ways for up to 12 differences that are not zero, else 10,000 random ones, the given one counted among
    them. Source: R. A. Fisher, "The Design of Experiments" (1935), section 21; the count of one: B. Phipson and
    G. K. Smyth, "Permutation p-values should never be zero", Statistical Applications in Genetics and Molecular
    Biology 9 (2010), article 39.
    """
    apart = differences[differences != 0]
    if not apart.size:
        return 1.0
    least = abs(float(apart.sum())) - 1e-9 * float(np.abs(apart).sum())  # equal sums differ by rounding
    if apart.size <= EXACT_FLIPS:
        ways = np.arange(2**apart.size)[:, None] >> np.arange(apart.size) & 1
        return float((np.abs((2 * ways - 1) @ apart) >= least).mean())
    generator = np.random.default_rng(seed)
    reached = 0
    chunk = max(1, 1_000_000 // apart.size)
    for start in range(0, FLIPS, chunk):
        signs = 2 * generator.integers(0, 2, size=(min(chunk, FLIPS - start), apart.size), dtype=np.int8) - 1
        reached += int((np.abs(signs @ apart) >= least).sum())
    return (reached + 1) / (FLIPS + 1)


def rows_needed(fixed: int, broken: int, n: int, level: float = LEVEL) -> int | None:
    """How many rows would show a difference like that of `n` rows, two-sided with 80 % power; None for none.

    With d = |fixed - broken| / n and the share of changed rows c = (fixed + broken) / n, the least m for which

        m · d - 1 >= z √(m · c) + z₀.₈ √(m · (c - d²))        z: the normal point that the `level` leaves above

    Source: R. J. Connor, "Sample size for testing differences in proportions for the paired-sample design",
    Biometrics 43 (1987), 207-211; the 1 is A. L. Edwards' correction for continuity (Psychometrika 13 (1948),
    185-187), as the exact test that decides is that much stricter.
    """
    if fixed < 0 or broken < 0 or n < fixed + broken or n < 1:
        raise ValueError(f"{fixed} fixed and {broken} broken of {n} rows")
    if fixed == broken:
        return None
    size, changed = abs(fixed - broken) / n, (fixed + broken) / n
    spread = NORMAL.inv_cdf(1 - level / 2) * math.sqrt(changed) + POWER_Z * math.sqrt(changed - size**2)
    return math.ceil(((spread + math.sqrt(spread**2 + 4 * size)) / (2 * size)) ** 2)


def rows_needed_for(before: Sequence[float], after: Sequence[float], level: float = LEVEL) -> int | None:
    """As `rows_needed`, for differences of any size: m = ((z + z₀.₈) · deviation / mean)², (N,) each.

    None where the mean difference is zero, or where all differences are equal. Source: G. W. Snedecor and
    W. G. Cochran, "Statistical Methods" (1989), section 6.14.
    """
    apart = np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    mean, deviation = float(apart.mean()), float(apart.std(ddof=1)) if apart.size > 1 else 0.0
    if mean == 0 or deviation == 0:
        return None
    return math.ceil(((NORMAL.inv_cdf(1 - level / 2) + POWER_Z) * deviation / mean) ** 2)
