"""The label that an answer gives, where answers give one. Knows answers as texts, not what a label means."""

import re
from collections.abc import Sequence

from mlxtune.errors import InputError

MOST_ANSWERS = 50
LARGEST_SHARE = 0.1


def label_in(answer: str | None, pattern: str) -> str | None:
    """The first group of the regular expression `pattern` in an answer, or None. Raises InputError for a bad one."""
    found = _compiled(pattern).search(answer or "")
    return found.group(1) if found else None


def find_labels(answers: Sequence[str | None], pattern: str | None) -> list[str | None] | None:
    """The label of each answer, or None where the answers give no labels. Raises InputError for a bad `pattern`.

    With a `pattern` by its first group. Without one, answers are labels if at most 50 different ones, fewer than a
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


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise InputError(f"is no regular expression: {error}", where=f"label {pattern!r}") from None
    if compiled.groups < 1:
        raise InputError("has no group in parentheses", where=f"label {pattern!r}", hint=r"e.g. '^(\w+)'")
    return compiled
