"""The share of answers that are the expected text. Knows texts, not who wrote them."""

from collections.abc import Sequence

from mlxtune.errors import DataError
from mlxtune.metrics.intervals import share
from mlxtune.report.score import Score


def is_exact(answer: str, expected: str) -> bool:
    """Whether an answer is the expected text, surrounding white space aside."""
    return answer.strip() == expected.strip()


def exact_match(answers: Sequence[str], expected: Sequence[str]) -> Score:
    """The share of rows in [0, 1] whose answer is the expected text, surrounding white space aside.

    answers, expected: (N,) texts. The interval is Wilson's. Raises DataError for no rows.
    """
    if not answers:
        raise DataError("there are no rows to score")
    right = sum(is_exact(given, wanted) for given, wanted in zip(answers, expected, strict=True))
    return share("exact_match", right, len(answers))
