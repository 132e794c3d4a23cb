"""The share of rows whose most likely label is the expected one, and of answers outside the labels. Knows labels."""

from collections.abc import Collection, Sequence

from mlxtune.errors import DataError
from mlxtune.metrics.intervals import mean_share
from mlxtune.report.score import Score


def label_accuracy(
    scored: Sequence[str | None], expected: Sequence[str], groups: Sequence[object] | None = None
) -> Score:
    """The share of rows in [0, 1] whose label of the highest probability is the expected one; None is wrong.

    scored, expected: (N,) labels. The interval is Wilson's, or with groups of rows the bootstrap's. Raises DataError
    for no rows.
    """
    if not expected:
        raise DataError("there are no rows to score")
    right = [one == wanted for one, wanted in zip(scored, expected, strict=True)]
    return mean_share("label_accuracy", right, groups=groups)


def outside_labels(
    given: Sequence[str | None], labels: Collection[str], groups: Sequence[object] | None = None
) -> Score:
    """The share of written answers in [0, 1] whose label is none of `labels`, or that have none.

    given: (N,) labels of answers. Interval and errors as for `label_accuracy`.
    """
    if not given:
        raise DataError("there are no rows to score")
    known = set(labels)
    return mean_share("outside_labels", [one not in known for one in given], groups=groups, better="lower")
