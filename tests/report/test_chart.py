import re
from xml.etree import ElementTree

import pytest

from mlxtune.report import chart
from mlxtune.report.score import Score


def line(step: int, train: float | None, valid: float | None) -> dict[str, float | int | None]:
    return {"step": step, "train_loss": train, "valid_loss": valid}


def points(svg: str, name: str) -> list[tuple[float, float]]:
    """The corners of the lines of a class, in pixels."""
    groups = [each for each in ElementTree.fromstring(svg).iter("g") if each.attrib.get("class") == name]
    paths = [group.find("path") for group in groups]
    numbers = [re.findall(r"-?[\d.]+", path.attrib["d"]) for path in paths if path is not None]
    return [(float(x), float(y)) for each in numbers for x, y in zip(each[::2], each[1::2], strict=True)]


def markers(svg: str, name: str) -> list[tuple[float, float]]:
    """Where the dots of a class stand, in pixels."""
    groups = [each for each in ElementTree.fromstring(svg).iter("g") if each.attrib.get("class") == name]
    moved = [path.attrib["transform"] for group in groups for path in group.iter("path") if "transform" in path.attrib]
    pairs = [re.findall(r"-?[\d.]+", each) for each in moved]
    return [(float(x), float(y)) for x, y in pairs]


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
    assert markers(svg, "valid") == [pytest.approx(each, abs=0.06) for each in points(svg, "valid")]
    assert markers(svg, "train") == []
    shown = texts(svg)
    assert {"updates", "loss, nats per token", "training", "validation", "best: 1.200 at update 100"} <= set(shown)
    numbers = [text for text in shown if text.replace(".", "").isdigit()]
    assert numbers == ["0", "1", "2", "3", "0", "20", "40", "60", "80", "100"]
    assert markers(svg, "best") == [pytest.approx((right, top + down * 0.6), abs=0.06)]


def test_a_flat_curve_does_not_start_at_zero() -> None:
    svg = chart.loss_curve([line(10, 2.0, None), line(20, 1.9, None)], None)
    assert "1.9" in texts(svg) and "0.5" not in texts(svg)
    assert "validation" not in texts(svg) and "best" not in svg


def test_one_point_is_a_dot() -> None:
    svg = chart.loss_curve([line(1, 2.0, None)], None)
    assert len(markers(svg, "train")) == 1 and points(svg, "valid") == []


def test_nothing_to_draw_is_no_drawing() -> None:
    assert chart.loss_curve([], None) == ""
    assert chart.loss_curve([line(1, None, None)], 1) == ""
    assert chart.bars([]) == ""


def score(value: float, low: float, high: float) -> Score:
    return Score(metric="accuracy", value=value, unit="share", ci_low=low, ci_high=high, n=96, better="higher")


def test_bars_are_as_long_as_their_shares_with_whiskers_at_the_interval() -> None:
    svg = chart.bars([("base", score(0.0, 0.0, 0.04)), ("few_shot", score(0.5, 0.4, 0.6))])
    across = chart.WIDTH - chart.BAR_LEFT - chart.BAR_RIGHT
    corners = points(svg, "bar")
    widths = [max(x for x, _ in corners[at : at + 4]) - chart.BAR_LEFT for at in (0, 4)]
    assert widths == pytest.approx([1.0, across / 2], abs=0.06)  # a share of nothing is still seen
    ends = [x for x, _ in points(svg, "whisker")]
    wanted = [chart.BAR_LEFT + across * share for share in (0, 0.04, 0.4, 0.6)]
    assert ends == pytest.approx(wanted, abs=0.06)
    assert [text for text in texts(svg) if "(" in text] == ["0 % (0-4)", "50 % (40-60)"]
    assert "few shot" in texts(svg)


def test_the_divergence_curve_puts_points_where_the_axes_say() -> None:
    drawing = chart.divergence_curve([("8 bits", 80e6, 1e-4), ("4 bits", 40e6, 1e-2), ("same", 160e6, 0.0)])
    places = markers(drawing, "valid")
    across = chart.WIDTH - chart.LEFT - chart.RIGHT
    assert [x for x, _ in places] == pytest.approx([chart.LEFT + across / 2, chart.LEFT + across], abs=0.06)
    assert [y for _, y in places] == pytest.approx([chart.TOP, chart.HEIGHT - chart.BOTTOM], abs=0.06)
    assert {"size, MB", "4 bits", "8 bits", "0.0001"} <= set(texts(drawing)) and "same" not in texts(drawing)
    assert chart.divergence_curve([]) == chart.divergence_curve([("same", 1e9, 0.0)]) == ""


def test_strengths_show_gain_and_what_is_forgotten() -> None:
    svg = chart.strengths([(0.0, 0.0, 0.0), (1.0, 2.0, 0.5), (2.0, 1.0, 1.5)], 1.0)
    left, right = chart.LEFT, chart.WIDTH - chart.RIGHT
    bottom, down = chart.HEIGHT - chart.BOTTOM, chart.HEIGHT - chart.TOP - chart.BOTTOM
    gain = [(left, bottom), ((left + right) / 2, bottom - down), (right, bottom - down / 2)]
    assert markers(svg, "gain") == [pytest.approx(each, abs=0.06) for each in gain]
    assert [y for _, y in markers(svg, "forgotten")] == pytest.approx(
        [bottom, bottom - down / 4, bottom - down * 3 / 4], abs=0.06
    )
    assert markers(svg, "best") == [pytest.approx(gain[1], abs=0.06)]
    alone = chart.strengths([(0.0, 0.0, None), (1.0, 2.0, None)], None)
    assert "forgotten" not in texts(alone) and markers(alone, "best") == []
    assert chart.strengths([], None) == ""
