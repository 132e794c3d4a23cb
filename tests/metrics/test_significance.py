import itertools
import math
import random
import statistics
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxtune.metrics import significance
from mlxtune.metrics.intervals import Z, bootstrap
from mlxtune.metrics.significance import (
    Difference,
    holm,
    mcnemar,
    paired,
    paired_shares,
    rows_needed,
    rows_needed_for,
    sign_flips,
)


@pytest.mark.parametrize(
    ("fixed", "broken", "p"),
    [
        (0, 0, 1.0),
        (5, 0, 2 / 32),
        (0, 6, 2 / 64),
        (8, 1, 2 * (1 + 9) / 512),
        (3, 3, 1.0),
        (4, 3, 1.0),  # 2 · (1 + 7 + 21 + 35) / 128
        (12, 5, 2 * (1 + 17 + 136 + 680 + 2380 + 6188) / 2**17),
    ],
)
def test_mcnemar_is_the_hand_worked_p(fixed: int, broken: int, p: float) -> None:
    assert mcnemar(fixed, broken) == pytest.approx(p, rel=1e-12)


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_counts_all_coins(fixed: int, broken: int) -> None:
    n = fixed + broken
    extreme = sum(
        math.comb(n, k) for k in range(n + 1) if abs(2 * k - n) >= abs(fixed - broken)
    )  # both tails, as the coin is fair
    assert mcnemar(fixed, broken) == pytest.approx(float(Fraction(extreme, 2**n)), rel=1e-12)
    assert mcnemar(fixed, broken) == mcnemar(broken, fixed)


@pytest.mark.interop
def test_mcnemar_is_scipys() -> None:
    stats = pytest.importorskip("scipy.stats")
    for fixed, broken in [(1, 0), (8, 1), (30, 50), (400, 300), (2000, 2200)]:
        expected = stats.binomtest(fixed, fixed + broken).pvalue
        assert mcnemar(fixed, broken) == pytest.approx(expected, rel=1e-9)


def test_mcnemar_refuses_negative_counts() -> None:
    with pytest.raises(ValueError, match="-1 fixed, 2 broken"):
        mcnemar(-1, 2)


def test_holm_is_the_hand_worked_adjustment() -> None:
    # 4 · 0.01, 3 · 0.02 = 0.06, 2 · 0.025 = 0.05 raised to 0.06, 1 · 0.9
    assert holm([0.025, 0.9, 0.01, 0.02]) == pytest.approx([0.06, 0.9, 0.04, 0.06])
    assert holm([0.7, 0.8]) == [1.0, 1.0]
    assert holm([0.03]) == [0.03]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), max_size=8))
def test_holm_lies_between_none_and_bonferroni_and_keeps_order(ps: list[float]) -> None:
    adjusted = holm(ps)
    for p, made in zip(ps, adjusted, strict=True):
        assert p <= made <= min(1.0, len(ps) * p)
    for (p, made), (q, other) in itertools.combinations(zip(ps, adjusted, strict=True), 2):
        assert p > q or made <= other


def test_rights_and_wrongs_are_tested_exactly() -> None:
    before, after = [0] * 9 + [1] * 11, [1] * 8 + [0] + [1] * 10 + [0]
    low, high = paired_shares(8, 1, 20)
    assert paired(before, after) == Difference(value=7 / 20, ci_low=low, ci_high=high, p=2 * 10 / 512)


def test_the_interval_of_a_difference_of_shares_is_hand_worked() -> None:
    # 9/22 and 2/22: 0.318182 ± 1.959964 · √((0.5 - 0.101240) / 22)
    assert paired_shares(8, 1, 20) == pytest.approx((0.0543108, 0.5820529), abs=1e-6)
    low, high = paired_shares(0, 0, 20)
    assert (low, high) == (pytest.approx(-high), pytest.approx(Z * math.sqrt(2 / 22**2 * 22 / 22)))
    assert paired_shares(3, 0, 3)[1] == 1
    assert paired_shares(0, 3, 3)[0] == -1


