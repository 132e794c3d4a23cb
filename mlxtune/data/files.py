"""Files of examples -> rows that know where they come from, and back. Knows file formats, not what a row means."""

import codecs
import csv
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from mlxtune.data import json_text, parquet
from mlxtune.data.contents import STDIN, SUFFIXES, Contents, read, unreadable
from mlxtune.errors import DataError, OutputError
from mlxtune.rundir import refuse_existing

SPLIT_NAMES = {"train": ("train",), "valid": ("valid", "val", "validation"), "test": ("test",)}
HUB_NAME = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}(/[\w.-]+)?(:[\w.-]+)?")
EMBEDDED = Path(str(resources.files("mlxtune") / "assets" / "tickets.jsonl"))
LONGEST_ROW = 16 << 20  # bytes of a line of JSONL, characters of a column of CSV

Found = Iterator["Row | DataError"]


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a file. `line` counts from 1; in a JSON list or a Parquet file it is the item's number."""

    file: str
    line: int
    value: dict[str, Any]

    @property
    def where(self) -> str:
        return f"{self.file}:{self.line}"


def resolve(name: str) -> Path:
    """The path that a recipe or flag names; `tickets` is the embedded set, `-` is what is piped in.

    Raises DataError if there is no such path.
    """
    try:
        path = Path(name).expanduser()
    except RuntimeError:  # `~` and a user whom this machine does not know
        path = Path(name)
    try:
        if path == STDIN or path.exists():
            return path
    except OSError as error:
        raise unreadable(name, error) from None
    if name == EMBEDDED.stem:
        return EMBEDDED
    hint = "give a JSONL, JSON or CSV file, a Parquet file, a gzip of one, or a folder of splits"
    if is_hub_name(name):
        hint = f"check its name; a data set of the hub is fetched first, by `mlxtune data convert {name} FOLDER`"
    raise DataError("no such file or folder", where=name, hint=hint)


def is_hub_name(name: str) -> bool:
    """Whether a name can be that of a data set on the hub, as `org/name:split`, rather than of a file."""
    return HUB_NAME.fullmatch(name) is not None and not name.lower().endswith(SUFFIXES) and name[0] not in ".~"


def split_files(folder: Path) -> dict[str, Path]:
    """The files of a folder by split: `train`, `valid`, `test`. Raises DataError if none of them is there."""
    found: dict[str, Path] = {}
    for split, names in SPLIT_NAMES.items():
        paths = [folder / f"{name}{suffix}" for name in names for suffix in SUFFIXES]
        try:
            present = [path for path in paths if path.is_file()]
        except OSError as error:
            raise unreadable(folder, error) from None
        if len(present) > 1:
            names_found = " and ".join(path.name for path in present)
            raise DataError(f"has {names_found} for the {split} split", where=folder, hint="keep one of them")
        if present:
            found[split] = present[0]
    if not found:
        raise DataError(
            "has no train, valid or test file", where=folder, hint="name the rows to learn from train.jsonl"
        )
    return found


def read_rows(path: Path) -> list[Row]:
    """All rows of a file. Raises DataError at the first malformed row, saying how many more there are."""
    rows, mistakes = scan_rows(path)
    if mistakes:
        raise first_of(mistakes)
    if not rows:
        raise DataError("has no rows", where=path, hint="write one JSON object a line")
    return rows


def first_of(mistakes: list[DataError]) -> DataError:
    """The first of some rows' mistakes, saying how many more there are."""
    first, more = mistakes[0], len(mistakes) - 1
    such = f" (and {more} more such {'row' if more == 1 else 'rows'})" if more else ""
    return DataError(f"{first.what}{such}", where=first.where, hint=first.hint)


def scan_rows(path: Path) -> tuple[list[Row], list[DataError]]:
    """All rows of a file and all its malformed rows. Raises DataError if the file cannot be read at all."""
    contents = read(path)
    rows: list[Row] = []
    mistakes: list[DataError] = []
    for found in READERS[contents.kind](contents):
        if isinstance(found, DataError):
            mistakes.append(found)
        else:
            rows.append(found)
    return rows, mistakes


