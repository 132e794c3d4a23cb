"""The share of answers with the right label. Knows texts and the pattern that finds a label in them."""

from collections.abc import Sequence

from mlxtune.data.labels import label_in
from mlxtune.errors import DataError
from mlxtune.metrics.intervals import mean_share
from mlxtune.report.score import Score


def accuracy(
    answers: Sequence[str], expected: Sequence[str], label_pattern: str, groups: Sequence[object] | None = None
) -> Score:
    """The share of rows in [0, 1] whose answer has the expected answer's label; an answer without one is wrong.

    answers, expected: (N,) texts; label_pattern: a regular expression with a group. The interval is Wilson's,
    or with groups of rows the bootstrap's.
    Raises DataError for no rows, and for an expected answer without a label.
    """
    if not answers:
        raise DataError("there are no rows to score")
    right = []
    for given, wanted in zip(answers, expected, strict=True):
        label = label_in(wanted, label_pattern)
        if label is None:
            raise DataError(
                f"the pattern {label_pattern!r} finds no label in the expected answer {wanted!r}",
                where="evaluate.label",
                hint="change the pattern or that row's answer",
            )
        right.append(label_in(given, label_pattern) == label)
    return mean_share("accuracy", right, groups=groups)
