"""The share of answers that are the expected text. Knows texts, not who wrote them."""

import unicodedata
from collections.abc import Sequence

from mlxtune.errors import DataError
from mlxtune.metrics.intervals import mean_share
from mlxtune.report.score import Score

ENDS = " .!?,;:…。"  # full-width forms are folded into these


def is_exact(answer: str, expected: str) -> bool:
    """Whether an answer is the expected text, surrounding white space aside."""
    return answer.strip() == expected.strip()


def exact_match(answers: Sequence[str], expected: Sequence[str], groups: Sequence[object] | None = None) -> Score:
    """The share of rows in [0, 1] whose answer is the expected text, surrounding white space aside.

    answers, expected: (N,) texts. The interval is Wilson's, or with groups of rows the bootstrap's. Raises DataError
    for no rows.
    """
    if not answers:
        raise DataError("there are no rows to score")
    right = [is_exact(given, wanted) for given, wanted in zip(answers, expected, strict=True)]
    return mean_share("exact_match", right, groups=groups)


def normalized(text: str) -> str:
    """A text without what rarely matters: Unicode's compatible forms and case are folded, runs of white space are one
    space, and punctuation that ends the text is gone.
    """
    folded = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return folded.rstrip(ENDS) or folded


def exact_match_normalized(
    answers: Sequence[str], expected: Sequence[str], groups: Sequence[object] | None = None
) -> Score:
    """As `exact_match`, of `normalized` texts."""
    if not answers:
        raise DataError("there are no rows to score")
    right = [normalized(given) == normalized(wanted) for given, wanted in zip(answers, expected, strict=True)]
    return mean_share("exact_match_normalized", right, groups=groups)
