import random
from fractions import Fraction

import numpy as np
import pytest

from mlxtune.metrics import intervals
from mlxtune.metrics.intervals import Z, bootstrap_ratio, wilson


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
    ratios = []
    for _ in range(300):
        rows = [int(row) for row in generator.integers(0, 7, size=7)]
        ratios.append(sum(nats[row] for row in rows) / sum(tokens[row] for row in rows))
    ratios.sort()

    def percentile(share: float) -> float:
        place = share * (len(ratios) - 1)
        below = int(place)
        return ratios[below] + (place - below) * (ratios[below + 1] - ratios[below])

    found = bootstrap_ratio(nats, tokens, seed=3, resamples=300)
    assert found == pytest.approx((percentile(0.025), percentile(0.975)), rel=1e-12)


def test_bootstrap_repeats_with_its_seed_and_changes_with_it() -> None:
    nats, tokens = list(range(1, 31)), [1 + row % 4 for row in range(30)]
    assert bootstrap_ratio(nats, tokens) == bootstrap_ratio(nats, tokens, seed=0)
    assert bootstrap_ratio(nats, tokens) != bootstrap_ratio(nats, tokens, seed=1)


def test_bootstrap_weighs_rows_by_their_tokens() -> None:
    # every row has 2 nats per token, so every resample's ratio is 2; a mean of sums would spread
    assert bootstrap_ratio([2.0, 20.0, 200.0], [1, 10, 100]) == (2.0, 2.0)


def test_bootstrap_covers_the_true_ratio_in_most_experiments() -> None:
    generator = np.random.default_rng(11)
    covered = 0
    for seed in range(300):
        tokens = generator.integers(3, 20, size=80)
        nats = tokens * generator.gamma(2.0, 0.5, size=80)  # 1 nat per token on average
        low, high = bootstrap_ratio(list(nats), list(tokens), seed=seed, resamples=300)
        covered += low <= 1.0 <= high
    assert 0.88 <= covered / 300 <= 0.99


@pytest.mark.parametrize(("nats", "tokens"), [([], []), ([1.0], [1, 2]), ([1.0, 2.0], [1, 0]), ([[1.0]], [[1]])])
def test_bootstrap_refuses_what_has_no_ratio(nats: list[float], tokens: list[float]) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        bootstrap_ratio(nats, tokens)
