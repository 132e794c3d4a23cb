"""The tree of errors: its docstring is what the code does, and each error is one line."""

import builtins
import re
import signal
from pathlib import Path

import pytest

from mlxtune import errors
from mlxtune.errors import DataError, Interrupted, MlxtuneError

DRAWN = re.compile(r"^(?P<branch>[│├└─ ]*)(?P<name>\w+) +(?P<code>\d+) ", re.MULTILINE)


def drawn() -> dict[str, tuple[str | None, int]]:
    """Name -> (parent, exit code), as the module's docstring draws them."""
    tree: dict[str, tuple[str | None, int]] = {}
    path: list[str] = []
    for match in DRAWN.finditer(errors.__doc__ or ""):
        depth = len(match["branch"]) // 4
        path[depth:] = [match["name"]]
        tree[match["name"]] = (path[depth - 1] if depth else None, int(match["code"]))
    return tree


def test_the_docstring_draws_every_error() -> None:
    defined = {
        name for name, value in vars(errors).items() if isinstance(value, type) and value.__module__ == errors.__name__
    }
    assert set(drawn()) == defined


@pytest.mark.parametrize(("name", "parent", "code"), [(name, *rest) for name, rest in drawn().items()])
def test_parents_and_exit_codes(name: str, parent: str | None, code: int) -> None:
    kind = getattr(errors, name)
    assert kind.__base__ is (getattr(errors, parent) if parent else builtins.Exception)
    error = kind("x", signal_number=signal.SIGINT) if kind is Interrupted else kind("x")
    assert error.exit_code == code


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_an_interruption_exits_as_shells_expect(number: int, code: int) -> None:
    error = Interrupted("stopped at step 40", signal_number=number, hint="run again to go on")
    assert error.exit_code == code
    assert str(error) == "stopped at step 40; run again to go on"
    assert Interrupted.exit_code == 1


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (MlxtuneError("failed"), "failed"),
        (DataError("is empty", where="a.jsonl:17"), "a.jsonl:17: is empty"),
        (DataError("is empty", where=Path("a") / "b.jsonl"), "a/b.jsonl: is empty"),
        (DataError("is empty", hint="fill it in"), "is empty; fill it in"),
        (DataError("is empty", where="a.jsonl:17", hint="fill it in"), "a.jsonl:17: is empty; fill it in"),
        (DataError("has a\n\tlong   text\r\n", where="a\nb"), "a b: has a long text"),
    ],
)
def test_one_line(error: MlxtuneError, line: str) -> None:
    assert str(error) == line


def test_the_parts_stay_apart() -> None:
    error = DataError("is empty", where=Path("a.jsonl"), hint="fill it in")
    assert (error.what, error.where, error.hint) == ("is empty", "a.jsonl", "fill it in")
    assert MlxtuneError("failed").where is None
