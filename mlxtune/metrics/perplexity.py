"""The exponential of the loss: among how many equally likely tokens the model seems to choose."""

import math
import sys
from collections.abc import Sequence
from dataclasses import replace

from mlxtune.metrics.loss import loss
from mlxtune.report.score import Score

LARGEST_EXPONENT = math.log(sys.float_info.max)


def perplexity(row_nats: Sequence[float], row_tokens: Sequence[int], groups: Sequence[object] | None = None) -> Score:
    """`exp(loss)` and its interval; arguments and errors as for `loss`.

    The exponential is monotone, so the ends of the loss's interval carry over. A loss whose exponential
    no float can hold (above some 709 nats per token) gives the largest float, which JSON can write.
    """
    nats = loss(row_nats, row_tokens, groups)
    return replace(
        nats,
        metric="perplexity",
        unit="",
        value=_exp(nats.value),
        ci_low=_exp(nats.ci_low),
        ci_high=_exp(nats.ci_high),
    )


def _exp(nats: float) -> float:
    return math.exp(min(nats, LARGEST_EXPONENT))
