"""What a comparison's figures are summed from beside predictions, as lines of JSON. Knows names and shapes of lines.

They lie in a folder within the comparison's: of the anchor how likely each window is, of multiple-choice questions
what is chosen, of judged pairs both verdicts, of an earlier run its predictions of the rows it shares, and of a
learning curve the predictions at each size. No text of the anchor or of a question is in them.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mlxtune.errors import InputError
from mlxtune.report import reading, shapes
from mlxtune.rundir import write_text

FORGETTING, CHOICES, JUDGED, SINCE = "forgetting", "choices", "judged", "since"
SHAPES: dict[str, dict[str, Any]] = {FORGETTING: shapes.WINDOW, CHOICES: shapes.CHOSEN, JUDGED: shapes.JUDGED_PAIR}


def folder(compare: Path) -> Path:
    return compare / "evidence"


def file(compare: Path, name: str) -> Path:
    """The lines of one kind, within the folder of a comparison."""
    return folder(compare) / f"{name}.jsonl"


def curve(compare: Path) -> Path:
    """The folder of a learning curve's predictions."""
    return folder(compare) / "curve"


def curve_name(percent: float) -> str:
    """The file of the predictions after training on so many per cents of the rows."""
    short = f"{percent:g}"
    return f"{short if float(short) == percent else repr(percent)}.jsonl"


def curve_files(compare: Path) -> dict[float, Path]:
    """The files of a learning curve by their per cents, in order."""
    found = {}
    for path in curve(compare).glob("*.jsonl"):
        try:
            percent = float(path.stem)
        except ValueError:
            continue
        if 0 < percent <= 100:
            found[percent] = path
    return dict(sorted(found.items()))


def write(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Writes a whole file or nothing. Raises StorageError."""
    write_text(path, "".join(json.dumps(each, ensure_ascii=False, allow_nan=False) + "\n" for each in lines))


def read(compare: Path, name: str) -> list[dict[str, Any]] | None:
    """The lines of one kind; None where there is no file. Raises InputError for a line of another shape, or for none.

    Not for predictions, which `evaluation/predictions` reads.
    """
    path = file(compare, name)
    if not path.exists():
        return None
    found = reading.lines_of(path, SHAPES[name])
    if not found:
        raise InputError("is empty", where=path, hint=reading.HINT)
    return found