def test_the_interval_of_a_difference_holds_the_truth() -> None:
    generator = np.random.default_rng(1)
    counts = generator.multinomial(100, [0.15, 0.08, 0.77], 4000)
    held = np.mean([low <= 0.07 <= high for low, high in (paired_shares(f, b, 100) for f, b, _ in counts.tolist())])
    assert 0.94 <= held <= 0.97


def test_other_differences_are_bootstrapped_and_their_signs_flipped() -> None:
    before, after = [1.0, 2.0, 3.0, 4.0], [0.5, 1.75, 3.25, 2.0]
    low, high = bootstrap([-0.5, -0.25, 0.25, -2.0])
    # of 16 ways to sign 0.5, 0.25, 0.25 and 2, those with a sum of at least 2.5 or at most -2.5
    assert paired(before, after) == Difference(value=-0.625, ci_low=low, ci_high=high, p=6 / 16)


def test_weights_count_rows_more_than_once() -> None:
    before, after, tokens = [1.0, 2.0, 3.0], [2.0, 1.5, 3.5], [2, 4, 10]
    found = paired(before, after, weights=tokens)
    assert found.value == (2 - 2 + 5) / 16
    assert (found.ci_low, found.ci_high) == bootstrap([1.0, -0.5, 0.5], tokens)
    assert found.p == 6 / 8  # |±2 ± 2 ± 5| >= 5
    assert paired(before, after, weights=[1, 6, 6]).p == 1  # |±1 ± 3 ± 3| >= 1; unweighted, 6/8


def test_groups_flip_together() -> None:
    before, after, groups = [0, 0, 0, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1], ["a", "a", "b", "b", "c", "c", "c"]
    found = paired(before, after, groups)
    low, high = bootstrap([1, 1, 1, 0, 1, 1, 1], groups=groups)
    assert found == Difference(value=6 / 7, ci_low=low, ci_high=high, p=2 / 8)  # 6 rows, but 3 coins
    assert mcnemar(6, 0) < 0.05


def test_nothing_changed() -> None:
    assert paired([0.5, 0.25], [0.5, 0.25]) == Difference(value=0, ci_low=0, ci_high=0, p=1)
    low, high = paired_shares(0, 0, 2)
    assert paired([1, 1, 0], [1, 1, 0], ["a", "a", "b"]) == Difference(value=0, ci_low=low, ci_high=high, p=1)


@pytest.mark.parametrize(("before", "after"), [([], []), ([1.0], [1.0, 2.0]), ([[1.0]], [[1.0]])])
def test_rows_must_be_the_same(before: list[float], after: list[float]) -> None:
    with pytest.raises(ValueError, match="before"):
        paired(before, after)


@given(st.lists(st.integers(-9, 9), min_size=1, max_size=9))
def test_signs_are_flipped_all_ways(apart: list[int]) -> None:
    sums = [
        abs(sum(s * d for s, d in zip(signs, apart, strict=True)))
        for signs in itertools.product((-1, 1), repeat=len(apart))
    ]
    expected = sum(each >= abs(sum(apart)) for each in sums) / len(sums)
    assert sign_flips(np.array(apart, dtype=float)) == expected


def test_equal_sums_are_equal_in_spite_of_rounding() -> None:
    for scale in (0.1, 1 / 3, 1e-8):
        apart = np.array([3, -1, 2, -2, 5, 7, -3, 1, 1, 4]) * scale
        assert sign_flips(apart) == sign_flips(np.rint(apart / scale))


def test_random_flips_come_close_to_all(monkeypatch: pytest.MonkeyPatch) -> None:
    apart = np.random.default_rng(2).normal(0.4, 1, 12)
    exact = sign_flips(apart)
    monkeypatch.setattr(significance, "EXACT_FLIPS", 0)
    assert 0.05 < exact < 0.5
    assert sign_flips(apart) == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 10_000))
    assert sign_flips(apart) == sign_flips(apart, seed=0) != sign_flips(apart, seed=1)


def test_a_difference_beyond_all_random_flips_has_a_p_above_zero() -> None:
    assert sign_flips(np.ones(50)) == 1 / 10_001


