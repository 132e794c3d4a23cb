"""How likely a network finds the supervised tokens of a batch, in nats. Knows batches and nets, not training."""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxtune import machine
from mlxtune.data.batches import Batch, in_order, make_batch
from mlxtune.data.render import Sample
from mlxtune.workers import ALONE, Workers

LOGITS_BYTES = 500_000_000  # float32 logits of a batch at most; a long row may take more


def row_nats(net: nn.Module, tokens: mx.array, trained: mx.array) -> mx.array:
    """Summed negative log-likelihood (B,) in nats of each row's supervised tokens.

    tokens (B, T) int32, trained (B, T) bool: -sum over t >= 1 with trained[t] of log softmax(logits[t-1])[tokens[t]],
    in float32 whatever the network computes in.
    """
    logits = net(tokens[:, :-1]).astype(mx.float32)  # (B, T-1, V)
    targets = tokens[:, 1:]
    chosen = mx.take_along_axis(logits, targets[..., None], axis=-1).squeeze(-1)
    nats = mx.logsumexp(logits, axis=-1) - chosen  # (B, T-1)
    return mx.where(trained[:, 1:], nats, 0.0).sum(axis=-1)


def in_parts(batch: Batch, function: Callable[[mx.array, mx.array], Any]) -> list[Any]:
    """`function(tokens, trained)`, evaluated, of each part of a batch's rows: one on a GPU, one for each core on a CPU.

    The parts are computed at once, each on a stream of its own, with their share of the BLAS's threads.
    """
    cores = machine.own_cores()
    parts = min(len(batch.tokens), machine.batch_parts(machine.device_kind(), cores))
    streams = _streams(parts) if parts > 1 else [mx.default_stream(mx.default_device())]
    made = []
    for stream, rows in zip(streams, np.array_split(np.arange(len(batch.tokens)), parts), strict=True):
        with mx.stream(stream):
            made.append(function(mx.array(batch.tokens[rows]), mx.array(batch.trained[rows])))
    with machine.blas_threads(cores // parts):
        mx.eval(made)
    return made


_OWN = threading.local()  # MLX lets only the thread that made a stream use it


def _streams(count: int) -> list[mx.Stream]:
    """Streams of the CPU that this thread keeps, since MLX never gives one back."""
    made: list[mx.Stream] = _OWN.__dict__.setdefault("streams", [])
    made += [mx.new_stream(mx.Device(mx.cpu)) for _ in range(count - len(made))]
    return made[:count]


def measure(
    net: nn.Module, samples: Sequence[Sample], batch_size: int = 8, on_row: Callable[[int], None] = lambda done: None
) -> list[float]:
    """Summed nats of each sample's supervised tokens, in the order of `samples`."""
    net.eval()
    vocabulary = net(mx.zeros((1, 1), dtype=mx.int32)).shape[-1]  # the shape is known without computing
    most_tokens = LOGITS_BYTES // (4 * vocabulary)
    nats = [0.0] * len(samples)
    done = 0
    for rows in in_order([len(sample.tokens) for sample in samples], batch_size, most_tokens):
        batch = make_batch(samples, rows)
        found = in_parts(batch, lambda tokens, trained: row_nats(net, tokens, trained))
        for row, value in zip(rows, np.concatenate([np.array(part) for part in found]), strict=True):
            nats[row] = float(value)
        done += len(rows)
        on_row(done)
    return nats


def mean_nats(net: nn.Module, samples: Sequence[Sample], batch_size: int = 8, workers: Workers = ALONE) -> float:
    """Loss over all samples in nats per supervised token: every token weighs the same. Each worker does its share."""
    (nats,) = workers.summed([sum(measure(net, workers.share(samples), batch_size))])
    return nats / max(1, sum(sample.trained_count for sample in samples))
