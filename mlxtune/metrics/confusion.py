"""How often each label was given for each expected one. Knows labels."""

from collections.abc import Sequence
from dataclasses import dataclass

from mlxtune.errors import DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class Confusion:
    """`counts` (K, K + 1): rows with the expected label of the line and the given one of the column.

    `labels` (K,) name lines and columns; the last column counts answers that give none of them.
    """

    labels: list[str]
    counts: list[list[int]]


def confusion(given: Sequence[str | None], expected: Sequence[str], labels: Sequence[str] | None = None) -> Confusion:
    """The table of `labels`, or of those expected, sorted; given, expected: (N,).

    Raises DataError for no rows, or an expected label that is not one of `labels`.
    """
    if not expected:
        raise DataError("there are no rows to score")
    names = sorted(set(expected)) if labels is None else list(dict.fromkeys(labels))
    place: dict[str | None, int] = {label: i for i, label in enumerate(names)}
    counts = [[0] * (len(names) + 1) for _ in names]
    for one, wanted in zip(given, expected, strict=True):
        if wanted not in place:
            raise DataError(f"the expected label {wanted!r} is not among the labels", where="evaluate.labels")
        counts[place[wanted]][place.get(one, len(names))] += 1
    return Confusion(labels=names, counts=counts)
