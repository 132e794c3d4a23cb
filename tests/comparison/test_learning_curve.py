"""The fitted curve against scipy and against curves that are known; nested parts of the rows; what is said of it."""

from typing import Any

import numpy as np
import pytest

from mlxtune.comparison import learning_curve
from mlxtune.data.files import Row
from mlxtune.data.formats import Completion, Example
from mlxtune.errors import DataError, InputError


def test_a_power_law_is_found() -> None:
    sizes = [25, 50, 100]
    errors = 3.0 * np.array(sizes) ** -0.4
    found = learning_curve.fit(sizes, errors[None])
    assert found.kind == "power law"
    assert found.at(200)[0] == pytest.approx(3.0 * 200**-0.4, rel=5e-3)  # the steepness is that of a grid


def test_a_floor_is_found() -> None:
    sizes = [50, 100, 200, 400, 800]
    errors = 6.0 * np.array(sizes) ** -0.8 + 0.1
    found = learning_curve.fit(sizes, errors[None])
    assert found.kind == "power law with a floor"
    assert found.c[0] == pytest.approx(0.1, abs=5e-3)
    assert found.at(1600)[0] == pytest.approx(6.0 * 1600**-0.8 + 0.1, rel=5e-3)


def test_without_a_floor_none_is_fitted() -> None:
    sizes = [50, 100, 200, 400]
    errors = 6.0 * np.array(sizes, dtype=float) ** -learning_curve.STEEPNESS[300]
    assert learning_curve.fit(sizes, errors[None]).kind == "power law"


def test_errors_that_grow_are_a_flat_line() -> None:
    found = learning_curve.fit([10, 20, 40], np.array([[0.1, 0.2, 0.3]]))
    assert (found.b[0], found.at(80)[0]) == (0.0, pytest.approx(0.2))


def test_no_error_stays_none() -> None:
    assert learning_curve.fit([10, 20], np.zeros((1, 2))).at(40)[0] == 0.0


def test_curves_are_fitted_each_for_itself() -> None:
    draw = np.random.default_rng(1)
    errors = draw.uniform(0.05, 0.6, (20, 3))
    together = learning_curve.fit([30, 60, 120], errors).at(240)
    alone = [learning_curve.fit([30, 60, 120], each[None]).at(240)[0] for each in errors]
    assert together == pytest.approx(np.array(alone), rel=1e-12)


@pytest.mark.interop
def test_against_scipy() -> None:
    optimize = pytest.importorskip("scipy.optimize")
    draw = np.random.default_rng(2)
    sizes = np.array([40.0, 80, 160, 320])
    for _ in range(20):
        errors = draw.uniform(1, 4) * sizes ** -draw.uniform(0.2, 1.2) * draw.normal(1, 0.1, 4)
        wanted, _ = optimize.curve_fit(lambda n, a, b: a * (n / 320) ** -b, sizes, errors, p0=(0.1, 0.5))
        found = learning_curve._fitted(sizes.astype(int).tolist(), errors[None], floor=False)
        assert found.at(640)[0] == pytest.approx(wanted[0] * 2.0 ** -wanted[1], rel=0.03)


def rows(*texts: str) -> list[tuple[Row, Example]]:
    return [(Row("train", line, {}), Completion(text, "x")) for line, text in enumerate(texts, start=1)]


def test_parts_are_nested_and_near_rows_stay_together() -> None:
    draw = np.random.default_rng(3)
    words = [f"{draw.integers(1e9):x}" for _ in range(400)]
    texts = [" ".join(words[4 * number : 4 * number + 4]) for number in range(50)]
    texts += [f"{text} please" for text in texts]  # near to the first fifty
    found = learning_curve.nested(rows(*texts), [100, 25, 50], seed=0)
    assert list(found) == [25, 50, 100]
    sizes = [len(each) for each in found.values()]
    assert sizes == [26, 50, 100]  # the group that reaches the share is taken whole
    assert set(found[25]) < set(found[50]) < set(found[100])
    for part in found.values():
        assert all((place + 50) % 100 in part for place in part)
    assert found == learning_curve.nested(rows(*texts), [25, 50, 100], seed=0)
    assert found[25] != learning_curve.nested(rows(*texts), [25, 50], seed=1)[25]


