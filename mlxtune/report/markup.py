"""HTML of texts, tables and sections, everything escaped. Knows no report."""

import html
from collections.abc import Sequence

from mlxtune.report.difference import Piece, marked
from mlxtune.report.words import visible


def text(words: str) -> str:
    """A text of a model, of data or of ours, as text."""
    return html.escape(visible(words))


def section(title: str, body: str, style: str = "") -> str:
    """A titled part of the page; empty without a body."""
    named = f' class="{style}"' if style else ""
    return f"<section{named}>\n<h2>{text(title)}</h2>\n{body}\n</section>\n" if body else ""


def facts(rows: Sequence[tuple[str, str]]) -> str:
    """Names and texts as a list; empty without any."""
    body = "".join(f"<dt>{text(name)}</dt><dd>{text(words)}</dd>\n" for name, words in rows)
    return f'<dl class="facts">\n{body}</dl>' if body else ""


def bullets(lines: Sequence[str]) -> str:
    body = "".join(f"<li>{text(each)}</li>" for each in lines)
    return f"<ul>{body}</ul>" if body else ""


def note(words: str) -> str:
    return f'<p class="note">{text(words)}</p>' if words else ""


def table(headings: Sequence[str], rows: Sequence[str], style: str = "") -> str:
    """A table that scrolls in itself where the page is narrow; `rows` are whole `<tr>` texts."""
    heads = "".join(f"<th>{text(each)}</th>" for each in headings)
    named = f' class="{style}"' if style else ""
    body = "\n".join(rows)
    return (
        f'<div class="scroll"><table{named}>\n<thead><tr>{heads}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'
    )


def row(cells: Sequence[str], style: str = "") -> str:
    """A row of texts, the interval of a figure below it."""
    name, *others = cells
    named = f' class="{style}"' if style else ""
    return f"<tr{named}><td>{text(name)}</td>{''.join(cell(each) for each in others)}</tr>"


def cell(words: str) -> str:
    """A figure such as `91.7 % (84-96)`, its interval below it."""
    figure, _, interval = words.partition(" (")
    below = f"<span>{text(interval.rstrip(')')).replace('-', '-<wbr>')}</span>" if interval else ""
    return f"<td><b>{text(figure)}</b>{below}</td>"


def words(content: str) -> str:
    """A text of a model or of data; a missing one is named."""
    return text(content.strip("\n")) if content.strip() else "<i>(empty)</i>"


def pair(before: str, after: str) -> tuple[str, str]:
    """Two texts side by side, what only one of them has marked."""
    first, second = marked(before.strip("\n"), after.strip("\n"))
    return (
        _pieces(first, "del") if before.strip() else words(""),
        _pieces(second, "ins") if after.strip() else words(""),
    )


def _pieces(pieces: Sequence[Piece], tag: str) -> str:
    return "".join(text(part) if same else f"<{tag}>{text(part)}</{tag}>" for part, same in pieces)


def mark(right: bool) -> str:
    return '<span class="right">✓ right</span>' if right else '<span class="wrong">✗ wrong</span>'