@pytest.mark.interop
def test_signs_flipped_as_scipy_flips_them() -> None:
    stats = pytest.importorskip("scipy.stats")
    apart = np.random.default_rng(3).normal(0.5, 1, 10)
    expected = stats.permutation_test(
        (apart, np.zeros(10)), lambda a, b: np.mean(a - b), permutation_type="samples", vectorized=False
    )
    assert sign_flips(apart) == pytest.approx(expected.pvalue, rel=1e-9)


def test_false_findings_stay_below_the_level() -> None:
    generator = np.random.default_rng(4)
    found = [sign_flips(np.rint(generator.normal(size=10) * 4)) < 0.05 for _ in range(800)]
    assert 0.02 <= np.mean(found) <= 0.065


def power(m: int, fixed: float, broken: float, level: float) -> float:
    """How often `mcnemar` is below a level on m rows with these shares of fixed and broken ones."""

    def binomial(n: int, k: int, p: float) -> float:
        if p in (0, 1):
            return float(k == n * p)
        log = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
        return math.exp(log + k * math.log(p) + (n - k) * math.log(1 - p))

    changed, total = fixed + broken, 0.0
    for n in range(m + 1):
        if (weight := binomial(m, n, changed)) > 1e-7:
            total += weight * sum(binomial(n, k, fixed / changed) for k in range(n + 1) if mcnemar(k, n - k) < level)
    return total


@pytest.mark.parametrize(
    ("fixed", "broken", "n", "level", "rows", "shown"),
    [
        (12, 5, 200, 0.05, 599, 0.818), (10, 0, 100, 0.05, 96, 0.927), (3, 1, 50, 0.05, 439, 0.819),
        (60, 10, 200, 0.05, 50, 0.854), (12, 5, 200, 0.05 / 6, 894, 0.818),
    ],
)  # fmt: skip
def test_rows_needed_give_the_power(fixed: int, broken: int, n: int, level: float, rows: int, shown: float) -> None:
    assert rows_needed(fixed, broken, n, level) == rows
    assert power(rows, fixed / n, broken / n, level) == pytest.approx(shown, abs=0.002)  # 80 % or more


def test_rows_needed_solve_connors_inequality() -> None:
    draw = random.Random(5)
    for _ in range(200):
        n = draw.randint(2, 500)
        fixed = draw.randint(0, n)
        broken = draw.randint(0, n - fixed)
        m = rows_needed(fixed, broken, n)
        if fixed == broken:
            assert m is None
            continue
        size, changed = abs(fixed - broken) / n, (fixed + broken) / n

        def lacks(rows: int, size: float = size, changed: float = changed) -> float:
            z, power_z = statistics.NormalDist().inv_cdf(0.975), statistics.NormalDist().inv_cdf(0.8)
            return z * math.sqrt(rows * changed) + power_z * math.sqrt(rows * (changed - size**2)) - rows * size + 1

        assert m is not None
        assert lacks(m) <= 1e-9
        assert lacks(m - 1) >= -1e-9


@pytest.mark.parametrize(("fixed", "broken", "n"), [(-1, 0, 5), (3, 3, 5), (0, 0, 0)])
def test_rows_needed_refuses_what_is_no_count(fixed: int, broken: int, n: int) -> None:
    with pytest.raises(ValueError, match="fixed and"):
        rows_needed(fixed, broken, n)


def test_rows_needed_for_differences_of_any_size() -> None:
    # mean 1, deviation 2: (1.959964 + 0.841621)² · 4 = 31.4
    assert rows_needed_for([0.0, 0.0, 0.0], [-1.0, 1.0, 3.0]) == 32
    # (2.575829 + 0.841621)² · 4 = 46.7
    assert rows_needed_for([0.0, 0.0, 0.0], [-1.0, 1.0, 3.0], 0.01) == 47
    assert rows_needed_for([1.0, 2.0], [2.0, 3.0]) is None
    assert rows_needed_for([1.0, 2.0], [2.0, 1.0]) is None
    assert rows_needed_for([1.0], [2.0]) is None
