"""What an evaluation and a comparison show beyond a figure, as SVG texts: reliability, confusion, forgetting, learning.

Knows their tables, not runs.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mlxtune.report import drawing
from mlxtune.report.chart import HEIGHT, MARGINS, WIDTH, frame, legend, line, note, ticks
from mlxtune.report.drawing import INK, label
from mlxtune.report.words import number, percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_CLASSES, MOST_CONFUSED = 20, 12
CELL, NAMES = 24, 118  # pixels of a cell, and of the names beside the rows
OTHERS = "(others)"
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)


def reliability(bins: Sequence[dict[str, Any]], ece: float) -> str:
    """How often the model is right where it is how sure: a bar a bin, a line where both agree; empty without rows."""
    filled = [each for each in bins if each["count"]]
    if not filled:
        return ""

    def paint(axes: "Axes") -> None:
        texts = [f"{share * 100:.0f} %" for share in SHARES]
        frame(axes, SHARES, SHARES, "how sure it was", "how often it was right", x_texts=texts, y_texts=texts)
        for each in filled:
            low, wide = each["low"], each["high"] - each["low"]
            axes.bar(low, each["accuracy"], wide, align="edge", color=INK["accent"], alpha=0.35, gid="c-bin")
        line(axes, [(0, 0), (1, 1)], "even", "muted", lw=1, ls=(0, (3, 3)))
        line(axes, [(each["confidence"], each["accuracy"]) for each in filled], "valid", "accent", lw=0, marker="o")
        for each in filled:
            above = (each["confidence"], each["accuracy"])
            note(axes, f"{each['count']:,}", above, (0, 8), ha="center", size=10, gid="c-halo")
        words = f"calibration error {percent(ece)}"
        style = {"color": INK["text"], "gid": "c-strong+halo"}
        if sum(each["count"] * (each["accuracy"] - each["confidence"]) for each in filled) < 0:
            note(axes, words, (0, 1), (6, -16), **style)  # its points lie below the line, in the other corner
        else:
            note(axes, words, (1, 0), (-6, 8), ha="right", **style)

    return drawing.draw(WIDTH, HEIGHT, MARGINS, "Reliability: confidence against accuracy", paint)


def most_confused(
    labels: Sequence[str], counts: Sequence[Sequence[int]]
) -> tuple[list[str], list[str], list[list[int]]]:
    """Names of rows and columns, and counts, as they are drawn: all classes, or of many the most confused ones.

    counts: (N, N or N + 1), rows expected and columns given, the last one for answers outside the set.
    """
    extra = len(counts[0]) - len(labels) if counts else 0
    outside = ["(other)"] * extra
    if len(labels) <= MOST_CLASSES:
        return list(labels), [*labels, *outside], [list(row) for row in counts]
    size = len(labels)
    wrong = [
        sum(counts[at]) - counts[at][at] + sum(counts[row][at] for row in range(size) if row != at)
        for at in range(size)
    ]
    shown = sorted(sorted(range(size), key=lambda at: (-wrong[at], at))[:MOST_CONFUSED])
    rest = [at for at in range(len(counts[0])) if at not in shown]
    drawn = [[*(counts[row][at] for at in shown), sum(counts[row][at] for at in rest)] for row in shown]
    names = [labels[at] for at in shown]
    return names, [*names, OTHERS], drawn


def confusion(labels: Sequence[str], counts: Sequence[Sequence[int]]) -> str:
    """Which class was taken for which: rows expected, columns given, each row's shares as shades; empty without any."""
    if not labels or not counts:
        return ""
    rows, columns, drawn = most_confused(labels, counts)
    cell = max(CELL, min(56, (WIDTH - NAMES - 20) // len(columns)))
    below = 24 + round(4.8 * max(len(_short(name)) for name in columns))  # slanted names
    width, height = NAMES + cell * len(columns) + 24, cell * len(rows) + below + 20

    def paint(axes: "Axes") -> None:
        axes.set_xlim(0, len(columns))
        axes.set_ylim(len(rows), 0)
        note(axes, "expected", (0, 0), (-8, 8), ha="right")
        axes.bar(0, len(rows), len(columns), 0, align="edge", color=INK["muted"], alpha=0.06, gid="c-field")
        for at, name in enumerate(rows):
            note(axes, _short(name), (0, at + 0.5), (-8, -4), ha="right", color=INK["text"])
            total = sum(drawn[at]) or 1
            for column, count in enumerate(drawn[at]):
                if not count:
                    continue
                right = column < len(rows) and columns[column] == name
                shade = 0.06 + 0.94 * count / total
                where = (column + 0.02, 0.96, 0.96, at + 0.02)
                axes.bar(*where, align="edge", color=INK["accent" if right else "bad"], alpha=shade, gid="c-cell")
                ink = INK["card" if shade > 0.55 else "text"]
                note(axes, f"{count:,}", (column + 0.5, at + 0.5), (0, -4), ha="center", size=11, color=ink)
        for column, name in enumerate(columns):
            slanted = {"rotation": 40, "rotation_mode": "anchor", "ha": "right", "va": "top"}
            note(axes, _short(name), (column + 0.6, len(rows)), (0, -6), color=INK["text"], **slanted)

    return drawing.draw(
        width, height, (NAMES, 20, 24, below), "Confusion matrix: expected and given labels", paint, stretch=False
    )


def _short(name: str) -> str:
    name = label(name)
    return name if len(name) <= 16 else f"{name[:9]}…{name[-6:]}"


def forgetting(rows: Sequence[tuple[str, float, float]]) -> str:
    """Losses before and after tuning, an arrow a text: what was learned beside what was forgotten; empty without any.

    rows: (name, loss before, loss after) in nats per token.
    """
    if not rows:
        return ""
    losses = [loss for _, *both in rows for loss in both]
    levels = ticks(0.0 if min(losses) < 0.6 * max(losses) else min(losses), max(losses))
    step = 54

    def paint(axes: "Axes") -> None:
        axes.set_xlim(levels[0], levels[-1])
        axes.set_ylim(len(rows) * step, 0)  # pixels, from the top
        for level in levels:
            axes.plot([level] * 2, [0, len(rows) * step], color=INK["line"], lw=1, clip_on=False, gid="c-grid")
            note(axes, f"{level:g}", (level, len(rows) * step), (0, -16), ha="center")
        note(axes, "loss, nats per token", ((levels[0] + levels[-1]) / 2, len(rows) * step), (0, -34), ha="center")
        for index, (name, before, after) in enumerate(rows):
            at = index * step + 36
            colour = "good" if after <= before else "bad"
            note(axes, label(name), (levels[0], index * step + 18), (4, 0), color=INK["text"], gid="c-strong+halo")
            words = f"{number(before)} → {number(after)}"
            note(axes, words, (levels[-1], index * step + 18), (-4, 0), ha="right", gid="c-halo")
            line(axes, [(before, at), (after, at)], "change", colour, lw=3)
            line(axes, [(before, at)], "before", "train", ms=9)
            line(axes, [(after, at)], "after", colour, ms=9)

    return drawing.draw(WIDTH, len(rows) * step + 44, (16, 0, 18, 44), "Loss before and after tuning", paint)


def learning_curve(metric: str, points: Sequence[dict[str, Any]], fit: dict[str, Any] | None) -> str:
    """A metric by the number of training rows with its intervals, and where it is expected to go; empty without any.

    points, fit: dicts of `rows`, `value`, `ci_low`, `ci_high`.
    """
    if not points:
        return ""
    every = [*points, *([fit] if fit else [])]
    ends = [each[name] for each in every for name in ("value", "ci_low", "ci_high")]
    share = min(ends) >= 0 and max(ends) <= 1
    levels = ticks(min(ends), max(ends), 4)
    counts = ticks(0, max(each["rows"] for each in every))

    def paint(axes: "Axes") -> None:
        whole = [f"{count:,.0f}" for count in counts]
        texts = [f"{level * 100:g} %" if share else f"{level:g}" for level in levels]
        frame(axes, counts, levels, "training rows", label(metric), x_texts=whole, y_texts=texts)
        known = [(each["rows"], each["value"]) for each in points]
        if fit:
            line(axes, [known[-1], (fit["rows"], fit["value"])], "expected", "muted", lw=1.5, ls=(0, (3, 3)))
            line(axes, [(fit["rows"], fit["value"])], "fit", "muted", ms=9, mfc="none", mew=1.5)
        for each in every:
            ends = [(each["rows"], each["ci_low"]), (each["rows"], each["ci_high"])]
            line(axes, ends, "whisker", "muted" if each is fit else "text", lw=1.5, marker="_", ms=10, mew=1.5)
        line(axes, known, "valid", "accent", lw=2.5, marker="o")
        legend(axes, [("measured", "accent", 2.5), *([("expected", "muted", 1.5)] if fit else [])])

    return drawing.draw(WIDTH, HEIGHT, MARGINS, f"{label(metric)} by the number of training rows", paint)
