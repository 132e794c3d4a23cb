"""The mean negative log-likelihood of the supervised tokens. Knows sums per row, not the model they come from."""

import math
from collections.abc import Sequence

from mlxtune.errors import DataError, ModelError
from mlxtune.metrics.intervals import bootstrap
from mlxtune.report.score import Score


def loss(row_nats: Sequence[float], row_tokens: Sequence[int], groups: Sequence[object] | None = None) -> Score:
    """Nats per supervised token: `sum(row_nats) / sum(row_tokens)`, with a bootstrap interval over rows (groups).

    row_nats: summed negative log-likelihood of each row's supervised tokens, (N,); row_tokens: their number, (N,).
    Raises DataError for no rows or a row without supervised tokens, ModelError for a row whose nats are not finite.
    """
    if len(row_nats) == 0:
        raise DataError("there are no rows to score")
    for number, (nats, tokens) in enumerate(zip(row_nats, row_tokens, strict=True), start=1):
        if tokens < 1:
            raise DataError(f"row {number} of the scored rows has no token to score")
        if not math.isfinite(nats):
            raise ModelError(
                f"the loss of row {number} of the scored rows is {nats}",
                hint="the weights or their precision are broken",
            )
    low, high = bootstrap(
        [nats / tokens for nats, tokens in zip(row_nats, row_tokens, strict=True)], row_tokens, groups
    )
    return Score(
        metric="loss",
        value=float(sum(row_nats) / sum(row_tokens)),
        unit="nats per token",
        ci_low=max(0.0, low),
        ci_high=high,
        n=len(row_nats),
        better="lower",
    )
