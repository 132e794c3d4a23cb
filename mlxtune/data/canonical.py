"""Rows of any format -> canonical JSONL: `messages` and `tools`, or `text`, with the row's other columns beside them.

A canonical file that is converted again gives the same bytes. Knows rows and formats, not where rows come from.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxtune.data import columns
from mlxtune.data.files import Row, check_target, jsonl
from mlxtune.data.formats import Chat, Completion, Example, as_chat, format_of, to_value
from mlxtune.data.load import as_examples
from mlxtune.data.messages import unknown
from mlxtune.errors import DataError
from mlxtune.recipe import DataRecipe
from mlxtune.rundir import staged, write_text

Source = Callable[[], list[Row]]


@dataclass(frozen=True, slots=True)
class Converted:
    """A file that was written, how many rows it has, and how many `data.keep` left out."""

    split: str
    path: Path
    rows: int
    left_out: int


def convert(
    sources: Mapping[str, Source],
    data: DataRecipe,
    out: Path,
    on_row: Callable[[str, int, int], None] = lambda split, done, total: None,
) -> list[Converted]:
    """Writes the rows of each split: `all` to the file `out`, else a file a split into the folder `out`.

    All or nothing: raises DataError for a malformed row, OutputError as `check_target`, and then leaves no file.
    """
    is_file = list(sources) == ["all"]
    check_target(out, "OUT", folder=not is_file)
    if is_file:
        text, rows, left_out = _lines("all", sources["all"](), data, on_row)
        write_text(out, text)
        return [Converted("all", out, rows, left_out)]
    done = []
    with staged(out) as scratch:
        for split, source in sources.items():
            text, rows, left_out = _lines(split, source(), data, on_row)
            name = f"{split}.jsonl"
            write_text(scratch / name, text)
            done.append(Converted(split, out / name, rows, left_out))
    return done


def _lines(
    split: str, rows: list[Row], data: DataRecipe, on_row: Callable[[str, int, int], None]
) -> tuple[str, int, int]:
    """The text of a split's file, its rows, and how many were left out."""
    examples = as_examples(rows, data)
    values = []
    for done, (row, example) in enumerate(examples, start=1):
        values.append(canonical(row, example, data))
        on_row(split, done, len(examples))
    return jsonl(values), len(examples), len(rows) - len(examples)


def canonical(row: Row, example: Example, data: DataRecipe) -> dict[str, Any]:
    """The canonical value of a row that was read as `example`. Raises DataError for a column that is in its way."""
    if isinstance(example, Chat):
        example = _with_unknown(row, example)
    elif isinstance(example, Completion):
        example = as_chat(example)
    value = to_value(example)
    read = _read_columns(row, data)
    others = {name: each for name, each in row.value.items() if name not in read}
    for name in ("messages", "tools") if "messages" in value else ():
        if others.pop(name, None) is not None:
            what = f"has a column `{name}`, which is not read here and would be afterwards"
            raise DataError(what, where=row.where, hint="rename or delete it")
    return {**value, **others}


def _with_unknown(row: Row, example: Chat) -> Chat:
    """A conversation with what stands in the row's messages besides, such as a time."""
    items = row.value.get("messages") or row.value["conversations"]
    added = len(example.messages) - len(items)  # a system prompt that has a column of its own
    besides: list[dict[str, Any]] = [{}] * added + [unknown(item) for item in items]
    messages = [{**message, **more} for message, more in zip(example.messages, besides, strict=True)]
    return Chat(messages, example.tools)


def _read_columns(row: Row, data: DataRecipe) -> set[str]:
    """The columns that a row's example holds whole; a Jinja text may hold only a part of those it names."""
    texts = columns.wanted(data)
    if texts is not None:
        return {text for text in texts if columns.is_column(text)}
    found = format_of(row)
    return {*found.needed, *found.optional} if found is not None else set()
