import math
import random
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxtune.metrics import intervals
from mlxtune.metrics.intervals import (
    Z,
    bootstrap,
    bootstrap_ratio,
    bootstrap_ratios,
    bootstrap_sums,
    mean_share,
    median_interval,
    share,
    wilson,
)
from mlxtune.report.score import Score


def wilson_by_roots(successes: int, n: int) -> tuple[float, float]:
    """The interval as Wilson defines it: the shares q with (p - q)² = z² q(1 - q)/n, by bisection in fractions."""
    share, z = Fraction(successes, n), Fraction(Z)

    def outside(q: Fraction) -> bool:
        return (share - q) ** 2 > z**2 * q * (1 - q) / n

    ends = []
    for far in (Fraction(0), Fraction(1)):
        away, near = far, share
        for _ in range(60):
            middle = (away + near) / 2
            away, near = (middle, near) if outside(middle) else (away, middle)
        ends.append(float(near))
    return ends[0], ends[1]


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        # 0/10: low 0, high z²/(10 + z²) = 3.841459 / 13.841459
        (0, 10, 0.0, 0.2775328),
        # 5/10: (0.5 + 0.1920729 ± 1.959964 √(0.025 + 0.0096036)) / 1.3841459
        (5, 10, 0.2365931, 0.7634069),
        # 147/158: (0.9303797 + 0.0121565 ± 1.959964 √(0.00040996 + 0.00003847)) / 1.0243130
        (147, 158, 0.8796450, 0.9606835),
        (10, 10, 0.7224672, 1.0),
    ],
)
def test_wilson_is_the_hand_worked_interval(successes: int, n: int, low: float, high: float) -> None:
    assert wilson(successes, n) == pytest.approx((low, high), abs=2e-6)


@pytest.mark.parametrize(("successes", "n"), [(0, 1), (1, 1), (1, 3), (88, 96), (3, 1000), (999, 1000)])
def test_wilson_solves_its_equation(successes: int, n: int) -> None:
    assert wilson(successes, n) == pytest.approx(wilson_by_roots(successes, n), abs=1e-12)


def test_wilson_is_exact_at_the_ends_and_mirrors() -> None:
    for n in range(1, 200):
        assert wilson(0, n)[0] == 0.0
        assert wilson(n, n)[1] == 1.0
        low, high = wilson(n // 3, n)
        assert wilson(n - n // 3, n) == pytest.approx((1 - high, 1 - low), abs=1e-12)


def test_wilson_covers_the_true_share_in_95_of_100_experiments() -> None:
    generator = random.Random(7)
    for true in (0.1, 0.5, 0.9):
        covered = 0
        for _ in range(2000):
            low, high = wilson(sum(generator.random() < true for _ in range(60)), 60)
            covered += low <= true <= high
        assert 0.93 <= covered / 2000 <= 0.975


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (-1, 5), (6, 5)])
def test_wilson_refuses_what_is_no_share(successes: int, n: int) -> None:
    with pytest.raises(ValueError, match=f"{successes} successes of {n}"):
        wilson(successes, n)


@pytest.mark.parametrize("draws_at_once", [1, 50, 1_000_000])
def test_bootstrap_is_the_slow_loop_over_the_same_draws(draws_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intervals, "DRAWS_AT_ONCE", draws_at_once)
    nats, tokens = [3.0, 1.5, 8.0, 2.0, 5.5, 0.5, 4.0], [2, 1, 6, 3, 4, 1, 2]
    generator = np.random.default_rng(3)

    def ratio_and_error(rows: list[int]) -> tuple[float, float]:
        ratio = sum(nats[row] for row in rows) / sum(tokens[row] for row in rows)
        squares = sum((nats[row] - ratio * tokens[row]) ** 2 for row in rows)
        return ratio, math.sqrt(squares) / sum(tokens[row] for row in rows)

    ratio, error = ratio_and_error(list(range(7)))
    ts, floored = [], 0
    for _ in range(300):
        drawn, drawn_error = ratio_and_error([int(row) for row in generator.integers(0, 7, size=7)])
        floored += drawn_error < error / 4
        ts.append((drawn - ratio) / max(drawn_error, error / 4))
    ts.sort()

    def percentile(share: float) -> float:
        place = share * (len(ts) - 1)
        below = int(place)
        return ts[below] + (place - below) * (ts[below + 1] - ts[below])

    assert floored > 0
    found = bootstrap_ratio(nats, tokens, seed=3, resamples=300)
    assert found == pytest.approx((ratio - error * percentile(0.975), ratio - error * percentile(0.025)), rel=1e-9)


def test_bootstrap_repeats_with_its_seed_and_changes_with_it() -> None:
    nats, tokens = list(range(1, 31)), [1 + row % 4 for row in range(30)]
    assert bootstrap_ratio(nats, tokens) == bootstrap_ratio(nats, tokens, seed=0)
    assert bootstrap_ratio(nats, tokens) != bootstrap_ratio(nats, tokens, seed=1)


