"""Regular expressions on texts that nobody has read: none can hold them up for long. Knows texts."""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import regex

SECONDS = 0.25  # a sound expression takes microseconds


@functools.lru_cache(maxsize=256)
def compiled(expression: str) -> "regex.Pattern[str]":
    """A regular expression, of the package that can stop in time; it has the syntax of Python's own.

    One difference is welcome: a mark that belongs to a letter, as vowels do in Hindi, is part of a word too.
    Raises regex.error for one that is none.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of a "[" in brackets, which means what it always did
        return regex.compile(expression)


def decided(attempt: Callable[..., Any], text: str) -> Any:
    """What a method of a compiled expression, such as `search`, finds in a text, or None.

    Some expressions, `(a|aa)+` for one, take time exponential in the length of some texts that they don't match. What
    is not decided after a quarter of a second, at the second attempt, counts as not found.
    """
    for _ in range(2):  # a machine that stood still for a moment is no reason
        try:
            return attempt(text, timeout=SECONDS)
        except TimeoutError:
            continue
    return None
