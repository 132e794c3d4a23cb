"""How far a network's predictions are from those of the network it was made from. Knows networks and samples.

Both read the same rows, and each position of each row predicts the next token: P is what the source predicts there,
Q what the other does. Only a few numbers of a position are kept, never its logits.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from mlxtune import machine
from mlxtune.caches import measured
from mlxtune.crossentropy import chunk_size
from mlxtune.data.batches import in_order, make_batch
from mlxtune.data.render import Sample
from mlxtune.errors import DataError, ModelError
from mlxtune.head import Head, find, gathered
from mlxtune.likelihood import LOGITS_BYTES

REFERENCE_BYTES = 200_000_000  # of logits that are kept
Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Divergence:
    """Over `tokens` predicted positions of `rows` rows, the trained ones or not.

    `kl_…`: KL(P ‖ Q) = sum over tokens of p · log(p / q), in nats per position: its mean with the standard error of
    the mean, median, 99th percentile and maximum. `perplexity_ratio` is Q's perplexity over P's. Its standard error
    and that of the mean KL take rows as independent, not positions; they are None for a single row. `rms_delta_p` is
    the root mean square of q - p of the token that follows, `same_top` the share of positions where P and Q rank the
    same token first.
    """

    rows: int
    tokens: int
    kl_mean: float
    kl_error: float | None
    kl_median: float
    kl_99: float
    kl_max: float
    perplexity_source: float
    perplexity: float
    perplexity_ratio: float
    perplexity_ratio_error: float | None
    rms_delta_p: float
    same_top: float


@dataclass(frozen=True, slots=True)
class Positions:
    """Of each predicted position (N,): its row, KL(P ‖ Q), -log p and -log q of what follows, and if one is on top."""

    row: npt.NDArray[np.int64]
    kl: Numbers
    source_nats: Numbers
    nats: Numbers
    same_top: Numbers


def measure(
    source: nn.Module,
    other: nn.Module,
    samples: Sequence[Sample],
    batch_size: int = 8,
    on_row: Callable[[int], None] = lambda done: None,
) -> Divergence:
    """How far `other` is from `source` on `samples`.

    Raises DataError where no row has two tokens, ModelError where the two have other vocabularies.
    """
    return summed_up(positions(source, other, samples, batch_size, on_row))


def positions(
    source: nn.Module,
    other: nn.Module,
    samples: Sequence[Sample],
    batch_size: int = 8,
    on_row: Callable[[int], None] = lambda done: None,
) -> Positions:
    """Both networks at each position of each sample that another token follows; errors as for `measure`."""
    rows = [row for row, sample in enumerate(samples) if len(sample.tokens) > 1]
    if not rows:
        raise DataError("no row has two tokens", hint="predictions are compared where a token follows another")
    found: list[npt.NDArray[np.float64]] = []
    done = 0
    with measured(source), measured(other):
        probe = mx.zeros((1, 1), dtype=mx.int32)
        vocabulary = source(probe).shape[-1]  # the shapes are known without computing
        if other(probe).shape[-1] != vocabulary:
            raise ModelError(f"has a vocabulary of {other(probe).shape[-1]}, not {vocabulary}")
        heads = find(source), find(other)
        chunk = chunk_size(vocabulary, machine.chunk_bytes(machine.device_kind()))
        most_tokens = None if None not in heads else LOGITS_BYTES // (4 * vocabulary)
        for some in in_order([len(samples[row].tokens) for row in rows], batch_size, most_tokens):
            batch = make_batch(samples, [rows[i] for i in some])
            lengths = np.array([len(samples[row].tokens) for row in batch.rows])
            line, place = np.nonzero(np.arange(1, batch.tokens.shape[1])[None] < lengths[:, None])
            at = mx.array((line * (batch.tokens.shape[1] - 1) + place).astype(np.int32))
            tokens = mx.array(batch.tokens)
            hidden = [_hidden(net, head, tokens[:, :-1], at) for net, head in zip((source, other), heads, strict=True)]
            targets = gathered(tokens[:, 1:, None], at)[:, 0]
            for start in range(0, len(at), chunk):
                part = slice(start, start + chunk)
                logits = [
                    each[part] if head is None else head.logits_of(each[part], tokens[:, :-1])
                    for each, head in zip(hidden, heads, strict=True)
                ]
                numbers = np.array(compared(logits[0], logits[1], targets[part]), dtype=np.float64)
                found.append(np.vstack([np.array(batch.rows)[line[part]], numbers]))
            done += len(some)
            on_row(done)
    row, kl, source_nats, nats, same = np.concatenate(found, axis=1)
    return Positions(row.astype(np.int64), kl, source_nats, nats, same)


def _hidden(net: nn.Module, head: Head | None, tokens: mx.array, at: mx.array) -> mx.array:
    """What goes into the head at the places (N, D), evaluated; the logits (N, V) where no head is known."""
    made = gathered(net(tokens), at) if head is None else head.hidden(tokens, at)
    mx.eval(made)
    return made


def compared(source: mx.array, other: mx.array, targets: mx.array) -> mx.array:
    """Logits (N, V) of P and Q, the tokens (N,) that follow -> KL, -log p, -log q, same top: (4, N) float32.

    With d = log p - log q, KL is the sum of p · d + q - p, as both sum to 1: no term is negative, so nothing cancels
    between terms, nor inside those of a small d, written as p · (d + exp(-d) - 1).
    """
    source, other = source.astype(mx.float32), other.astype(mx.float32)
    log_p = source - mx.logsumexp(source, axis=-1, keepdims=True)
    log_q = other - mx.logsumexp(other, axis=-1, keepdims=True)
    apart = log_p - log_q
    p, q = mx.exp(log_p), mx.exp(log_q)
    near = p * (apart + mx.expm1(-mx.clip(apart, -1, 1)))
    kl = mx.where(mx.abs(apart) < 1, near, p * apart + (q - p)).sum(axis=-1)
    right = targets[:, None]
    nats = [-mx.take_along_axis(each, right, axis=-1)[:, 0] for each in (log_p, log_q)]
    same = source.argmax(axis=-1) == other.argmax(axis=-1)
    return mx.stack([kl, *nats, same.astype(mx.float32)])


def summed_up(found: Positions) -> Divergence:
    """The figures of these positions."""
    count = len(found.kl)
    worse = found.nats - found.source_nats
    ratio = math.exp(worse.mean())
    ratio_error = _error_of_mean(worse, found.row)
    return Divergence(
        rows=len(np.unique(found.row)),
        tokens=count,
        kl_mean=float(found.kl.mean()),
        kl_error=_error_of_mean(found.kl, found.row),
        kl_median=float(np.median(found.kl)),
        kl_99=float(np.quantile(found.kl, 0.99)),
        kl_max=float(found.kl.max()),
        perplexity_source=math.exp(found.source_nats.mean()),
        perplexity=math.exp(found.nats.mean()),
        perplexity_ratio=ratio,
        perplexity_ratio_error=None if ratio_error is None else ratio * ratio_error,
        rms_delta_p=float(np.sqrt(np.mean((np.exp(-found.nats) - np.exp(-found.source_nats)) ** 2))),
        same_top=float(found.same_top.mean()),
    )


class Reference:
    """What a network predicts at some positions of samples, kept to ask how far changed networks are from it.

    Evenly spread positions are kept, as many as take `most_bytes`. Errors as for `measure`.
    """

    def __init__(self, net: nn.Module, samples: Sequence[Sample], most_bytes: int = REFERENCE_BYTES):
        rows = [row for row, sample in enumerate(samples) if len(sample.tokens) > 1]
        count = sum(len(samples[row].tokens) - 1 for row in rows)
        if not count:
            raise DataError("no row has two tokens", hint="predictions are compared where a token follows another")
        self._parts: list[tuple[mx.array, mx.array, mx.array]] = []  # tokens (B, T), places (N,), logits (N, V)
        with measured(net):
            vocabulary = net(mx.zeros((1, 1), dtype=mx.int32)).shape[-1]
            every = math.ceil(count * 4 * vocabulary / most_bytes)
            for some in in_order([len(samples[row].tokens) for row in rows], 8, LOGITS_BYTES // (4 * vocabulary)):
                batch = make_batch(samples, [rows[i] for i in some])
                lengths = np.array([len(samples[row].tokens) for row in batch.rows])
                place = np.arange(batch.tokens.shape[1])
                kept = (place < lengths[:, None] - 1) & ((place + np.arange(len(lengths))[:, None]) % every == 0)
                at = mx.array(np.flatnonzero(kept).astype(np.int32))
                tokens = mx.array(batch.tokens)
                logits = gathered(net(tokens), at).astype(mx.float32)
                mx.eval(logits)
                self._parts.append((tokens, at, logits))

    def kl(self, net: nn.Module) -> float:
        """Mean KL(P ‖ Q) of `net` in nats per kept position."""
        total, count = 0.0, 0
        with measured(net):
            for tokens, at, logits in self._parts:
                found = compared(logits, gathered(net(tokens), at), mx.zeros(at.shape, dtype=mx.int32))[0]
                total += float(np.array(found.sum()))
                count += len(at)
        return total / count


def _error_of_mean(values: Numbers, row: npt.NDArray[np.int64]) -> float | None:
    """Standard error of the mean of `values` (N,) whose rows are drawn at random: that of a ratio of two sums.

    sqrt(R / (R - 1) · sum over rows of (sum of the row's values - mean · its positions)²) / N; None for one row.
    """
    _, number = np.unique(row, return_inverse=True)
    off = np.bincount(number, weights=values - values.mean())
    if len(off) < 2:
        return None
    return math.sqrt(len(off) / (len(off) - 1) * float((off**2).sum())) / len(values)
