"""Loss curves, bars and what copies lost, as SVG texts for an HTML page. Knows points and shares, not runs."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mlxtune.report import drawing
from mlxtune.report.drawing import INK, STYLE, label, picture
from mlxtune.report.score import Score
from mlxtune.report.words import figure, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["STYLE", "bars", "divergence_curve", "frame", "loss_curve", "picture", "strengths", "ticks"]

WIDTH, HEIGHT = 380, 250
LEFT, RIGHT, TOP, BOTTOM = 52, 22, 30, 44  # margins around the plot
MARGINS = (LEFT, TOP, RIGHT, BOTTOM)
BEST_WIDTH = 180  # of the words at the best point
BAR_STEP, BAR_HEIGHT, BAR_LEFT, BAR_RIGHT = 46, 18, 8, 22


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) that span `low` to `high`, about `count` of them."""
    if high <= low:
        low, high = low - 0.5, low + 0.5
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def frame(axes: "Axes", across: Sequence[float], up: Sequence[float], x_name: str, y_name: str, **texts: Any) -> None:
    """Lines at the ticks `up`, numbers at both, and the axes' names; the axes span just their ticks.

    texts: `x_texts` and `y_texts`, in place of the numbers; an empty one leaves its place bare.
    """
    axes.set_xlim(across[0], across[-1])
    axes.set_ylim(up[0], up[-1])
    for place, text in zip(up, texts.get("y_texts") or [f"{each:g}" for each in up], strict=True):
        axes.plot([across[0], across[-1]], [place, place], color=INK["line"], lw=1, clip_on=False, gid="c-grid")
        note(axes, text, (across[0], place), (-8, -4), ha="right")
    for place, text in zip(across, texts.get("x_texts") or [f"{each:g}" for each in across], strict=True):
        note(axes, text, (place, up[0]), (0, -18), ha="center")
    note(axes, x_name, ((across[0] + across[-1]) / 2, up[0]), (0, -38), ha="center")
    note(axes, y_name, (across[0], up[-1]), (-40, 16), ha="left")


def note(axes: "Axes", text: str, at: tuple[float, float], shift: tuple[float, float], **style: Any) -> None:
    """A text whose baseline is `shift` pixels right of and above a point of the data."""
    from matplotlib.transforms import IdentityTransform

    x, y = axes.transData.transform(at)
    named = {"color": INK["muted"], "ha": "left", "va": "baseline", "clip_on": False, **style}
    if text:
        axes.text(x + shift[0], y + shift[1], text, transform=IdentityTransform(), **named)


def line(axes: "Axes", points: Sequence[tuple[float, float]], name: str, colour: str, **style: Any) -> None:
    """Points joined by a line of the class `name`; one alone is a dot."""
    if len(points) == 1:
        style["marker"] = style.get("marker") or "o"
    named = {"color": INK[colour], "ms": 6, "mew": 0, "clip_on": False, "solid_capstyle": "round", **style}
    if points:
        axes.plot([x for x, _ in points], [y for _, y in points], gid=f"c-{name}", **named)


def legend(axes: "Axes", entries: Sequence[tuple[str, str, float]]) -> None:
    """Names with the colours and widths of their lines, at the right end above the plot."""
    from matplotlib.transforms import IdentityTransform

    right, top = axes.transAxes.transform((1, 1))
    for index, (words, colour, width) in enumerate(reversed(entries)):
        x, pixels = right - 95 * (index + 1), IdentityTransform()
        axes.plot([x, x + 20], [top + 20] * 2, color=INK[colour], lw=width, transform=pixels, clip_on=False)
        axes.text(x + 26, top + 16, words, color=INK["muted"], transform=pixels, clip_on=False)


def loss_curve(curve: Sequence[dict[str, Any]], best_step: int | None) -> str:
    """Training and validation loss over the steps, the best validation step marked; empty without any loss.

    curve: dicts of `step`, `train_loss` and `valid_loss`, where a loss may be None.
    """
    train = [(each["step"], each["train_loss"]) for each in curve if each["train_loss"] is not None]
    valid = [(each["step"], each["valid_loss"]) for each in curve if each["valid_loss"] is not None]
    if not train and not valid:
        return ""
    losses = [loss for _, loss in train + valid]
    steps = ticks(0, max(step for step, _ in train + valid) or 1)
    # from zero where that wastes little: a curve that starts elsewhere makes small gains look large
    levels = ticks(0.0 if min(losses) < 0.6 * max(losses) else min(losses), max(losses))

    def paint(axes: "Axes") -> None:
        whole = [f"{step:,.0f}" if step == int(step) else "" for step in steps]
        frame(axes, steps, levels, "updates", "loss, nats per token", x_texts=whole)
        line(axes, train, "train", "train", lw=1.5)
        line(axes, valid, "valid", "accent", lw=2.5, marker="o")
        for step, loss in valid:
            if step == best_step:
                _best(axes, step, loss, levels)
        named = [("training", "train", 1.5, train), ("validation", "accent", 2.5, valid)]
        legend(axes, [(words, colour, width) for words, colour, width, points in named if points])

    return drawing.draw(WIDTH, HEIGHT, MARGINS, "Training and validation loss over the updates", paint)


