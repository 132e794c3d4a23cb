"""How strong an adapter should be: its gain on rows against what a text shows to be forgotten, scale by scale.

Knows model and adapter folders, samples and a text; fuses nothing.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mlxtune import adapter, likelihood, model
from mlxtune.data.render import Sample
from mlxtune.errors import DataError
from mlxtune.fidelity import read_text
from mlxtune.fusing import blend
from mlxtune.fusing.blend import Part
from mlxtune.model import LanguageModel
from mlxtune.tokenizer import load_tokenizer

SCALES = (0.0, 0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5)
NEAR = 0.02  # of the best gain that may be given up where less is forgotten for it


@dataclass(frozen=True, slots=True, kw_only=True)
class Strength:
    """The adapter at `scale`: losses in nats per token on the rows and on the text, and the differences from scale 0.

    `gain` is how much lower the loss on the rows is, `forgotten` how much higher that on the text; None without one.
    """

    scale: float
    loss: float
    gain: float
    anchor_loss: float | None
    forgotten: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """All scales on `rows` rows, and the one to choose."""

    rows: int
    points: tuple[Strength, ...]
    chosen: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def sweep(
    base: Path,
    parts: Sequence[Part],
    samples: Sequence[Sample],
    anchor: str | None = None,
    scales: Sequence[float] = SCALES,
    on_scale: Callable[[int, int], None] = lambda done, total: None,
) -> Sweep:
    """Measures base + scale·adapters on `samples`, and on the text of the file `anchor` where there is one.

    Raises DataError without samples, InputError for an adapter without a strength of its own (DoRA), ModelError.
    """
    if not samples:
        raise DataError("has no rows to measure strengths on", where="--sweep-scale", hint="give --data FILE")
    blend.check([replace(part, weight=part.weight / 2) for part in parts])
    text = _text(base, anchor) if anchor is not None else []
    measured: dict[float, tuple[float, float | None]] = {}
    for scale, lm in _strengthened(base, parts, sorted({0.0, *scales})):
        measured[scale] = (
            likelihood.mean_nats(lm.net, samples),
            likelihood.mean_nats(lm.net, text) if text else None,
        )
        on_scale(len(measured), len({0.0, *scales}))
    loss, anchor_loss = measured[0.0]
    points = tuple(
        Strength(
            scale=scale,
            loss=found,
            gain=loss - found,
            anchor_loss=of_text,
            forgotten=of_text - anchor_loss if of_text is not None and anchor_loss is not None else None,
        )
        for scale, (found, of_text) in measured.items()
    )
    return Sweep(rows=len(samples), points=points, chosen=best(points))


def best(points: Sequence[Strength]) -> float:
    """The scale of the largest gain; where it is known what is forgotten, of the least of that among gains near it."""
    most = max(point.gain for point in points)
    near = [point for point in points if point.gain >= most - NEAR * max(most, 0.0)]
    return min(near, key=lambda point: (point.forgotten or 0.0, -point.gain, point.scale)).scale


def _strengthened(base: Path, parts: Sequence[Part], scales: Sequence[float]) -> Iterator[tuple[float, LanguageModel]]:
    """Each scale with the model that has its adapters at it; the models are one and the same where they can be."""
    lm = model.load(base)
    blend.attach(lm, parts)
    own = [(layer, layer.scale) for _, layer in adapter.adapted_layers(lm.net)]
    for scale in scales:
        if not own:  # a full tuning
            lm = model.load(base)
            blend.attach(lm, [replace(part, weight=part.weight * scale) for part in parts])
        for layer, plain in own:
            layer.scale = plain * scale
        yield scale, lm


def _text(base: Path, anchor: str) -> list[Sample]:
    net, config = model.outline(base)
    return read_text(LanguageModel(net, load_tokenizer(base, config), config, base), anchor)
