"""The share of expected tokens that rank first, each after the true ones before it. Knows counts of rows."""

from collections.abc import Sequence

from mlxtune.errors import DataError
from mlxtune.metrics.intervals import mean_share
from mlxtune.report.score import Score


def token_accuracy(
    row_right: Sequence[int], row_tokens: Sequence[int], groups: Sequence[object] | None = None
) -> Score:
    """`sum(row_right) / sum(row_tokens)` in [0, 1], with a bootstrap interval over rows.

    row_right: supervised tokens of each row to which the model gave the highest probability, (N,); row_tokens: all of
    them, (N,). Raises DataError for no rows, a row without tokens, or with more of them right than there are.
    """
    if len(row_tokens) == 0:
        raise DataError("there are no rows to score")
    for number, (right, tokens) in enumerate(zip(row_right, row_tokens, strict=True), start=1):
        if tokens < 1:
            raise DataError(f"row {number} of the scored rows has no token to score")
        if not 0 <= right <= tokens:
            raise DataError(f"row {number} of the scored rows has {right} of {tokens} tokens right")
    shares = [right / tokens for right, tokens in zip(row_right, row_tokens, strict=True)]
    return mean_share("token_accuracy", shares, row_tokens, groups)
