import re
from xml.etree import ElementTree

import numpy as np
import pytest

from mlxtune.report import chart, plots

LEFT, RIGHT = chart.LEFT, chart.WIDTH - chart.RIGHT
TOP, BOTTOM = chart.TOP, chart.HEIGHT - chart.BOTTOM


def dots(svg: str, name: str) -> list[tuple[float, float]]:
    groups = [each for each in ElementTree.fromstring(svg).iter("g") if each.attrib.get("class") == name]
    moved = [path.attrib["transform"] for group in groups for path in group.iter("path") if "transform" in path.attrib]
    return [(float(x), float(y)) for x, y in (re.findall(r"-?[\d.]+", each) for each in moved)]


def texts(svg: str) -> list[str]:
    return [each.text or "" for each in ElementTree.fromstring(svg).iter("text")]


def place(x: float, y: float) -> tuple[float, float]:
    """Pixels of a point whose axes go from 0 to 1."""
    return pytest.approx((LEFT + x * (RIGHT - LEFT), BOTTOM - y * (BOTTOM - TOP)), abs=0.06)


def test_reliability_has_a_dot_at_each_bins_confidence_and_accuracy() -> None:
    bins = [
        {"low": 0.5, "high": 0.6, "confidence": 0.55, "accuracy": 0.25, "count": 8},
        {"low": 0.6, "high": 0.7, "confidence": 0.0, "accuracy": 0.0, "count": 0},
        {"low": 0.9, "high": 1.0, "confidence": 0.95, "accuracy": 1.0, "count": 1200},
    ]
    svg = plots.reliability(bins, 0.0512)
    assert dots(svg, "valid") == [place(0.55, 0.25), place(0.95, 1.0)]
    assert {"8", "1,200", "calibration error 5.1 %", "how sure it was"} <= set(texts(svg)) and "0" not in texts(svg)
    assert plots.reliability([bins[1]], 0.0) == plots.reliability([], 0.0) == ""


def test_confusion_shows_every_count_but_zeros() -> None:
    svg = plots.confusion(["yes", "no"], [[17, 3, 0], [0, 29, 4]])
    assert [text for text in texts(svg) if text.isdigit()] == ["17", "3", "29", "4"]
    assert {"yes", "no", "(other)", "expected"} <= set(texts(svg))
    cells = [each for each in ElementTree.fromstring(svg).iter("g") if each.attrib.get("class") == "cell"]
    fills = [path.attrib["style"] for cell in cells if (path := cell.find("path")) is not None]
    assert ["accent" in each for each in fills] == [True, False, True, False]
    shades = [float(match[1]) for each in fills if (match := re.search(r"opacity:([\d.]+)", each))]
    assert shades == pytest.approx([0.06 + 0.94 * share for share in (17 / 20, 3 / 20, 29 / 33, 4 / 33)], abs=1e-3)
    assert plots.confusion([], []) == ""


def test_of_many_classes_the_most_confused_are_drawn_and_no_count_is_lost() -> None:
    draw = np.random.default_rng(3)
    counts = draw.poisson(0.3, (40, 41))
    counts[np.arange(40), np.arange(40)] = 50
    counts[7, 9], counts[30, 2] = 40, 60
    rows, columns, drawn = plots.most_confused([f"class {at}" for at in range(40)], counts.tolist())
    assert len(rows) == plots.MOST_CONFUSED and columns == [*rows, plots.OTHERS]
    assert {"class 7", "class 9", "class 30", "class 2"} <= set(rows)
    numbers = [int(name.split()[1]) for name in rows]
    assert [sum(row) for row in drawn] == counts[numbers].sum(1).tolist()
    assert [row[at] for at, row in enumerate(drawn)] == [50] * len(rows)
    svg = plots.confusion([f"class {at}" for at in range(40)], counts.tolist())
    assert plots.OTHERS in texts(svg)


def test_forgetting_sets_both_losses_on_one_axis() -> None:
    svg = plots.forgetting([("held-out rows", 4.0, 0.5), ("other text", 2.0, 3.0)])
    left, right = 16, chart.WIDTH - 18
    x = {loss: left + (right - left) * loss / 4 for loss in (4.0, 0.5, 2.0, 3.0)}
    assert [each[0] for each in dots(svg, "before")] == pytest.approx([x[4.0], x[2.0]], abs=0.06)
    assert [each[0] for each in dots(svg, "after")] == pytest.approx([x[0.5], x[3.0]], abs=0.06)
    assert {"4.000 → 0.500", "2.000 → 3.000"} <= set(texts(svg))
    assert svg.count("var(--good)") and svg.count("var(--bad)")
    assert plots.forgetting([]) == ""


def test_a_learning_curve_goes_on_to_what_is_expected() -> None:
    points = [
        {"rows": rows, "value": value, "ci_low": value, "ci_high": value} for rows, value in ((50, 0.4), (100, 0.8))
    ]
    fit = {"rows": 200, "value": 0.9, "ci_low": 0.8, "ci_high": 1.0}
    svg = plots.learning_curve("accuracy", points, fit)
    across, down = RIGHT - LEFT, BOTTOM - TOP
    wanted = [(LEFT + across / 4, BOTTOM), (LEFT + across / 2, BOTTOM - down * 4 / 6)]
    assert dots(svg, "valid") == [pytest.approx(each, abs=0.06) for each in wanted]
    assert dots(svg, "fit") == [pytest.approx((RIGHT, BOTTOM - down * 5 / 6), abs=0.06)]
    assert {"measured", "expected", "training rows", "accuracy", "100 %"} <= set(texts(svg))
    assert "expected" not in texts(plots.learning_curve("accuracy", points, None))
    assert plots.learning_curve("accuracy", [], None) == ""


@pytest.mark.parametrize(("accuracy", "across"), [(0.1, "left"), (0.9, "right")])
def test_the_calibration_error_stands_where_no_points_are(accuracy: float, across: str) -> None:
    drawing = plots.reliability([{"low": 0.4, "high": 0.5, "confidence": 0.5, "accuracy": accuracy, "count": 3}], 0.4)
    (found,) = re.findall(r'<text x="([\d.]+)"[^>]*>calibration error', drawing)
    assert (float(found) < chart.WIDTH / 4) == (across == "left")
