"""Files of examples -> rows that know where they come from. Knows JSONL, JSON and CSV, not what a row means."""

import csv
import io
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from mlxtune.errors import DataError

SUFFIXES = (".jsonl", ".json", ".csv")
SPLIT_NAMES = {"train": ("train",), "valid": ("valid", "val", "validation"), "test": ("test",)}


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a file. `line` counts from 1; in a JSON list it is the item's number."""

    file: str
    line: int
    value: dict[str, Any]

    @property
    def where(self) -> str:
        return f"{self.file}:{self.line}"


def resolve(name: str) -> Path:
    """The path that a recipe or flag names; `tickets` is the embedded set. Raises DataError if it does not exist."""
    path = Path(name).expanduser()
    if not path.exists() and name == "tickets":
        return Path(str(resources.files("mlxtune") / "assets" / "tickets.jsonl"))
    if not path.exists():
        raise DataError(
            "no such file or folder", where=name, hint="give a JSONL, JSON or CSV file, or a folder of splits"
        )
    return path


def split_files(folder: Path) -> dict[str, Path]:
    """The files of a folder by split: `train`, `valid`, `test`. Raises DataError if none of them is there."""
    found: dict[str, Path] = {}
    for split, names in SPLIT_NAMES.items():
        paths = [folder / f"{name}{suffix}" for name in names for suffix in SUFFIXES]
        present = [path for path in paths if path.is_file()]
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
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise DataError(f"has the unknown suffix {path.suffix!r}", where=path, hint=f"use {', '.join(SUFFIXES)}")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise DataError("is not UTF-8", where=f"{path}:{line}", hint="save the file as UTF-8") from None
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", where=path) from None
    read = {".jsonl": _jsonl, ".json": _json, ".csv": _csv}[suffix]
    rows: list[Row] = []
    mistakes: list[DataError] = []
    for found in read(str(path), text):
        (mistakes if isinstance(found, DataError) else rows).append(found)  # type: ignore[arg-type]
    return rows, mistakes


def _jsonl(file: str, text: str) -> Iterator[Row | DataError]:
    # not splitlines(): it also breaks at characters that JSON strings may hold
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield _row(file, number, line)


def _row(file: str, number: int, line: str) -> Row | DataError:
    where = f"{file}:{number}"
    try:
        value = json.loads(line, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        at = f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        reason = error.msg.removesuffix(" at") if isinstance(error, json.JSONDecodeError) else str(error)
        return DataError(f"not valid JSON: {reason}{at}", where=where, hint="write one JSON object a line")
    return _object(file, number, value, line)


def _object(file: str, number: int, value: object, source: str) -> Row | DataError:
    where = f"{file}:{number}"
    if not isinstance(value, dict):
        return DataError(f"is a JSON {_json_type(value)}, not an object", where=where, hint='write {"prompt": …}')
    if "\\u" in source:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            what = r"has half a character, such as \ud83d without its second half"
            return DataError(what, where=where, hint="cut texts between characters")
    return Row(file, number, value)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _json_type(value: object) -> str:
    names = {dict: "object", list: "list", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")


def _json(file: str, text: str) -> Iterator[Row | DataError]:
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        line = error.lineno if isinstance(error, json.JSONDecodeError) else 1
        yield DataError(f"not valid JSON: {error}", where=f"{file}:{line}", hint="write a list of objects, or JSONL")
        return
    if not isinstance(value, list):
        yield DataError(
            f"is a JSON {_json_type(value)}, not a list", where=file, hint="write a list of objects, or JSONL"
        )
        return
    for number, item in enumerate(value, start=1):
        yield _object(file, number, item, text)


def _csv(file: str, text: str) -> Iterator[Row | DataError]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    start = 1
    try:
        if not reader.fieldnames:
            return
        twice = [name for name, count in Counter(reader.fieldnames).items() if count > 1]
        if twice:
            yield DataError(f"has the column `{twice[0]}` twice", where=f"{file}:1", hint="rename one of them")
            return
        start = reader.line_num + 1
        for value in reader:
            if None in value or None in value.values():
                count = len(reader.fieldnames)
                yield DataError(f"does not have {count} columns", where=f"{file}:{start}", hint="check the quotes")
            else:
                yield Row(file, start, value)
            start = reader.line_num + 1
    except csv.Error as error:
        yield DataError(f"not valid CSV: {error}", where=f"{file}:{start}", hint="check the quotes")
