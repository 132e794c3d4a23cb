import logging
import re
import warnings
from typing import Any
from xml.etree import ElementTree

import matplotlib
import pytest

from mlxtune.report import chart, drawing


def draw(*texts: str) -> str:
    def paint(axes: Any) -> None:
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1)
        axes.plot([0, 1], [0, 1], color=drawing.INK["accent"], marker="o", gid="c-line+strong")
        for text in texts:
            chart.note(axes, text, (0.5, 0.5), (0, 0))

    return drawing.draw(100, 50, (0, 0, 0, 0), 'a "title" & more', paint)


def test_a_drawing_is_a_small_text_with_nothing_of_the_drawer() -> None:
    svg = draw("hello")
    root = ElementTree.fromstring(svg)
    assert root.attrib == {"viewBox": "0 0 100 50", "role": "img", "aria-label": 'a "title" & more'}
    assert {each.tag for each in root.iter()} == {"svg", "g", "path", "text"}
    assert not re.search(r"\bid=|href|url\(|http|font-family|<!|clip|metadata|#0000|\n", svg)
    assert "stroke:var(--accent)" in svg and 'class="line strong"' in svg
    assert len(svg) < 1500


def test_the_same_input_gives_the_same_text() -> None:
    assert draw("hello") == draw("hello")


@pytest.mark.parametrize(
    "text", ["<script>x</script>", "$\\frac{1}{2}$ and $5", "\x1b[2J\u202e", "\U0001f642 你好", "'\"&lt;", "\\n$"]
)
def test_any_text_stays_a_text_and_nothing_is_told(text: str, capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        root = ElementTree.fromstring(draw(drawing.label(text)))
    assert [each.text for each in root.iter("text")] == [drawing.label(text)]
    assert capfd.readouterr() == ("", "")


def test_settings_of_the_user_change_nothing_and_stay() -> None:
    plain = draw("$x$")
    level = logging.getLogger("matplotlib").level
    with matplotlib.rc_context({"font.size": 30, "svg.fonttype": "path", "lines.linewidth": 9}):
        assert draw("$x$") == plain
        assert matplotlib.rcParams["font.size"] == 30 and matplotlib.rcParams["svg.fonttype"] == "path"
    assert logging.getLogger("matplotlib").level == level


def test_a_long_name_is_cut() -> None:
    assert len(drawing.label("x" * 500)) == drawing.LONGEST
    assert drawing.label(" a\n b\t") == "a b"


def test_a_drawing_that_does_not_stretch_says_its_width() -> None:
    svg = drawing.draw(100, 50, (0, 0, 0, 0), "t", lambda axes: None, stretch=False)
    assert svg == ('<svg viewBox="0 0 100 50" role="img" aria-label="t" style="min-width:80px;max-width:125px"></svg>')
