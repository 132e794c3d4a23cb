"""How much of what an adapter learned a fused model does: they answer the same rows, one after the other in memory.

Knows networks and samples, not how the fused model was made. What the adapter predicts is put into a file meanwhile.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxtune.data.batches import in_order, make_batch
from mlxtune.data.render import Sample
from mlxtune.head import find, gathered
from mlxtune.likelihood import LOGITS_BYTES, wanted_at
from mlxtune.metrics.divergence import compared

FILE_BYTES = 2_000_000_000  # of predictions at most; fewer of the rows are compared where all would take more
BATCH = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Survival:
    """Over `tokens` supervised tokens: the mean KL(adapter ‖ fused) in nats, and the share with the same top token."""

    tokens: int
    kl: float
    same_top: float


def kept_share(base: float | None, adapter: float | None, fused: float | None) -> float | None:
    """(base - fused) / (base - adapter): the share of the adapter's gain in loss that the fused model has."""
    if base is None or adapter is None or fused is None or adapter >= base:
        return None
    return (base - fused) / (base - adapter)


def compared_rows(samples: Sequence[Sample], vocabulary: int) -> list[Sample]:
    """Rows, evenly from `samples`, whose predictions fit into the file."""
    tokens = sum(sample.trained_count for sample in samples)
    step = max(1, -(-4 * tokens * vocabulary // FILE_BYTES))
    return list(samples[::step])


def remember(net: nn.Module, samples: Sequence[Sample], file: IO[bytes]) -> None:
    """Writes to `file` what `net` predicts at each supervised token: log-probabilities (V,) in float32, one by one."""
    for part in _predictions(net, samples):
        file.write(np.array(part).tobytes())
    file.flush()


def compare(net: nn.Module, samples: Sequence[Sample], file: IO[bytes]) -> Survival:
    """How far `net` is from what `remember` wrote of the same samples."""
    file.seek(0)
    tokens, kl, same = 0, 0.0, 0
    for log_q in _predictions(net, samples):
        log_p = mx.array(np.frombuffer(file.read(log_q.nbytes), dtype=np.float32).reshape(log_q.shape))
        numbers = compared(log_p, log_q, mx.zeros(len(log_q), dtype=mx.int32))
        of_each, _, _, same_top = np.array(
            numbers, dtype=np.float64
        )  # which token follows makes no difference to these
        kl += float(of_each.sum())
        same += int(same_top.sum())
        tokens += len(log_q)
    return Survival(tokens=tokens, kl=kl / max(1, tokens), same_top=same / max(1, tokens))


def vocabulary_of(net: nn.Module) -> int:
    """How many logits a position has; the shape is known without computing."""
    return int(net(mx.zeros((1, 1), dtype=mx.int32)).shape[-1])


def _predictions(net: nn.Module, samples: Sequence[Sample]) -> Iterator[mx.array]:
    """Log-probabilities (N, V) in float32 at the supervised tokens, some rows at a time, in an order of the lengths."""
    net.eval()
    head = find(net)
    most = max(1, LOGITS_BYTES // (4 * vocabulary_of(net)))
    for rows in in_order([len(sample.tokens) for sample in samples], BATCH, most):
        batch = make_batch(samples, rows)
        tokens = mx.array(batch.tokens)[:, :-1]
        at = wanted_at(batch.trained)
        at = at[at >= 0]
        hidden = None if head is None else head.hidden(tokens, mx.array(at))
        for start in range(0, len(at), most):
            part = slice(start, start + most)
            if head is None or hidden is None:
                logits = gathered(net(tokens), mx.array(at[part]))
            else:
                logits = head.logits_of(hidden[part], tokens)
            logits = logits.astype(mx.float32)
            made = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
            mx.eval(made)
            yield made
