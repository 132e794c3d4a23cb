"""A cleaned copy of a data set: copies left out, labels spelt one way, personal data replaced. Knows no meaning.

What only a person can decide stays: contradictions, near-duplicates, and rows that stand in two splits.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlxtune.data.audit.entries import Entry, Table, entries_of
from mlxtune.data.audit.findings import quoted
from mlxtune.data.audit.labels import twins
from mlxtune.data.files import check_target, jsonl
from mlxtune.data.formats import Chat, Completion, Example, answer_text, last_learned, to_value
from mlxtune.data.labels import label_span
from mlxtune.data.similar import normalise
from mlxtune.errors import DataError
from mlxtune.rundir import staged, write_text

Redact = Callable[[Example], tuple[Example, dict[str, str]]]


@dataclass(frozen=True, slots=True)
class Change:
    """One kind of change: what was done, to how many rows, and where the first ones are."""

    what: str
    count: int
    where: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return {"what": self.what, "count": self.count, "where": list(self.where)}


@dataclass(frozen=True, slots=True)
class Fixed:
    """A cleaned copy, not yet written: canonical rows by split, and what changed.

    `redacted` has placeholder -> original by split and line of the copy; `read` counts the rows of the input.
    """

    rows: dict[str, list[dict[str, Any]]]
    changes: tuple[Change, ...]
    redacted: dict[tuple[str, int], dict[str, str]]
    read: int

    @property
    def count(self) -> int:
        return sum(map(len, self.rows.values()))


def fix(table: Table, group_by: str | None = None, redact: Redact | None = None) -> Fixed:
    """The cleaned rows of a data set, each with its column `group_by`, by which a later split keeps rows together.

    Malformed rows are left out. Raises DataError where no row is left.
    """
    if not table.entries:
        raise table.mistakes[0] if table.mistakes else DataError("has no rows", where=next(iter(table.files.values())))
    changes = _left_out(table.mistakes, table.places)
    entries, respelt = _respelt(table)
    entries, repeated = _once(entries, table.places)
    maps: dict[int, dict[str, str]] = {}
    hidden: list[Change] = []
    if redact is not None:
        entries, maps, hidden = _redacted(entries, redact, table.places)
    groups = _groups(entries, group_by, hide=redact is not None)
    rows: dict[str, list[dict[str, Any]]] = {split: [] for split in table.files}
    redacted: dict[tuple[str, int], dict[str, str]] = {}
    for entry in entries:
        rows[entry.split].append({**to_value(entry.example), **groups.get(entry.place, {})})
        if maps.get(entry.place):
            redacted[entry.split, len(rows[entry.split])] = maps[entry.place]
    read = len(table.entries) + len(table.mistakes)
    return Fixed(rows, (*changes, *respelt, *repeated, *hidden), redacted, read)


def write(fixed: Fixed, out: Path) -> list[Path]:
    """Writes the copy: one file, or a folder of splits. All of it or nothing. Raises OutputError or StorageError."""
    is_file = list(fixed.rows) == ["all"]
    check_target(out, "--fix", folder=not is_file)
    if is_file:
        write_text(out, jsonl(fixed.rows["all"]))
        return [out]
    with staged(out) as scratch:
        for split, rows in fixed.rows.items():
            write_text(scratch / f"{split}.jsonl", jsonl(rows))
    return [out / f"{split}.jsonl" for split in fixed.rows]


def redact_map(fixed: Fixed, out: Path) -> dict[str, dict[str, str]]:
    """Placeholder -> original by row of the copy in `out`, `file:line`."""
    file = {split: out if split == "all" else out / f"{split}.jsonl" for split in fixed.rows}
    return {f"{file[split]}:{line}": originals for (split, line), originals in fixed.redacted.items()}


def _change(what: str, entries: Sequence[Entry], places: int) -> Change:
    return Change(what, len(entries), tuple(entry.row.where for entry in entries[:places]))


def _left_out(mistakes: Sequence[DataError], places: int) -> list[Change]:
    where = tuple(str(mistake.where) for mistake in mistakes[:places])
    return [Change("left out: malformed", len(mistakes), where)] if mistakes else []


def _respelt(table: Table) -> tuple[list[Entry], list[Change]]:
    """The entries with each label as most rows spell it."""
    usual = twins(table.entries, table.pattern)
    if not usual:
        return table.entries, []
    examples: list[Example] = []
    changed: dict[str, list[Entry]] = defaultdict(list)
    for entry in table.entries:
        span = label_span(entry.answer or "", table.pattern) if entry.label is not None else None
        said = _said(entry.example)
        written = said[slice(*span)] if span is not None and span[1] <= len(said) else None
        if span is None or written is None or written not in usual:
            examples.append(entry.example)
            continue
        changed[written].append(entry)
        examples.append(_with_answer(entry.example, said[: span[0]] + usual[written] + said[span[1] :]))
    found = [(e.split, e.row, example) for e, example in zip(table.entries, examples, strict=True)]
    what = "label respelt: {} → {}"
    changes = [
        _change(what.format(quoted(written), quoted(usual[written])), having, table.places)
        for written, having in changed.items()
    ]
    return entries_of(found, table.pattern), changes


def _said(example: Example) -> str:
    """The text of the last answer without its tool calls, with which `answer_text` begins."""
    if isinstance(example, Chat):
        content: str = example.messages[last_learned(example)]["content"]
        return content
    return example.completion if isinstance(example, Completion) else ""


def _with_answer(example: Example, answer: str) -> Example:
    """An example whose last answer says something else."""
    if isinstance(example, Chat):
        place = last_learned(example)
        messages = [*example.messages[:place], {**example.messages[place], "content": answer}]
        return replace(example, messages=[*messages, *example.messages[place + 1 :]])
    return replace(example, completion=answer) if isinstance(example, Completion) else example


def _once(entries: list[Entry], places: int) -> tuple[list[Entry], list[Change]]:
    """The first of the rows of a split that ask the same and answer the same, as an audit compares them."""
    first: set[tuple[str, tuple[str, str], str]] = set()
    kept: list[Entry] = []
    copies: list[Entry] = []
    for entry in entries:
        identity = entry.split, entry.question, normalise(entry.answer or "")
        (copies if identity in first else kept).append(entry)
        first.add(identity)
    return kept, [_change("left out: duplicate", copies, places)] if copies else []


def _redacted(
    entries: list[Entry], redact: Redact, places: int
) -> tuple[list[Entry], dict[int, dict[str, str]], list[Change]]:
    """The entries without personal data, and what stood for each placeholder in each of them."""
    done: list[Entry] = []
    maps: dict[int, dict[str, str]] = {}
    for entry in entries:
        example, hidden = redact(entry.example)
        done.append(replace(entry, example=example, answer=answer_text(example)) if hidden else entry)
        if hidden:
            maps[entry.place] = hidden
    changed = [entry for entry in entries if entry.place in maps]
    return done, maps, [_change("personal data replaced", changed, places)] if changed else []


def _groups(entries: Sequence[Entry], column: str | None, *, hide: bool) -> dict[int, dict[str, Any]]:
    """The column that a later split groups by, by row, unless the row's own value has it, as it may be the prompt.

    `hide` puts numbers for its values, which may be names.
    """
    if column is None:
        return {}
    having = [entry for entry in entries if column in entry.row.value and column not in to_value(entry.example)]
    values = {entry.place: entry.row.value[column] for entry in having}
    if not hide:
        return {place: {column: value} for place, value in values.items()}
    numbers: dict[str, int] = {}
    keys = {place: json.dumps(value, sort_keys=True) for place, value in values.items()}
    return {place: {column: numbers.setdefault(key, len(numbers) + 1)} for place, key in keys.items()}
