"""Figures as a file states them and as they are found again: what differs, what is not told. Knows values, not runs."""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mlxtune.errors import InputError
from mlxtune.rundir import RunDir

SAME = 1e-9  # relative; a row's loss was divided by its tokens and is multiplied again
SAME_MODEL = 1e-4  # relative, or absolute below 1: of figures that the models give again
LONGEST = 60  # characters of a value that is shown


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """A figure that is not what the folder says: `stated` in the file, `found` by computing it again."""

    file: str
    key: str
    stated: str
    found: str


@dataclass(slots=True, kw_only=True)
class Verified:
    """How many figures, files and predictions were compared, what differs, and what could not be computed again."""

    figures: int = 0
    files: int = 0
    predictions: int = 0
    differences: list[Difference] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def differs(self, file: str, key: str, stated: Any, found: Any) -> None:
        self.differences.append(Difference(file=file, key=key, stated=_short(stated), found=_short(found)))

    def hold(self, file: str, key: str, stated: Any, found: Any, tolerance: float = SAME) -> None:
        """Holds a number or a text against what is found."""
        self.figures += 1
        if not same(stated, found, tolerance):
            self.differs(file, key, stated, found)

    def compare(self, file: str, stated: Any, found: Any, key: str = "", tolerance: float = SAME) -> None:
        """Holds each number and text of two values against each other."""
        before, after = dict(leaves(stated, key)), dict(leaves(found, key))
        for name in [*before, *(name for name in after if name not in before)]:
            self.hold(file, name, before.get(name, MISSING), after.get(name, MISSING), tolerance)

    @contextlib.contextmanager
    def reading(self, run: RunDir, file: Path) -> Iterator[None]:
        """Inside, what cannot be read or computed is a difference of the file that the error names, else of `file`."""
        try:
            yield
        except InputError as error:  # a file that was altered may not even be readable
            named = Path(error.where or "")
            at = named if named.is_relative_to(run.root) else file
            name = at.relative_to(run.root).as_posix()
            what = error.what if at is named or error.where is None else f"{error.where}: {error.what}"
            found = Difference(file=name, key="content", stated="readable", found=_short(what))
            if found not in self.differences:
                self.differences.append(found)


class _Missing:
    """A value that is not there."""

    def __repr__(self) -> str:
        return "nothing"


MISSING = _Missing()


def leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every number, text, switch and null of a JSON value with its place, such as `fused[2].value`."""
    if isinstance(value, dict):
        for name, each in value.items():
            yield from leaves(each, f"{key}.{name}" if key else str(name))
        if not value:
            yield key, "{}"
    elif isinstance(value, list):
        for at, each in enumerate(value):
            named = isinstance(each, dict) and isinstance(each.get("metric"), str) and "better" in each
            yield from leaves(each, f"{key}.{each['metric']}" if named else f"{key}[{at}]")
        if not value:
            yield key, "[]"
    else:
        yield key, value


def same(first: Any, second: Any, tolerance: float) -> bool:
    """Whether two numbers are as near as `tolerance`, or two other values equal."""
    if all(isinstance(each, int | float) and not isinstance(each, bool) for each in (first, second)):
        floor = tolerance if tolerance > SAME else 1e-12
        return math.isclose(first, second, rel_tol=tolerance, abs_tol=floor)
    return type(first) is type(second) and bool(first == second)


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"
