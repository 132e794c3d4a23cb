"""The good rows of a data set with what the checks compare. Knows examples, not what is wrong with them."""

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mlxtune.data import pii
from mlxtune.data.audit.findings import PLACES
from mlxtune.data.files import Row, scan_rows
from mlxtune.data.formats import Chat, Example, answer_text, last_learned, prompt_text
from mlxtune.data.labels import find_labels, plain
from mlxtune.data.load import Rows, scan_examples
from mlxtune.data.similar import normalise
from mlxtune.errors import DataError
from mlxtune.recipe import DataRecipe

FindPersonal = Callable[[str], list[pii.Finding]]


@dataclass(frozen=True, slots=True)
class Entry:
    """A good row with what the checks compare.

    `place` counts all good rows. `key` is the normalised prompt, or the answer of a row that asks nothing; `context`
    is the rest of what stands before the answer: system prompt, earlier answers, tools. Rows with the same key and
    context ask the same. `meaning` is the label without its spelling.
    """

    place: int
    split: str
    row: Row
    example: Example
    prompt: str
    answer: str | None
    key: str
    context: str
    label: str | None
    meaning: str | None

    @property
    def question(self) -> tuple[str, str]:
        return self.context, self.key


@dataclass(frozen=True, slots=True)
class Table:
    """All good rows in order, and what is wrong with the others.

    `pattern` finds the labels and `find` personal data, `near` asks for near-duplicates, and a finding names at most
    `places` rows.
    """

    files: dict[str, Path]
    entries: list[Entry]
    mistakes: list[DataError]
    pattern: str | None
    near: bool
    places: int
    find: FindPersonal = pii.find


def read(
    files: dict[str, Path],
    data: DataRecipe,
    label: str | None,
    *,
    near: bool = True,
    places: int = PLACES,
    find: FindPersonal = pii.find,
) -> Table:
    """The rows of all files. Raises DataError for a file that cannot be read at all."""
    found: list[tuple[str, Row, Example]] = []
    mistakes: list[DataError] = []
    for name, path in files.items():
        good, bad = _read(path, data)
        found += [(name, row, example) for row, example in good]
        mistakes += bad
    return Table(files, entries_of(found, label), mistakes, label, near, places, find)


def entries_of(found: Sequence[tuple[str, Row, Example]], label: str | None) -> list[Entry]:
    """The entries of rows with their split, in the same order."""
    answers = [answer_text(example) for _, _, example in found]
    labels = find_labels(answers, label) or [None] * len(found)
    return [
        _entry(place, *each, answer, named)
        for place, (each, answer, named) in enumerate(zip(found, answers, labels, strict=True))
    ]


def _read(path: Path, data: DataRecipe) -> tuple[Rows, list[DataError]]:
    """The good rows of a file that `data.keep` keeps, and what is wrong with the others."""
    rows, mistakes = scan_rows(path)
    good, more = scan_examples(rows, data)
    mistakes += more
    if not good and not mistakes:
        what = "has no row that data.keep keeps" if rows else "has no rows"
        mistakes.append(DataError(what, where=path, hint="check data.keep" if rows else "write one row a line"))
    return good, mistakes


def _entry(place: int, split: str, row: Row, example: Example, answer: str | None, label: str | None) -> Entry:
    prompt = prompt_text(example)
    key = normalise(prompt.strip() or answer or "")
    meaning = None if label is None else plain(label)
    return Entry(place, split, row, example, prompt, answer, key, _context(example), label, meaning)


def _context(example: Example) -> str:
    """What a conversation holds before its answer beside the user's words; empty where there is nothing."""
    if not isinstance(example, Chat):
        return ""
    before = [m for m in example.messages[: last_learned(example)] if m["role"] != "user"]
    if not before and not example.tools:
        return ""
    return json.dumps([before, example.tools], sort_keys=True, ensure_ascii=False)


def by_question(entries: Sequence[Entry]) -> dict[tuple[str, str], list[Entry]]:
    """The entries that ask the same, in order."""
    found: dict[tuple[str, str], list[Entry]] = defaultdict(list)
    for entry in entries:
        found[entry.question].append(entry)
    return found


def labelled(entries: Sequence[Entry]) -> bool:
    """Whether the answers give labels."""
    return any(entry.label is not None for entry in entries)
