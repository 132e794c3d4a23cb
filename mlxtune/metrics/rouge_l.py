"""ROUGE-L: how much of two texts is the same words in the same order. Knows texts."""

import re
from collections.abc import Sequence

from rapidfuzz.distance import LCSseq

from mlxtune.errors import DataError
from mlxtune.metrics.intervals import mean_share
from mlxtune.report.score import Score

_WORD = re.compile(r"[^\W_]+")


def rouge_l(answers: Sequence[str], expected: Sequence[str], groups: Sequence[object] | None = None) -> Score:
    """The mean over rows of `f_measure`, in [0, 1], with a bootstrap interval; answers, expected: (N,) texts.

    Raises DataError for no rows.
    """
    if not answers:
        raise DataError("there are no rows to score")
    values = [f_measure(given, wanted) for given, wanted in zip(answers, expected, strict=True)]
    return mean_share("rouge_l", values, groups=groups)


def f_measure(answer: str, expected: str) -> float:
    """2PR / (P + R), where the longest common subsequence of words is the share P of the answer, R of the expected.

    Words are runs of letters and digits in lower case, unstemmed; a text without words scores 0. In ASCII this is
    what the package `rouge-score` gives; that drops all other letters, which here are letters.
    Source: C.-Y. Lin, "ROUGE: a package for automatic evaluation of summaries", ACL workshop 2004, section 3.1.
    """
    given, wanted = _WORD.findall(answer.lower()), _WORD.findall(expected.lower())
    common = LCSseq.similarity(given, wanted)
    if not common:
        return 0.0
    precision, recall = common / len(given), common / len(wanted)
    return 2 * precision * recall / (precision + recall)