def test_named_groups_stay_together() -> None:
    draw = np.random.default_rng(5)
    texts = [f"{draw.integers(1e9):x} {draw.integers(1e9):x}" for _ in range(40)]
    named = {f"train:{line}": f"cluster {line % 4}" for line in range(1, 41)}
    found = learning_curve.nested(rows(*texts), [20, 50, 100], seed=0, named=named)
    assert [len(each) for each in found.values()] == [10, 20, 40]
    assert all(len({place % 4 for place in part}) == len(part) // 10 for part in found.values())


def test_rows_of_a_group_are_drawn_together() -> None:
    """Of four groups of fifty equal rows the interval is as wide as of four rows."""
    right = np.repeat([True, True, True, False], 50)
    worse = np.repeat([True, True, False, False], 50)
    alone = [predictions(worse), predictions(right)]
    grouped = [[{**each, "group": f"g{row // 50}"} for row, each in enumerate(one)] for one in alone]
    few = [predictions(worse[::50]), predictions(right[::50])]
    widths = []
    for each in (alone, grouped, few):
        found = learning_curve.summed_up([100, 200], each, seed=0)["fit"]
        widths.append(found["ci_high"] - found["ci_low"])
    assert widths[1] > 3 * widths[0]
    assert widths[1] == pytest.approx(widths[2], rel=1e-9)


def predictions(right: np.ndarray) -> list[dict[str, Any]]:
    return [
        {"where": f"t:{row}", "loss": 1.0, "tokens": 1, "exact": bool(each), "right": bool(each)}
        for row, each in enumerate(right)
    ]


def test_what_twice_the_rows_would_bring() -> None:
    """Errors 0.4, 0.2, 0.1 halve with each doubling: 0.05 is next, 5 points better."""
    order = np.random.default_rng(4).random(1000)
    predicted = [predictions(order >= wrong) for wrong in (0.4, 0.2, 0.1)]
    exact = [1 - sum(each["right"] for each in one) / 1000 for one in predicted]
    found = learning_curve.summed_up([100, 200, 400], predicted, seed=0)
    assert found["metric"] == "accuracy"
    assert [point["rows"] for point in found["points"]] == [100, 200, 400]
    assert [1 - point["value"] for point in found["points"]] == pytest.approx(exact)
    assert (found["fit"]["kind"], found["fit"]["rows"]) == ("power law", 800)
    assert found["fit"]["ci_low"] < found["fit"]["value"] < found["fit"]["ci_high"]
    assert found["fit"]["value"] == pytest.approx(0.95, abs=0.02)
    assert found["sentence"].startswith("Twice the data (800 rows) would bring about +")
    assert "points of accuracy (95 % interval +" in found["sentence"]


def test_losses_get_lower() -> None:
    def losses(level: float) -> list[dict[str, Any]]:
        each = {"tokens": 3, "exact": None, "right": None}
        return [{"where": f"t:{row}", "loss": level * (1 + row / 50), **each} for row in range(50)]

    found = learning_curve.summed_up([100, 200], [losses(2.0), losses(1.0)], seed=0)
    assert found["metric"] == "loss"
    assert found["fit"]["value"] == pytest.approx(found["points"][1]["value"] / 2, rel=0.02)
    assert found["fit"]["ci_low"] < found["fit"]["value"] < found["fit"]["ci_high"]
    assert "would bring about -0." in found["sentence"]
    assert "nats per token of held-out loss (95 % interval -" in found["sentence"]


def test_parts_of_one_size_say_nothing() -> None:
    found = learning_curve.summed_up([9, 9], [predictions(np.ones(5)), predictions(np.ones(5))], seed=0)
    assert found["fit"] is None
    assert "all the same size" in found["sentence"]


@pytest.mark.parametrize("percents", [[], [50], [50, 50], [0, 50], [50, 101], [-5, 50]])
def test_no_curve(percents: list[float]) -> None:
    with pytest.raises(InputError, match="is no curve"):
        learning_curve.check(percents)


def test_per_cents_are_sorted() -> None:
    assert learning_curve.check([100, 25, 50, 25]) == [25, 50, 100]


def test_sizes_that_are_not_of_the_same_rows() -> None:
    whole = predictions(np.ones(5))
    for other in (
        whole[:-1],
        [*whole[:-1], {**whole[-1], "where": "t:9"}],
        [*whole[:-1], {**whole[-1], "right": None}],
    ):
        with pytest.raises(DataError, match="not scored on the same rows"):
            learning_curve.summed_up([5, 10, 20], [whole, other, whole], seed=0)
