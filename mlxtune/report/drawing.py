"""Drawings by matplotlib as small SVG texts that take their colours from the page. Knows axes, not what is drawn.

A drawing has no ids, no links, no fonts of its own and no date: the same input gives the same text, and several stand
on one page. Colours are CSS variables, so that one drawing serves light, dark and paper.
"""

import io
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree
from xml.sax.saxutils import escape, quoteattr

from mlxtune.report.words import shorten, visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LONGEST = 48  # characters of a name in a drawing
COLOURS = {
    "card": "#fff", "text": "#1d2126", "muted": "#5d6670", "line": "#dfe1e4", "train": "#9aa3ad", "accent": "#1f6fb2",
    "good": "#1a7f4b", "bad": "#b3372f",
}  # fmt: skip
# what matplotlib is told to draw with, and what stands for it in the text
INK = {name: f"#0000{number:02x}" for number, name in enumerate(COLOURS, start=0xC0)}
STYLE = """
svg{display:block;width:100%;height:auto;font:12px system-ui,sans-serif}
svg .halo{paint-order:stroke;stroke:var(--card);stroke-width:5px}
svg .strong{font-weight:600}
"""
_KEPT = {"svg", "g", "path", "text"}


def draw(
    width: int,
    height: int,
    margins: tuple[int, int, int, int],
    title: str,
    paint: Callable[["Axes"], None],
    *,
    stretch: bool = True,
) -> str:
    """What `paint` draws on axes of a picture of `width` x `height` pixels with margins left, top, right, bottom.

    An artist's gid becomes its class. The axes begin without a frame and without ticks. The drawing is as wide as its
    place, or without `stretch` about as wide as it was drawn.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    left, top, right, bottom = margins
    with _quiet(), matplotlib.rc_context():
        matplotlib.rcdefaults()
        texts: dict[Any, Any] = {
            "svg.fonttype": "none",
            "text.parse_math": False,
            "text.usetex": False,
            "font.size": 12,
        }
        matplotlib.rcParams.update({**texts, "svg.hashsalt": "mlxtune", "path.simplify": False})
        figure = Figure(figsize=(width / 72, height / 72), dpi=72)
        FigureCanvasSVG(figure)
        box = (left / width, bottom / height, 1 - (left + right) / width, 1 - (top + bottom) / height)
        axes = figure.add_axes(box)
        axes.axis("off")
        paint(axes)
        out = io.BytesIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(out, format="svg", transparent=True, metadata=nothing)
    sized = "" if stretch else f' style="min-width:{round(0.8 * width)}px;max-width:{round(1.25 * width)}px"'
    opened = f'<svg viewBox="0 0 {width} {height}" role="img" aria-label={quoteattr(title)}{sized}>'
    return f"{opened}{_slim(out.getvalue())}</svg>"


def label(text: str) -> str:
    """A name as it stands in a drawing: one line without control characters, and not too long."""
    return shorten(" ".join(visible(text).split()), LONGEST)


def picture(drawing: str) -> str:
    """A drawing as an SVG file of its own, in colours for paper: many viewers know no variables."""
    style = STYLE.strip()
    opened = drawing.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    opened = opened.replace(">", f'><style>{style}</style><rect width="100%" height="100%" fill="#fff"/>', 1)
    for name, colour in COLOURS.items():
        opened = opened.replace(f"var(--{name})", colour)
    return opened + "\n"


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps matplotlib from telling of fonts, glyphs and its cache."""
    logger = logging.getLogger("matplotlib")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _slim(svg: bytes) -> str:
    """What is drawn, without namespaces, ids, defaults and what cannot be seen; markers stand where they are used."""
    root = ElementTree.fromstring(svg)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
    markers = {found.get("id"): found for defs in root.iter("defs") for found in defs.iter("path")}
    return "".join(_written(each, markers) for each in root)


def _written(element: ElementTree.Element, markers: dict[str | None, ElementTree.Element]) -> str:
    """An element as text; empty where nothing of it is seen."""
    given = {name.rpartition("}")[2]: value for name, value in element.attrib.items()}
    style = _style(given.get("style", ""))
    if element.tag == "use":
        marker = markers[given["href"].removeprefix("#")]
        moved = f'transform="translate({given["x"]} {given["y"]})"'
        return f'<path d="{_path(marker.get("d", ""))}" {moved} style="{style}"/>'
    if element.tag not in _KEPT or (element.tag == "path" and style == "fill:none"):
        return ""
    attributes = []
    if element.tag == "g" and (given.get("id") or "").startswith("c-"):
        attributes.append(f"class={quoteattr(given['id'].removeprefix('c-').replace('+', ' '))}")
    attributes += [f"{name}={quoteattr(_path(given[name]))}" for name in ("d", "x", "y") if name in given]
    if "transform" in given and "rotate(-0 " not in given["transform"]:
        attributes.append(f"transform={quoteattr(given['transform'])}")
    if style:
        attributes.append(f'style="{style}"')
    inner = escape(element.text) if element.tag == "text" and element.text else ""
    inner += "".join(_written(each, markers) for each in element)
    if not inner and element.tag in ("g", "text"):
        return ""
    if element.tag == "g" and not attributes:
        return inner
    return (
        f"<{' '.join([element.tag, *attributes])}>{inner}</{element.tag}>"
        if inner
        else (f"<{' '.join([element.tag, *attributes])}/>")
    )


def _path(numbers: str) -> str:
    """Coordinates on one line, to a hundredth of a pixel."""
    return " ".join(
        f"{float(each):.2f}".rstrip("0").rstrip(".") if _is_number(each) else each for each in numbers.split()
    )


def _is_number(text: str) -> bool:
    return text.lstrip("-").replace(".", "", 1).replace("e-", "", 1).isdigit()


def _style(style: str) -> str:
    """A style without the font's family, its colours by their names in the page."""
    parts = [part.strip() for part in style.split(";") if part.strip() and not part.strip().startswith("font-family")]
    text = ";".join(part.replace(": ", ":") for part in parts)
    for name, ink in INK.items():
        text = text.replace(ink, f"var(--{name})")
    return text
