"""Loss curves and bars as SVG texts for an HTML page. Knows points and shares, not runs.

Colours are CSS variables (`STYLE` has the classes), so that one drawing serves light, dark and paper.
"""

import html
import math
import re
from collections.abc import Sequence
from typing import Any

from mlxtune.report.score import Score
from mlxtune.report.words import figure, number

WIDTH, HEIGHT = 380, 250
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 30, 44  # margins around the plot
BEST_WIDTH = 180  # of the words at the best point
BAR_LEFT, BAR_TOP, BAR_STEP, BAR_HEIGHT = 52, 6, 52, 20

STYLE = """
svg{display:block;width:100%;height:auto;font:12px system-ui,sans-serif}
svg text{fill:var(--muted)}
svg .strong{fill:var(--text);font-weight:600}
svg .halo{paint-order:stroke;stroke:var(--card);stroke-width:5px}
svg .grid{stroke:var(--line);stroke-width:1}
svg .train{fill:none;stroke:var(--train);stroke-width:1.5}
svg .valid{fill:none;stroke:var(--accent);stroke-width:2.5}
svg .dot{fill:var(--accent)}
svg .train-dot{fill:var(--train)}
svg .best{fill:none;stroke:var(--text);stroke-width:1.5}
svg .best-line{stroke:var(--text);stroke-width:1;stroke-dasharray:3 3}
svg .bar-base{fill:var(--train)}
svg .bar-tuned,svg .bar-fused{fill:var(--accent)}
svg .whisker{stroke:var(--text);stroke-width:1.5}
"""


# the colours of a picture that stands alone, where many viewers know no variables; a page brings its own
_COLOURS = {
    "card": "#fff", "text": "#1d2126", "muted": "#5d6670", "line": "#dfe1e4", "train": "#9aa3ad", "accent": "#1f6fb2",
}  # fmt: skip


