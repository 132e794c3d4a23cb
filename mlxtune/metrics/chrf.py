"""chrF: how many runs of up to six characters two texts share. Knows texts."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from mlxtune.errors import DataError
from mlxtune.metrics.intervals import mean_share
from mlxtune.report.score import Score

LONGEST_RUN = 6
BETA = 2  # how many times as much the recall counts as the precision


def chrf(answers: Sequence[str], expected: Sequence[str], groups: Sequence[object] | None = None) -> Score:
    """The mean over rows of `f_measure`, in [0, 1], with a bootstrap interval; answers, expected: (N,) texts.

    A corpus score, which pools the counts of all rows, is another figure. Raises DataError for no rows.
    """
    if not answers:
        raise DataError("there are no rows to score")
    values = [f_measure(given, wanted) for given, wanted in zip(answers, expected, strict=True)]
    return mean_share("chrf", values, groups=groups)


def f_measure(answer: str, expected: str) -> float:
    """(1 + β²)PR / (β²P + R) with β = 2: chrF2 without words, as the package `sacrebleu` scores a sentence.

    P is the share of the answer's runs of n characters, white space aside, that the expected text has too, each as
    often as it has it, and R that of the expected text's; both are means over n = 1 to 6, as far as both texts reach.
    Source: M. Popović, "chrF: character n-gram F-score for automatic MT evaluation", WMT 2015.
    """
    runs = _numbered([_characters(answer), _characters(expected)])
    letters, different = runs, 1 + max((int(each.max()) for each in runs if each.size), default=0)
    precisions, recalls = [], []
    for size in range(1, LONGEST_RUN + 1):
        if size > 1:
            runs = _numbered([run[:-1] * different + some[size - 1 :] for run, some in zip(runs, letters, strict=True)])
        given, wanted = runs
        if not given.size or not wanted.size:
            break
        most = 1 + max(int(given.max()), int(wanted.max()))
        common = int(np.minimum(np.bincount(given, minlength=most), np.bincount(wanted, minlength=most)).sum())
        precisions.append(common / given.size)
        recalls.append(common / wanted.size)
    if not any(precisions):
        return 0.0
    precision, recall = sum(precisions) / len(precisions), sum(recalls) / len(recalls)
    return min(1.0, (1 + BETA**2) * precision * recall / (BETA**2 * precision + recall))


def _characters(text: str) -> npt.NDArray[np.int64]:
    bare = "".join(text.split()).encode("utf-32-le", "surrogatepass")
    return np.frombuffer(bare, dtype="<u4").astype(np.int64)


def _numbered(texts: Sequence[npt.NDArray[np.int64]]) -> list[npt.NDArray[np.int64]]:
    """The values of two arrays as numbers from 0 on, equal where they are equal."""
    first, _ = texts
    _, numbers = np.unique(np.concatenate(texts), return_inverse=True)
    return [numbers[: first.size], numbers[first.size :]]
