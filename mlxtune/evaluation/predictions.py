"""What a model made of every row, as lines of JSON: written whole or not at all, read back with care.

Knows the fields of a line, not what is computed from them.
"""

import json
import sys
import typing
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from mlxtune.errors import DataError, InputError
from mlxtune.rundir import write_text

LARGEST = 2**63  # of whole numbers: no count is larger, and no array holds them


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """One row: what was asked, expected and answered. None is what was not asked, not scored or not known.

    `loss` is in nats per supervised token of the expected answer, of `tokens` such tokens, `tokens_right` of which
    the model ranks first. `exact`: the answer is the expected one; `right`: its `label` is `label_expected`, where
    labels are compared. `label_scored` is the label that the model finds likeliest of all, with its
    `label_probability` among them. Rows of one `group` are not independent of each other.
    """

    where: str
    prompt: str
    expected: str | None
    answer: str | None
    loss: float | None
    tokens: int
    exact: bool | None
    right: bool | None
    label: str | None = None
    label_expected: str | None = None
    label_scored: str | None = None
    label_probability: float | None = None
    prompt_tokens: int | None = None
    answer_tokens: int | None = None
    tokens_right: int | None = None
    group: str | None = None


def to_lines(predictions: Iterable[Prediction]) -> str:
    """The predictions as JSONL."""
    return "".join(json.dumps(asdict(each), ensure_ascii=False, allow_nan=False) + "\n" for each in predictions)


def write(path: Path, predictions: Iterable[Prediction]) -> None:
    """Writes a whole file or nothing. Raises StorageError."""
    write_text(path, to_lines(predictions))


def read(path: Path) -> list[Prediction]:
    """The predictions of a file. Raises DataError with the line that is none, InputError for an unreadable file."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError:
        raise DataError("is not UTF-8", where=path, hint="evaluate again") from None
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror or error}", where=path) from None
    return [_prediction(line, f"{path}:{number}") for number, line in enumerate(lines, start=1) if line]


def _prediction(line: str, where: str) -> Prediction:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise DataError("is no JSON object", where=where, hint="evaluate again")
    known = {each.name: each for each in fields(Prediction)}
    for name, each in known.items():
        kinds = typing.get_args(each.type) or (each.type,)
        if not any(_fits(value.get(name), kind) for kind in kinds):
            wanted = " or ".join(kind.__name__.removesuffix("Type") for kind in kinds)
            raise DataError(f"`{name}` is not {wanted}", where=where, hint="evaluate again")
    found: dict[str, Any] = {name: value.get(name) for name in known}
    return Prediction(**found)


def _fits(value: Any, kind: Any) -> bool:
    """Whether a JSON value is of a type; a whole number is a float too, a truth value no number."""
    if kind is float:
        return isinstance(value, float | int) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    return type(value) is kind and (kind is not int or abs(value) < LARGEST)


def groups_of(predictions: Sequence[Prediction]) -> list[str] | None:
    """The group of each row: the one that it names, else its place in the data; None where every row is alone."""
    groups = [each.where if each.group is None else each.group for each in predictions]
    return groups if len(set(groups)) < len(groups) else None