def picture(drawing: str) -> str:
    """A drawing as an SVG file of its own."""
    style = re.sub(r"var\(--(\w+)\)", lambda name: _COLOURS[name[1]], STYLE.strip())
    paper = '<rect width="100%" height="100%" fill="#fff"/>'
    opened = drawing.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    return opened.replace(">", f"><style>{style}</style>{paper}", 1) + "\n"


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) that span `low` to `high`, about `count` of them."""
    if high <= low:
        low, high = low - 0.5, low + 0.5
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


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
    across, down = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def x(step: float) -> float:
        return LEFT + across * step / steps[-1]

    def y(loss: float) -> float:
        return TOP + down * (levels[-1] - loss) / (levels[-1] - levels[0])

    parts = []
    for level in levels:
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(level):.1f}" y2="{y(level):.1f}"/>')
        parts.append(_text(LEFT - 8, y(level) + 4, f"{level:g}", "end"))
    for step in steps:
        if step == int(step):
            parts.append(_text(x(step), HEIGHT - BOTTOM + 18, f"{step:,.0f}", "middle"))
    parts.append(_text(LEFT + across / 2, HEIGHT - 6, "updates", "middle"))
    parts.append(_text(LEFT - 40, 14, "loss, nats per token", "start"))
    parts.append(_series("train", train, x, y))
    parts.append(_series("valid", valid, x, y))
    # a line through one point cannot be seen
    parts += [f'<circle class="train-dot" cx="{x(s):.1f}" cy="{y(v):.1f}" r="3"/>' for s, v in train[: len(train) == 1]]
    parts += [f'<circle class="dot" cx="{x(s):.1f}" cy="{y(v):.1f}" r="3"/>' for s, v in valid]
    parts += [_best(x(s), y(v), s, v) for s, v in valid if s == best_step]
    legend = [("train", "training", train), ("valid", "validation", valid)]
    for index, (name, words, points) in enumerate(legend):
        if points:
            left = WIDTH - RIGHT - 190 + 95 * index
            parts.append(f'<line class="{name}" x1="{left}" x2="{left + 20}" y1="10" y2="10"/>')
            parts.append(_text(left + 26, 14, words, "start"))
    return _svg(WIDTH, HEIGHT, "Training and validation loss over the updates", parts)


def bars(columns: Sequence[tuple[str, Score]]) -> str:
    """One bar for each named share, with its 95 % interval as a whisker; empty without any."""
    if not columns:
        return ""
    height = BAR_TOP + BAR_STEP * len(columns) + 22
    across = WIDTH - BAR_LEFT - RIGHT

    def x(share: float) -> float:
        return BAR_LEFT + across * share

    parts = []
    for share in (0, 0.25, 0.5, 0.75, 1):
        parts.append(f'<line class="grid" x1="{x(share):.1f}" x2="{x(share):.1f}" y1="{BAR_TOP}" y2="{height - 20}"/>')
        parts.append(_text(x(share), height - 4, f"{share * 100:.0f} %", "end" if share == 1 else "middle"))
    for index, (name, score) in enumerate(columns):
        top = BAR_TOP + BAR_STEP * index + 16
        middle = top + BAR_HEIGHT / 2
        parts.append(_text(BAR_LEFT - 8, middle + 4, name, "end", "strong"))
        parts.append(_text(BAR_LEFT + 4, top - 5, figure(score), "start"))
        parts.append(
            f'<rect class="bar-{html.escape(name)}" x="{BAR_LEFT}" y="{top}" '
            f'width="{max(1.0, across * score.value):.1f}" height="{BAR_HEIGHT}" rx="2"/>'
        )
        low, high = x(score.ci_low), x(score.ci_high)
        parts.append(f'<line class="whisker" x1="{low:.1f}" x2="{high:.1f}" y1="{middle:.1f}" y2="{middle:.1f}"/>')
        for end in (low, high):
            parts.append(
                f'<line class="whisker" x1="{end:.1f}" x2="{end:.1f}" y1="{middle - 5:.1f}" y2="{middle + 5:.1f}"/>'
            )
    return _svg(WIDTH, height, "Share of right answers with 95 % intervals", parts)


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
    across, down = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def x(size: float) -> float:
        return LEFT + across * size / unit / sizes[-1]

    def y(log: float) -> float:
        return TOP + down * (powers[-1] - log) / (powers[-1] - powers[0])

    parts = []
    for power in powers:
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(power):.1f}" y2="{y(power):.1f}"/>')
        parts.append(_text(LEFT - 8, y(power) + 4, f"{10.0**power:g}", "end"))
    for size in sizes:
        parts.append(_text(x(size * unit), HEIGHT - BOTTOM + 18, f"{size:g}", "middle"))
    parts.append(_text(LEFT + across / 2, HEIGHT - 6, f"size, {name}", "middle"))
    parts.append(_text(LEFT - 40, 14, "KL divergence from the source, nats per token", "start"))
    line = " ".join(f"{x(size):.1f},{y(log):.1f}" for (_, size, _), log in zip(points, logs, strict=True))
    parts.append(f'<polyline class="valid" points="{line}"/>')
    for (label, size, _), log in zip(points, logs, strict=True):
        anchor, shift = ("end", -8) if x(size) > WIDTH - 70 else ("start", 8)
        parts.append(f'<circle class="dot" cx="{x(size):.1f}" cy="{y(log):.1f}" r="3"/>')
        parts.append(_text(x(size) + shift, y(log) - 6, label, anchor, "strong halo"))
    return _svg(WIDTH, HEIGHT, "KL divergence against size", parts)


def _svg(width: int, height: int, title: str, parts: list[str]) -> str:
    body = "".join(part for part in parts if part)
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{html.escape(title)}">{body}</svg>'


def _text(x: float, y: float, words: str, anchor: str, style: str = "") -> str:
    named = f' class="{style}"' if style else ""
    return f'<text{named} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(words)}</text>'


def _series(name: str, points: list[tuple[int, float]], x: Any, y: Any) -> str:
    if len(points) < 2:
        return ""
    return f'<polyline class="{name}" points="{" ".join(f"{x(s):.1f},{y(v):.1f}" for s, v in points)}"/>'


def _best(x: float, y: float, step: int, loss: float) -> str:
    # at the top of the plot, where a falling curve leaves room; beside the line, or on it where neither side has room
    anchor, shift = "middle", 0
    if x + 8 + BEST_WIDTH <= WIDTH - RIGHT:
        anchor, shift = "start", 8
    elif x - 8 - BEST_WIDTH >= LEFT:
        anchor, shift = "end", -8
    words = _text(x + shift, TOP + 14, f"best: {number(loss)} at update {step:,}", anchor, "strong halo")
    return (
        f'<line class="best-line" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
        f'<circle class="best" cx="{x:.1f}" cy="{y:.1f}" r="6"/>{words}'
    )