def test_bootstrap_weighs_rows_by_their_tokens() -> None:
    # every row has 2 nats per token, so every resample's ratio is 2; a mean of sums would spread
    assert bootstrap_ratio([2.0, 20.0, 200.0], [1, 10, 100]) == (2.0, 2.0)
    assert bootstrap([2.0, 2.0, 2.0], [1, 10, 100]) == (2.0, 2.0)
    assert bootstrap([1.5, 1.5, 2.0], [2, 4, 1]) == bootstrap_ratio([3.0, 6.0, 2.0], [2, 4, 1])


def test_rows_of_a_group_are_drawn_together() -> None:
    values, weights, groups = [1.0, 5.0, 2.0, 4.0, 3.0], [1, 2, 3, 4, 5], ["b", "a", "b", "c", "a"]
    together = bootstrap_ratio([1.0 + 6.0, 10.0 + 15.0, 16.0], [1 + 3, 2 + 5, 4])  # b, a, c
    assert bootstrap(values, weights, groups) == pytest.approx(together, rel=1e-12)
    assert bootstrap(values, weights, [5, 4, 3, 2, 1]) == bootstrap(values, weights)  # each a group of its own


@given(
    values=st.lists(st.integers(-50, 50), min_size=2, max_size=12),
    shift=st.integers(-9, 9),
    scale=st.sampled_from([0.5, 2.0, 8.0]),
)
def test_an_interval_moves_and_grows_with_its_values(values: list[int], shift: int, scale: float) -> None:
    low, high = bootstrap(values)
    moved = bootstrap([shift + scale * value for value in values])
    assert moved == pytest.approx((shift + scale * low, shift + scale * high), rel=1e-6, abs=1e-6)
    assert low <= sum(values) / len(values) + 1e-9
    assert high >= sum(values) / len(values) - 1e-9


def test_a_few_rows_that_make_up_all_the_spread_give_a_finite_interval() -> None:
    # a third of all resamples lack the one row that differs
    low, high = bootstrap([0.0] * 49 + [1.0])
    assert -0.1 < low < 0.02 < 0.08 < high < 0.15  # Wilson: 0.004 to 0.105


@pytest.mark.parametrize(
    ("n", "seed", "least", "most"),
    [(50, 1, 92.5, 95.5), (200, 2, 93.5, 96.5)],
)
def test_nineteen_of_twenty_intervals_of_skewed_means_hold_the_truth(
    n: int, seed: int, least: float, most: float
) -> None:
    # log-normal, with a skewness of 6; over the same resamples, of percentile intervals 88.7 and 91.7 in 100 do, of
    # BCa's 90.1 and 92.0
    rows = np.random.default_rng(seed).lognormal(-0.5, 1, (n, 1000))
    low, high = bootstrap_ratios(rows, np.ones_like(rows), resamples=1000)
    assert least <= 100 * ((low <= 1) & (high >= 1)).mean() <= most
    too_low, too_high = (high < 1).mean(), (low > 1).mean()
    assert too_low > too_high  # what remains is missed on the side of the long tail


def test_nineteen_of_twenty_intervals_of_groups_hold_the_truth() -> None:
    random = np.random.default_rng(4)
    size = random.integers(1, 8, size=(40, 1000)).astype(float)
    sums = size * random.normal(size=size.shape) + np.sqrt(size) * random.normal(size=size.shape)
    low, high = bootstrap_ratios(sums, size, resamples=1000)
    assert 93 <= 100 * ((low <= 0) & (high >= 0)).mean() <= 97


@pytest.mark.parametrize(("nats", "tokens"), [([], []), ([1.0], [1, 2]), ([1.0, 2.0], [1, 0]), ([[1.0]], [[1]])])
def test_bootstrap_refuses_what_has_no_ratio(nats: list[float], tokens: list[float]) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        bootstrap_ratio(nats, tokens)
    with pytest.raises(ValueError, match="must be positive"):
        bootstrap(nats, tokens)


def test_groups_and_rows_must_agree() -> None:
    with pytest.raises(ValueError, match="1 groups"):
        bootstrap([1.0, 2.0], groups=["a"])
    with pytest.raises(ValueError, match="2 rows and 1 groups"):
        intervals.resampled(lambda rows: 0.0, 2, groups=["a"])
    with pytest.raises(ValueError, match="0 rows"):
        intervals.resampled(lambda rows: 0.0, 0)


