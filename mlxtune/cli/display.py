"""What commands show: results to stdout, progress and notes to stderr. Knows how, not what."""

import json
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click

from mlxtune.report.words import duration

# What moves a terminal's cursor, colours it or turns text around: C0 but tab and newline, DEL, C1, bidi overrides.
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def result(text: str = "") -> None:
    """A line of the result, to stdout."""
    click.echo(text)


def result_json(value: Any) -> None:
    """The result as one JSON value, to stdout; what a terminal would obey is written as JSON escapes."""
    line = json.dumps(value, ensure_ascii=False, allow_nan=False)
    click.echo(CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", line))


def note(text: str) -> None:
    """A line beside the result, to stderr."""
    click.echo(text, err=True)


def warn(text: str) -> None:
    """A warning, to stderr."""
    click.echo(click.style("warning: ", fg="yellow", bold=True) + text, err=True)


def harmless(text: str) -> str:
    r"""Text for a terminal: control characters as visible escapes, such as \x1b."""
    return CONTROLS.sub(lambda found: _escaped(ord(found[0])), text)


def _escaped(code: int) -> str:
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def count(number: int, noun: str) -> str:
    """`1 row`, `2 rows`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def table(headings: list[str], rows: list[list[str]]) -> None:
    """A small table to stdout; the first column is left-aligned, the others right-aligned."""
    widths = [max(len(row[i]) for row in [headings, *rows]) for i in range(len(headings))]

    def line(cells: list[str]) -> str:
        padded = [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
        return "  ".join(padded).rstrip()

    result(click.style(line(headings), bold=True))
    for row in rows:
        result(line(row))


class Progress:
    """One line of progress: a live bar on a terminal, else a plain line at most every ten seconds."""

    def __init__(self, label: str, total: int):
        self.label, self.total, self.done = label, total, 0
        self.started = self.spoken = time.monotonic()
        self.live = sys.stderr.isatty()
        self.detail = ""

    def update(self, done: int, detail: str = "") -> None:
        """`done` of `total` steps are finished; `detail` is shown behind them."""
        self.done, self.detail = done, detail
        now = time.monotonic()
        if self.live and (now - self.spoken > 0.1 or done >= self.total):
            self.spoken = now
            width = shutil.get_terminal_size().columns
            click.echo("\r\x1b[2K" + self.text(bar=True)[: width - 1], err=True, nl=False)
        elif not self.live and now - self.spoken > 10:
            self.spoken = now
            note(self.text(bar=False))

    def text(self, *, bar: bool) -> str:
        spent = time.monotonic() - self.started
        share = self.done / self.total if self.total else 1.0
        left = f"{duration(spent / share - spent)} left" if 0 < share < 1 else duration(spent)
        drawn = "█" * int(share * 20) + "·" * (20 - int(share * 20)) + " " if bar else ""
        return "  ".join(filter(None, [f"  {self.label:<14}{drawn}{self.done}/{self.total}", self.detail, left]))

    def rate(self, done: int) -> str:
        """`123/s`, once it can be told."""
        spent = time.monotonic() - self.started
        return f"{done / spent:,.{0 if done >= 10 * spent else 1}f}/s" if done and spent > 1 else ""

    def close(self) -> None:
        if self.live:
            click.echo("\r\x1b[2K", err=True, nl=False)


@contextmanager
def progress(label: str, total: int) -> Iterator[Progress]:
    """A progress line that is gone when the block ends."""
    shown = Progress(label, total)
    try:
        yield shown
    finally:
        shown.close()


@contextmanager
def phases() -> Iterator[Callable[[str, int, int], None]]:
    """A function `(phase, done, total)` that shows a progress line a phase; the line is gone when the block ends."""
    shown: list[Progress] = []

    def update(phase: str, done: int, total: int) -> None:
        if not shown or shown[-1].label != phase:
            shown.append(Progress(phase, total))
        shown[-1].update(done, shown[-1].rate(done))

    try:
        yield update
    finally:
        for each in shown[-1:]:
            each.close()
