"""The share of answers that a regular expression matches as a whole. Knows texts; none can hold it up for long."""

import functools
import warnings
from collections.abc import Callable, Sequence

import regex

from mlxtune.errors import DataError, InputError
from mlxtune.metrics.intervals import mean_share
from mlxtune.report.score import Score

SECONDS = 0.25  # a sound expression takes microseconds


def pattern(answers: Sequence[str], expression: str, groups: Sequence[object] | None = None) -> Score:
    """The share of answers (N,) in [0, 1] that match, with an interval as of `mean_share`; see `matches` for one.

    Raises DataError for no rows, InputError for an expression that is none.
    """
    if not answers:
        raise DataError("there are no rows to score")
    compiled(expression)
    return mean_share("pattern", [matches(expression, answer) for answer in answers], groups=groups)


def matches(expression: str, answer: str) -> bool:
    """Whether `expression` matches all of an answer, white space around it aside.

    Some expressions, `(a|aa)+` for one, take time exponential in the length of some texts that they don't match. What
    is not decided after a quarter of a second, at the second attempt, counts as no match.
    """
    return _decided(compiled(expression).fullmatch, answer.strip())


def occurs(expression: str, text: str) -> bool:
    """Whether `expression` matches anywhere in a text, in bounded time as `matches`."""
    return _decided(compiled(expression).search, text)


@functools.lru_cache(maxsize=256)
def compiled(expression: str, where: str = "evaluate.pattern") -> "regex.Pattern[str]":
    """A regular expression, of the package that can stop in time; Python's own has the same syntax.

    Raises InputError, naming `where`, for one that is none.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of a "[" in brackets, which means what it always did
            return regex.compile(expression)
    except regex.error as error:
        raise InputError(f"{expression!r} is no regular expression: {error}", where=where) from None


def _decided(attempt: Callable[..., object], text: str) -> bool:
    for _ in range(2):  # a machine that stood still for a moment is no reason
        try:
            return attempt(text, timeout=SECONDS) is not None
        except TimeoutError:
            continue
    return False
