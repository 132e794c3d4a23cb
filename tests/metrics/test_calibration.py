import math

import numpy as np
import pytest

from mlxtune.errors import DataError, ModelError
from mlxtune.metrics.calibration import Bin, Calibration, calibration, ece


def test_the_error_and_its_bins_are_hand_worked() -> None:
    confidence = [0.0, 0.95, 0.85, 0.9, 1.0, 0.95]
    right = [False, True, True, False, True, False]
    found = calibration(confidence, right)
    # 0.9 belongs to (0.8, 0.9]; 1 · |0 - 0| + 2 · |0.5 - 0.875| + 3 · |2/3 - 0.96667|, over 6
    assert found == Calibration(
        ece=pytest.approx((0 + 0.75 + 0.9) / 6),
        bins=[
            Bin(low=0.0, high=0.1, confidence=0.0, accuracy=0.0, count=1),
            Bin(low=0.8, high=0.9, confidence=0.875, accuracy=0.5, count=2),
            Bin(low=0.9, high=1.0, confidence=pytest.approx(2.9 / 3), accuracy=pytest.approx(2 / 3), count=3),
        ],
    )
    score = ece(confidence, right)
    assert score.value == found.ece
    assert (score.metric, score.unit, score.n, score.better) == ("ece", "share", 6, "lower")
    assert 0 <= score.ci_low <= score.value < score.ci_high <= 1


def test_other_bins() -> None:
    found = calibration([0.2, 0.3, 0.9], [True, False, True], bins=2)
    assert [(each.low, each.high, each.count) for each in found.bins] == [(0.0, 0.5, 2), (0.5, 1.0, 1)]
    assert found.ece == pytest.approx((2 * abs(0.5 - 0.25) + 0.1) / 3)


def test_a_model_that_is_sure_and_right() -> None:
    score = ece([1.0] * 20, [True] * 20)
    assert (score.value, score.ci_low, score.ci_high) == (0, 0, 0)


def test_the_interval_knows_that_the_error_is_too_large_by_nature() -> None:
    """Of models that are right just as often as they are sure, and of some too sure by 0.2."""
    random = np.random.default_rng(1)
    at_zero, held, values = 0, 0, []
    for _ in range(60):
        sure = random.uniform(0.5, 1, 60)
        calibrated = ece(sure.tolist(), (random.random(60) < sure).tolist())
        at_zero += calibrated.ci_low == 0
        values.append(calibrated.value)
        too_sure = ece(sure.tolist(), (random.random(60) < sure - 0.2).tolist())
        held += too_sure.ci_low <= 0.2 <= too_sure.ci_high
    assert np.mean(values) > 0.08  # the truth is 0
    assert at_zero >= 56
    assert held >= 55


def test_the_interval_is_what_its_formula_says() -> None:
    random = np.random.default_rng(4)
    sure = random.uniform(0.5, 1, 40)
    right = random.random(40) < sure - 0.3

    def error(rows: list[int]) -> float:
        return calibration(sure[rows].tolist(), right[rows].tolist()).ece

    value = error(list(range(40)))
    drawn = np.random.default_rng(0).integers(0, 40, size=(2000, 40))
    bias = np.mean([error(rows.tolist()) for rows in drawn]) - value
    without = np.array([error([row for row in range(40) if row != left]) for left in range(40)])
    deviation = math.sqrt(39 / 40 * ((without - without.mean()) ** 2).sum())
    score = ece(sure.tolist(), right.tolist())
    assert bias > 0.005
    assert score.ci_low > 0
    assert score.ci_low == pytest.approx(value - bias - 1.959964 * deviation, rel=1e-6)
    assert score.ci_high == pytest.approx(value + 1.959964 * deviation, rel=1e-6)


def test_rows_of_a_group_count_as_one() -> None:
    random = np.random.default_rng(2)
    sure = np.repeat(random.uniform(0.5, 1, 15), 4)
    right = np.repeat(random.random(15) < 0.3, 4)
    together = ece(sure.tolist(), right.tolist(), np.repeat(np.arange(15), 4).tolist())
    alone = ece(sure.tolist(), right.tolist())
    assert together.value == alone.value
    assert together.ci_high > alone.ci_high


@pytest.mark.parametrize("confidence", [-0.1, 1.1, math.nan])
def test_a_confidence_that_is_no_probability_is_named(confidence: float) -> None:
    for figure in (calibration, ece):
        with pytest.raises(ModelError, match=f"the probability of row 2 of the scored rows is {confidence}"):
            figure([0.5, confidence], [True, True])


def test_no_rows_are_refused() -> None:
    with pytest.raises(DataError, match="there are no rows to score"):
        calibration([], [])
    with pytest.raises(ValueError, match="2 confidences and 1 rows"):
        calibration([0.5, 0.5], [True])


@pytest.mark.interop
@pytest.mark.parametrize("bins", [10, 15])
def test_bins_are_scikit_learns(bins: int) -> None:
    module = pytest.importorskip("sklearn.calibration")
    random = np.random.default_rng(3)
    sure = np.concatenate([random.random(300), np.linspace(0, 1, bins + 1), [0.1 + 0.2, 0.7]])
    right = random.random(sure.size) < sure**2
    accuracy, confidence = module.calibration_curve(right, sure, n_bins=bins)
    found = calibration(sure.tolist(), right.tolist(), bins)
    np.testing.assert_allclose([each.accuracy for each in found.bins], accuracy, rtol=1e-12)
    np.testing.assert_allclose([each.confidence for each in found.bins], confidence, rtol=1e-12)
    counts = np.array([each.count for each in found.bins])
    assert found.ece == pytest.approx((counts * np.abs(accuracy - confidence)).sum() / sure.size, rel=1e-9)