def _best(axes: "Axes", step: int, loss: float, levels: Sequence[float]) -> None:
    axes.plot([step] * 2, [levels[0], levels[-1]], color=INK["text"], lw=1, ls=(0, (3, 3)), gid="c-best-line")
    line(axes, [(step, loss)], "best", "text", ms=12, mfc="none", mew=1.5)
    # at the top of the plot, where a falling curve leaves room; beside the line, or on it where neither side has room
    x = axes.transData.transform((step, loss))[0]
    side, shift = "center", 0
    if x + 8 + BEST_WIDTH <= WIDTH - RIGHT:
        side, shift = "left", 8
    elif x - 8 - BEST_WIDTH >= LEFT:
        side, shift = "right", -8
    words = f"best: {number(loss)} at update {step:,}"
    note(axes, words, (step, levels[-1]), (shift, -14), ha=side, color=INK["text"], gid="c-strong+halo")


def bars(columns: Sequence[tuple[str, Score]], title: str = "Share of right answers with 95 % intervals") -> str:
    """One bar for each named share, with its 95 % interval as a whisker; empty without any.

    Models that were not tuned (`base`, `prompt`, `few_shot`, `retrieval`) are grey.
    """
    if not columns:
        return ""
    height = BAR_STEP * len(columns) + 26

    def paint(axes: "Axes") -> None:
        axes.set_xlim(0, 1)
        axes.set_ylim(len(columns) * BAR_STEP, 0)  # pixels, from the top
        for share in (0, 0.25, 0.5, 0.75, 1):
            axes.plot([share] * 2, [0, len(columns) * BAR_STEP], color=INK["line"], lw=1, clip_on=False, gid="c-grid")
            note(
                axes,
                f"{share * 100:.0f} %",
                (share, len(columns) * BAR_STEP),
                (0, -16),
                ha="center" if share else "left",
            )
        for index, (name, score) in enumerate(columns):
            top = BAR_STEP * index + 20
            middle = top + BAR_HEIGHT / 2
            grey = name in ("base", "prompt", "few_shot", "retrieval")
            note(axes, label(name.replace("_", " ")), (0, top), (4, 5), color=INK["text"], gid="c-strong+halo")
            note(axes, figure(score), (1, top), (-4, 5), ha="right", gid="c-halo")
            wide = max(score.value, 1 / (WIDTH - BAR_LEFT - BAR_RIGHT))
            axes.barh(middle, wide, BAR_HEIGHT, color=INK["train" if grey else "accent"], gid="c-bar", clip_on=False)
            low, high = score.ci_low, score.ci_high
            line(axes, [(low, middle), (high, middle)], "whisker", "text", lw=1.5, marker="|", ms=10, mew=1.5)

    return drawing.draw(WIDTH, height, (BAR_LEFT, 0, BAR_RIGHT, 26), title, paint)


def divergence_curve(points: Sequence[tuple[str, float, float]]) -> str:
    """What smaller copies of a model lost: (name, bytes, KL divergence in nats per token) each; empty without any.

    The divergence is on a logarithmic axis; a copy that lost nothing is left out.
    """
    points = sorted((point for point in points if point[2] > 0), key=lambda point: point[1])
    if not points:
        return ""
    unit, name = (1e9, "GB") if points[-1][1] >= 1e9 else (1e6, "MB")
    sizes = ticks(0, points[-1][1] / unit)
    logs = [math.log10(divergence) for _, _, divergence in points]
    powers = range(math.floor(min(logs)), max(math.ceil(max(logs)), math.floor(min(logs)) + 1) + 1)

    def paint(axes: "Axes") -> None:
        texts = [f"{10.0**power:g}" for power in powers]
        frame(axes, sizes, powers, f"size, {name}", "KL divergence from the source, nats per token", y_texts=texts)
        placed = [(size / unit, log) for (_, size, _), log in zip(points, logs, strict=True)]
        line(axes, placed, "valid", "accent", lw=2.5, marker="o")
        for (words, _, _), at in zip(points, placed, strict=True):
            right = axes.transData.transform(at)[0] > WIDTH - 70
            side, shift = ("right", -8) if right else ("left", 8)
            above = -4 if at[1] > powers[-1] - 0.1 else 6
            note(axes, label(words), at, (shift, above), ha=side, color=INK["text"], gid="c-strong+halo")

    return drawing.draw(WIDTH, HEIGHT, MARGINS, "KL divergence against size", paint)


def strengths(points: Sequence[tuple[float, float, float | None]], chosen: float | None) -> str:
    """What an adapter gains and forgets at each strength; empty without any.

    points: (scale, gain, forgotten) in nats per token, `forgotten` None without a text to forget.
    """
    if not points:
        return ""
    gains = [(scale, gain) for scale, gain, _ in points]
    lost = [(scale, forgotten) for scale, _, forgotten in points if forgotten is not None]
    values = [value for _, value in gains + lost]
    levels, scales = ticks(min(0.0, *values), max(0.0, *values)), ticks(0, points[-1][0])

    def paint(axes: "Axes") -> None:
        frame(axes, scales, levels, "strength of the adapter", "nats per token")
        line(axes, gains, "gain", "accent", lw=2.5, marker="o")
        line(axes, lost, "forgotten", "bad", lw=1.5, marker="o", ms=4)
        for scale, gain in gains:
            if scale == chosen:
                line(axes, [(scale, gain)], "best", "text", ms=12, mfc="none", mew=1.5)
        legend(axes, [("gain", "accent", 2.5), *([("forgotten", "bad", 1.5)] if lost else [])])

    return drawing.draw(WIDTH, HEIGHT, MARGINS, "Gain and what is forgotten by strength of the adapter", paint)
