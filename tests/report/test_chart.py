import re
from xml.etree import ElementTree

import pytest

from mlxtune.report import chart
from mlxtune.report.score import Score


def line(step: int, train: float | None, valid: float | None) -> dict[str, float | int | None]:
    return {"step": step, "train_loss": train, "valid_loss": valid}


def points(svg: str, name: str) -> list[tuple[float, float]]:
    found = re.search(f'<polyline class="{name}" points="([^"]*)"', svg)
    assert found is not None
    return [(float(x), float(y)) for x, y in (pair.split(",") for pair in found.group(1).split())]


def texts(svg: str) -> list[str]:
    return [each.text or "" for each in ElementTree.fromstring(svg).iter("text")]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 3, [0, 1, 2, 3]),
        (0, 300, [0, 100, 200, 300]),
        (0, 2.7, [0, 1, 2, 3]),
        (1.9, 2.0, [1.9, 1.92, 1.94, 1.96, 1.98, 2.0]),
        (0, 0.003, [0, 0.001, 0.002, 0.003]),
        (2, 2, [1.4, 1.6, 1.8, 2.0, 2.2, 2.4, 2.6]),
    ],
)
def test_ticks_are_round_and_span_the_values(low: float, high: float, expected: list[float]) -> None:
    found = chart.ticks(low, high)
    assert found[0] <= low and found[-1] >= high
    assert found == pytest.approx(expected)


def test_ticks_always_span_and_stay_few() -> None:
    for power in range(-6, 7):
        for mantissa in (1, 1.3, 2, 3.7, 5, 7, 9.99):
            high = mantissa * 10**power
            found = chart.ticks(0, high)
            assert found[0] == 0 and found[-1] >= high * (1 - 1e-9)
            assert 3 <= len(found) <= 7


def test_loss_curve_puts_points_where_the_axes_say() -> None:
    svg = chart.loss_curve([line(0, None, 3.0), line(50, 1.5, None), line(100, 1.0, 1.2)], best_step=100)
    left, right = chart.LEFT, chart.WIDTH - chart.RIGHT
    top, bottom = chart.TOP, chart.HEIGHT - chart.BOTTOM
    middle, down = (left + right) / 2, bottom - top
    for name, expected in {
        "valid": [(left, top), (right, top + down * 0.6)],  # 3.0 at the top of an axis from 0 to 3, then 1.2
        "train": [(middle, top + down / 2), (right, top + down * 2 / 3)],
    }.items():
        for found, wanted in zip(points(svg, name), expected, strict=True):
            assert found == pytest.approx(wanted, abs=0.06)
    shown = texts(svg)
    assert [text for text in shown if text in ("updates", "loss, nats per token", "training", "validation")] == [
        "updates",
        "loss, nats per token",
        "training",
        "validation",
    ]
    assert "best: 1.200 at update 100" in shown
    assert svg.count('class="best"') == 1


def test_a_flat_curve_does_not_start_at_zero() -> None:
    svg = chart.loss_curve([line(10, 2.0, None), line(20, 1.9, None)], None)
    assert "1.9" in texts(svg) and "0.5" not in texts(svg)
    assert "validation" not in texts(svg) and "best" not in svg


def test_one_point_is_a_dot() -> None:
    svg = chart.loss_curve([line(1, 2.0, None)], None)
    assert svg.count('class="train-dot"') == 1 and "polyline" not in svg
    ElementTree.fromstring(svg)


def test_nothing_to_draw_is_no_drawing() -> None:
    assert chart.loss_curve([], None) == ""
    assert chart.loss_curve([line(1, None, None)], 1) == ""
    assert chart.bars([]) == ""


def score(value: float, low: float, high: float) -> Score:
    return Score(metric="accuracy", value=value, unit="share", ci_low=low, ci_high=high, n=96, better="higher")


def test_bars_are_as_long_as_their_shares_with_whiskers_at_the_interval() -> None:
    svg = chart.bars([("base", score(0.0, 0.0, 0.04)), ("tuned", score(0.5, 0.4, 0.6))])
    across = chart.WIDTH - chart.BAR_LEFT - chart.RIGHT
    root = ElementTree.fromstring(svg)
    assert [float(each.attrib["width"]) for each in root.iter("rect")] == pytest.approx([1.0, across / 2], abs=0.06)
    whiskers = [each.attrib for each in root.iter("line") if each.attrib["class"] == "whisker"]
    assert len(whiskers) == 6
    ends = [float(whiskers[3]["x1"]), float(whiskers[3]["x2"])]
    assert ends == pytest.approx([chart.BAR_LEFT + across * 0.4, chart.BAR_LEFT + across * 0.6], abs=0.06)
    assert [text for text in texts(svg) if "(" in text] == ["0 % (0-4)", "50 % (40-60)"]


def test_names_are_escaped() -> None:
    svg = chart.bars([('<a"b', score(0.5, 0.4, 0.6))])
    assert "<a" not in svg and '<a"b' in texts(svg)


def test_a_picture_stands_alone() -> None:
    """Any viewer draws it: it is well-formed, says what it is, and its colours are no variables."""
    curve = [{"step": 1, "train_loss": 2.0, "valid_loss": None}, {"step": 2, "train_loss": 1.0, "valid_loss": 1.5}]
    text = chart.picture(chart.loss_curve(curve, 2))
    assert ElementTree.fromstring(text).tag == "{http://www.w3.org/2000/svg}svg"
    assert "var(" not in text
    assert "stroke:#1f6fb2" in text


def test_the_divergence_curve_puts_points_where_the_axes_say() -> None:
    drawing = chart.divergence_curve([("8 bits", 80e6, 1e-4), ("4 bits", 40e6, 1e-2), ("same", 160e6, 0.0)])
    dots = [each.attrib for each in ElementTree.fromstring(drawing).iter("circle")]
    places = [(float(each["cx"]), float(each["cy"])) for each in dots]
    across = chart.WIDTH - chart.LEFT - chart.RIGHT
    assert places[1][0] - chart.LEFT == pytest.approx(2 * (places[0][0] - chart.LEFT), abs=0.2)
    assert places[1][0] == pytest.approx(chart.LEFT + across, abs=0.2)  # 80 MB is the last tick
    assert (places[0][1], places[1][1]) == (chart.TOP, chart.HEIGHT - chart.BOTTOM)  # 0.01 above, 0.0001 below
    assert "size, MB" in drawing and ">4 bits<" in drawing and "same" not in drawing
    assert chart.divergence_curve([]) == chart.divergence_curve([("same", 1e9, 0.0)]) == ""