def test_the_interval_of_a_figure_of_sums_spans_the_percentiles_and_those_less_the_bias() -> None:
    rows = np.array([[3.0, 2], [1, 5], [8, 1], [2, 2], [5, 3], [0, 4]])

    def spread(sums: np.ndarray) -> np.ndarray:
        return (sums[:, 0] / sums[:, 1]) ** 2

    found = [spread(rows[drawn].sum(axis=0)[None])[0] for drawn in np.random.default_rng(5).integers(0, 6, (400, 6))]
    low, high = np.quantile(found, [0.025, 0.975])
    bias = sum(found) / 400 - (19 / 17) ** 2
    assert bias > 0.1  # of a square
    assert bootstrap_sums(spread, rows, seed=5, resamples=400) == pytest.approx((low - 2 * bias, high), rel=1e-12)
    low, high = -np.quantile(found, [0.975, 0.025])
    expected = (low, high + 2 * bias)
    assert bootstrap_sums(lambda sums: -spread(sums), rows, seed=5, resamples=400) == pytest.approx(expected, rel=1e-12)


def test_groups_of_a_figure_are_drawn_together() -> None:
    seen: set[tuple[int, ...]] = set()

    def first_rows(rows: np.ndarray) -> float:
        seen.add(tuple(rows.tolist()))
        return float(len(rows))

    value, found, without = intervals.resampled(first_rows, 5, groups=["b", "a", "b", "a", "a"], resamples=50)
    b, a = (0, 2), (1, 3, 4)
    assert seen == {b, a, b + b, a + a, b + a, a + b}
    assert (value, set(found), sorted(without)) == (5, {4, 5, 6}, [2, 3])
    value, found, without = intervals.resampled(first_rows, 2, groups=["a", "a"])  # a single group
    assert (value, *found, *without) == (2, 2, 2)


def test_a_mean_of_shares() -> None:
    assert mean_share("x", [1, 0, 1, 1]) == share("x", 3, 4)
    low, high = bootstrap([1.0, 0.25, 0.5])
    assert mean_share("x", [1.0, 0.25, 0.5]) == Score(
        metric="x", value=1.75 / 3, unit="share", ci_low=max(0.0, low), ci_high=min(1.0, high), n=3, better="higher"
    )
    assert high > 1  # so it is cut
    weighed = mean_share("x", [1.0, 0.25], [1, 3])
    assert weighed.value == 0.4375
    assert mean_share("x", [0, 1], better="lower") == share("x", 1, 2, better="lower")


def test_shares_that_are_all_alike_still_have_an_interval() -> None:
    perfect = mean_share("x", [1.0] * 20, list(range(1, 21)))
    assert (perfect.value, perfect.ci_low, perfect.ci_high) == (1, *wilson(20, 20))
    none = mean_share("x", [0.0] * 6, groups=[1, 1, 2, 2, 3, 3])
    assert (none.value, none.ci_low, none.ci_high) == (0, *wilson(0, 3))
    one = mean_share("x", [0.5])
    assert (one.value, one.ci_low, one.ci_high) == (0.5, 0, 1)
    with pytest.raises(ValueError, match="a share outside"):
        mean_share("x", [0.5, 1.01])


def test_the_interval_of_a_median_is_the_hand_worked_one() -> None:
    # of 6 coins, no heads: 1/64 < 2.5 %; of 5, 1/32. Of 10, at most one: 11/1024; of 20, at most 5: 2.07 %
    places = {1: (1, 1), 5: (1, 5), 6: (1, 6), 9: (2, 8), 10: (2, 9), 20: (6, 15)}
    assert {n: median_interval(range(n, 0, -1)) for n in places} == places
    with pytest.raises(ValueError, match="no values"):
        median_interval([])


@pytest.mark.interop
def test_the_interval_of_a_median_is_that_of_scipys_binomial() -> None:
    stats = pytest.importorskip("scipy.stats")
    for n in range(6, 150):
        k = int(stats.binom.ppf(0.025, n, 0.5))
        k += stats.binom.cdf(k, n, 0.5) <= 0.025  # ppf gives the first that reaches 2.5 %
        assert median_interval(range(1, n + 1)) == (k, n + 1 - k)


@pytest.mark.parametrize("n", [500, 5000])
def test_as_many_figures_are_computed_however_many_rows_there_are(n: int) -> None:
    counted: list[int] = []
    intervals.resampled(lambda rows: float(counted.append(rows.size) or 0), n, resamples=10)
    left_out = counted[11:]
    assert len(left_out) == min(n, intervals.LEFT_OUT)
    assert sum(n - each for each in left_out) == n  # each row is left out once


def test_blocks_tell_the_spread_that_rows_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).exponential(size=2000)
    errors = []
    for most in (2000, 100):
        monkeypatch.setattr(intervals, "LEFT_OUT", most)
        *_, without = intervals.resampled(lambda rows: float(values[rows].mean()), 2000, resamples=2)
        errors.append(np.sqrt((most - 1) / most * ((without - without.mean()) ** 2).sum()))
    assert errors[0] == pytest.approx(values.std(ddof=1) / np.sqrt(2000), rel=1e-9)
    assert errors[1] == pytest.approx(errors[0], rel=0.15)
