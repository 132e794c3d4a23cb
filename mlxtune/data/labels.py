"""The label that an answer gives, where answers give one. Knows answers as texts, not what a label means.

Answers are hostile: an expression that takes too long on one finds no label in it.
"""

import functools
import re
from collections.abc import Sequence

import regex

from mlxtune.data import matching
from mlxtune.errors import InputError

MOST_ANSWERS = 200
LARGEST_SHARE = 0.1
_SPELLING = re.compile(r"[\s_,;:!?'\"/]+|\.(?!\d)|-(?!\d)|(?<=\w)-")


def label_in(answer: str | None, pattern: str) -> str | None:
    """The first group of the regular expression `pattern` in an answer, or None, also where it takes too long.

    Raises InputError for a bad one.
    """
    found = matching.decided(_compiled(pattern).search, answer or "")
    return found.group(1) if found else None


def label_span(answer: str, pattern: str | None) -> tuple[int, int] | None:
    """Where the label of a labelled answer stands: `answer[start:end]`, or None where the pattern finds none.

    Without a pattern it is the first line; white space around an answer of one line belongs to its spelling.
    """
    if pattern is not None:
        found = matching.decided(_compiled(pattern).search, answer)
        return found.span(1) if found and found.group(1) is not None else None
    start = len(answer) - len(answer.lstrip())
    first, *more = answer[start:].rstrip().split("\n")
    return (start, start + len(first.rstrip())) if more else (0, len(answer))


def find_labels(answers: Sequence[str | None], pattern: str | None) -> list[str | None] | None:
    """The label of each answer, or None where the answers give no labels. Raises InputError for a bad `pattern`.

    With a `pattern` by its first group. Without one, answers are labels if at most 200 different ones, fewer than a
    tenth of the rows, make up the whole set; the label is then an answer's first line.
    """
    if pattern is not None:
        _compiled(pattern)
        labels = [label_in(answer, pattern) for answer in answers]
        return labels if any(labels) else None
    texts = [answer.strip() for answer in answers if answer is not None]
    different = len(set(texts))
    if len(texts) < len(answers) or not 2 <= different <= MOST_ANSWERS or different >= LARGEST_SHARE * len(texts):
        return None
    lines: list[str | None] = [text.split("\n")[0].strip() for text in texts]
    return lines if len(set(lines)) > 1 else None


@functools.lru_cache(maxsize=4096)
def plain(label: str) -> str:
    """A label without its spelling: case, spacing, punctuation. Two labels with the same are one, written twice.

    What tells labels apart stays: a minus or point of a number, the signs of `C++` and `C#`, labels without a letter.
    """
    kept = _SPELLING.sub("", label).casefold()
    return kept if any(character.isalpha() for character in kept) else label.strip()


def _compiled(pattern: str) -> "regex.Pattern[str]":
    try:
        compiled = matching.compiled(pattern)
    except regex.error as error:
        raise InputError(f"is no regular expression: {error}", where=f"label {pattern!r}") from None
    if compiled.groups < 1:
        raise InputError("has no group in parentheses", where=f"label {pattern!r}", hint=r"e.g. '^(\w+)'")
    return compiled
