"""The share of answers that a regular expression matches as a whole. Knows texts; none can hold it up for long."""

from collections.abc import Sequence

import regex

from mlxtune.data import matching
from mlxtune.errors import DataError, InputError
from mlxtune.metrics.intervals import mean_share
from mlxtune.report.score import Score


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

    What takes too long counts as no match, see `matching.decided`.
    """
    return matching.decided(compiled(expression).fullmatch, answer.strip()) is not None


def occurs(expression: str, text: str) -> bool:
    """Whether `expression` matches anywhere in a text, in bounded time as `matches`."""
    return matching.decided(compiled(expression).search, text) is not None


def compiled(expression: str, where: str = "evaluate.pattern") -> "regex.Pattern[str]":
    """A regular expression. Raises InputError, naming `where`, for one that is none."""
    try:
        return matching.compiled(expression)
    except regex.error as error:
        raise InputError(f"{expression!r} is no regular expression: {error}", where=where) from None
