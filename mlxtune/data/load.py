"""The data of a recipe -> rows and examples by split. Knows files, formats and the split, not tokens."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlxtune.data.files import SPLIT_NAMES, Row, first_of, jsonl, read_rows, resolve, split_files
from mlxtune.data.formats import Example, kept, reader, to_value
from mlxtune.data.split import split
from mlxtune.errors import DataError, RecipeError
from mlxtune.recipe import DataRecipe
from mlxtune.rundir import RunDir

Rows = list[tuple[Row, Example]]


def files_of(data: DataRecipe) -> dict[str, Path]:
    """The files that a recipe names, by split; one file of everything has the key `all`."""
    if data.path is None:
        raise RecipeError("is not set", where="data.path", hint="give --data FILE, or data.path in the recipe")
    path = resolve(data.path)
    return split_files(path) if path.is_dir() else {"all": path}


def read_examples(path: Path, data: DataRecipe) -> Rows:
    """The rows of a file that `data.keep` keeps. Raises DataError if none is left.

    The rows in a run's own `data/` have been kept and filled in before, so they are taken as they are.
    """
    run = RunDir(path.absolute().parent.parent)
    if path.absolute().parent == run.data and run.recipe.is_file():
        data = DataRecipe()
    return as_examples(read_rows(path), data)


def as_examples(rows: Sequence[Row], data: DataRecipe) -> Rows:
    """Those of a file's rows that `data.keep` keeps, each with its example.

    Raises DataError for the first malformed row, saying how many more there are, and if no row is left.
    """
    examples, mistakes = scan_examples(rows, data)
    if mistakes:
        raise first_of(mistakes)
    if not examples:
        where = rows[0].file if rows else data.path
        raise DataError("has no row that data.keep keeps", where=where, hint="check its columns and values")
    return examples


def scan_examples(rows: Sequence[Row], data: DataRecipe) -> tuple[Rows, list[DataError]]:
    """Those of a file's rows that `data.keep` keeps, each with its example, and all its malformed rows."""
    wanted: list[Row] = []
    examples: Rows = []
    mistakes: list[DataError] = []
    for row in rows:
        try:
            if kept(row, data):
                wanted.append(row)
        except DataError as error:
            mistakes.append(error)
    read = reader(wanted, data)
    for row in wanted:
        try:
            examples.append((row, read(row)))
        except DataError as error:
            mistakes.append(error)
    return examples, mistakes


def load_splits(data: DataRecipe, seed: int, label: str | None) -> dict[str, Rows]:
    """Rows by split: train, valid, test. What a folder has no file for is split off its train file.

    Raises DataError, or RecipeError when `data.path` is not set.
    """
    found = {name: read_examples(path, data) for name, path in files_of(data).items()}
    whole = found.pop("all", None) or found.pop("train", None)
    if whole is None:
        raise DataError("has no train file", where=data.path, hint="name the rows to learn from train.jsonl")
    wanted = replace(data, valid=0.0 if "valid" in found else data.valid, test=0.0 if "test" in found else data.test)
    parts = split(whole, wanted, seed, label) if wanted.valid or wanted.test else {"train": whole}
    return {name: found.get(name) or parts.get(name, []) for name in SPLIT_NAMES}


def write_rows(path: Path, rows: Rows, group_by: str | None = None) -> None:
    """Writes canonical rows as JSONL, each with its column `group_by`: use it inside `rundir.staged`."""
    path.write_text(jsonl({**group_of(row, group_by), **to_value(example)} for row, example in rows), encoding="utf-8")


def group_of(row: Row, group_by: str | None) -> dict[str, Any]:
    """The column of a row that says which rows belong together; empty where it has none."""
    return {group_by: row.value[group_by]} if group_by is not None and group_by in row.value else {}


def read_split(folder: Path, name: str) -> Rows:
    """The rows of one split of a run's `data/`; an empty split has an empty file."""
    path = folder / f"{name}.jsonl"
    if path.is_file() and path.stat().st_size == 0:
        return []
    return read_examples(path, DataRecipe())


def anchor_text(name: str) -> str:
    """The text of a file that must not be forgotten. Raises DataError."""
    try:
        text = Path(name).expanduser().read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise DataError("is not UTF-8", where=name, hint="save the text as UTF-8") from None
    except (OSError, RuntimeError) as error:  # RuntimeError: `~` and a user whom this machine does not know
        what = f"cannot be read: {getattr(error, 'strerror', error)}"
        raise DataError(what, where=name, hint="give a text file") from None
    if not text.strip():
        raise DataError("has no text", where=name, hint="give some pages of what the model must not forget")
    return text