def jsonl(values: Iterable[dict[str, Any]]) -> str:
    """Values of rows as the text of a JSONL file, which `read_rows` reads as the same values."""
    return "".join(json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n" for value in values)


def check_target(out: Path, flag: str, *, folder: bool) -> None:
    """Refuses a target for JSONL, or for a folder of it, that exists or whose name says something else.

    `flag` is what the user gave it by. Raises OutputError.
    """
    refuse_existing(out, flag)
    is_jsonl = out.suffix.lower() == ".jsonl"
    if not folder and not is_jsonl:
        raise OutputError("one file of rows is written as JSONL", where=out, hint="let OUT end in .jsonl")
    if folder and is_jsonl:
        raise OutputError("several splits are written as a folder", where=out, hint="let OUT not end in .jsonl")


def _text(contents: Contents) -> str:
    try:
        return contents.data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise DataError("is not UTF-8", where=f"{contents.name}:{line}", hint="save the file as UTF-8") from None


def _jsonl(contents: Contents) -> Found:
    # of bytes, as lines of text also break at characters that JSON strings may hold
    lines = io.BytesIO(contents.data.removeprefix(codecs.BOM_UTF8))
    for number, line in enumerate(lines, start=1):
        if not line.isspace():
            yield _row(contents.name, number, line)


def _row(file: str, number: int, line: bytes) -> Row | DataError:
    where = f"{file}:{number}"
    if len(line) > LONGEST_ROW:
        what = f"is a row of {len(line):,} bytes; the most is {LONGEST_ROW:,}"
        return DataError(what, where=where, hint="write one JSON object a line, and long texts in parts")
    try:
        text = line.decode().rstrip("\r\n")
        value = json_text.loads(text)
    except UnicodeDecodeError:
        return DataError("is not UTF-8", where=where, hint="save the file as UTF-8")
    except (ValueError, RecursionError) as error:
        return DataError(f"not valid JSON: {json_text.reason(error)}", where=where, hint="write one JSON object a line")
    return _object(file, number, value, escaped="\\u" in text)


def _object(file: str, number: int, value: object, *, escaped: bool) -> Row | DataError:
    """A row of a JSON value; `escaped`: its text has escapes, of which two may belong together."""
    where = f"{file}:{number}"
    if not isinstance(value, dict):
        return DataError(f"is a JSON {_json_type(value)}, not an object", where=where, hint='write {"prompt": …}')
    if escaped and json_text.has_half_character(value):
        what = r"has half a character, such as \ud83d without its second half"
        return DataError(what, where=where, hint="cut texts between characters")
    return Row(file, number, value)


def _json_type(value: object) -> str:
    names = {dict: "object", list: "list", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")


def _json(contents: Contents) -> Found:
    text = _text(contents)
    hint = "write a list of objects, or JSONL"
    if not text.strip():
        return
    try:
        value = json_text.loads(text)
    except (ValueError, RecursionError) as error:
        where = f"{contents.name}:{error.lineno}" if isinstance(error, json.JSONDecodeError) else contents.name
        yield DataError(f"not valid JSON: {json_text.reason(error)}", where=where, hint=hint)
        return
    if not isinstance(value, list):
        yield DataError(f"is a JSON {_json_type(value)}, not a list", where=contents.name, hint=hint)
        return
    escaped = "\\u" in text
    for number, item in enumerate(value, start=1):
        yield _object(contents.name, number, item, escaped=escaped)


def _csv(contents: Contents) -> Found:
    file, check = contents.name, "check the quotes"
    csv.field_size_limit(LONGEST_ROW)
    reader = csv.reader(io.StringIO(_text(contents), newline=""), strict=True)
    columns: list[str] | None = None
    start = 1
    try:
        for cells in reader:
            line, start = start, reader.line_num + 1
            where = f"{file}:{line}"
            if not cells:
                continue
            if columns is None:
                columns = cells
                mistake = _bad_header(where, columns)
                if mistake is not None:
                    yield mistake
                    return
            elif len(cells) != len(columns):
                plural = "" if len(cells) == 1 else "s"
                what = f"has {len(cells)} column{plural}, not the {len(columns)} of the header"
                yield DataError(what, where=where, hint=check)
            else:
                yield Row(file, line, dict(zip(columns, cells, strict=True)))
    except csv.Error as error:
        yield DataError(f"not valid CSV: {error}", where=f"{file}:{start}", hint=check)


def _bad_header(where: str, columns: list[str]) -> DataError | None:
    twice = [name for name, count in Counter(columns).items() if count > 1]
    if twice:
        return DataError(f"has the column `{twice[0]}` twice", where=where, hint="rename one of them")
    for sign, name in ((";", "semicolons"), ("\t", "tabs")):
        if len(columns) == 1 and sign in columns[0]:
            return DataError(f"has columns separated by {name}", where=where, hint="separate them by commas")
    return None


def _parquet(contents: Contents) -> Found:
    batches = parquet.read_batches(contents.name, contents.data, contents.limit)
    for found in parquet.rows_of(contents.name, batches, contents.limit):
        yield found if isinstance(found, DataError) else Row(contents.name, *found)


READERS: dict[str, Callable[[Contents], Found]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
}
