"""The share of answers that are JSON. Knows texts."""

from collections.abc import Sequence

from mlxtune.data import json_text
from mlxtune.errors import DataError
from mlxtune.metrics.intervals import mean_share
from mlxtune.report.score import Score


def is_json(answer: str) -> bool:
    """Whether the whole answer is one JSON value as RFC 8259 has it: no fence around it, no NaN, no key twice."""
    try:
        json_text.loads(answer.strip())
    except (ValueError, RecursionError):
        return False
    return True


def json_valid(answers: Sequence[str], groups: Sequence[object] | None = None) -> Score:
    """The share of answers (N,) that are JSON, in [0, 1], with an interval as of `mean_share`.

    Raises DataError for no rows.
    """
    if not answers:
        raise DataError("there are no rows to score")
    return mean_share("json_valid", list(map(is_json, answers)), groups=groups)
