"""How likely a network finds the supervised tokens of a batch, in nats. Knows batches and nets, not training."""

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from mlxtune import machine
from mlxtune.crossentropy import chunk_size, chunked_nats, learned_nats, token_nats
from mlxtune.data.batches import Batch, in_order, make_batch, split
from mlxtune.data.render import Sample
from mlxtune.head import Head, find, gathered
from mlxtune.workers import ALONE, Workers

LOGITS_BYTES = 500_000_000  # float32 logits of a batch at most, where all are made; a long row may take more


def wanted_at(trained: npt.NDArray[np.generic]) -> npt.NDArray[np.int32]:
    """Places among B·(T-1) that predict a supervised token, ascending, of trained (B, T); -1 pads them.

    As many as there are on a CPU; elsewhere, where each new shape is compiled, a power of two, or all.
    """
    places = np.flatnonzero(trained[:, 1:])
    count = machine.padded_count(len(places), trained[:, 1:].size, machine.device_kind())
    return np.pad(places, (0, count - len(places)), constant_values=-1).astype(np.int32)


def row_nats(
    net: nn.Module, tokens: mx.array, wanted: mx.array, head: Head | None = None, *, learn: bool = False
) -> mx.array:
    """Summed negative log-likelihood (B,) in nats of each row's supervised tokens.

    tokens (B, T) int32, wanted (N,) int32 as `wanted_at` has them, each b·(T-1) + t-1 or -1:
    -sum over the wanted (b, t) of log softmax(logits[b, t-1])[tokens[b, t]],
    in float32 whatever the network computes in. With the `head` of `net` no other logits are made, and no more of
    them at once than `machine.chunk_bytes`, unless it is to `learn` and the head itself is trained.
    """
    at = mx.maximum(wanted, 0)
    targets = tokens[:, 1:].reshape(-1)
    nats = mx.where(wanted >= 0, _token_nats(net, tokens[:, :-1], at, targets[at], head, learn), 0.0)
    return mx.zeros(targets.shape).at[at].add(nats).reshape(len(tokens), -1).sum(axis=-1)


def _token_nats(
    net: nn.Module, tokens: mx.array, at: mx.array, targets: mx.array, head: Head | None, learn: bool
) -> mx.array:
    """Nats (N,) of the `targets` (N,) that tokens (B, T) predict `at` places (N,)."""
    if head is None:
        return token_nats(gathered(net(tokens), at), targets)
    size = chunk_size(head.vocabulary, machine.chunk_bytes(machine.device_kind()))
    if len(at) <= size or (learn and not head.frozen):
        return token_nats(head.logits(tokens, at), targets)
    chunked = learned_nats if learn else chunked_nats
    return chunked(lambda hidden: head.logits_of(hidden, tokens), head.hidden(tokens, at), targets, size)


def in_parts(batch: Batch, function: Callable[..., Any], most_tokens: int | None = None) -> Iterator[Any]:
    """`function` of the batch's arrays, evaluated, of each part of its rows: one on a GPU, one for each core on a CPU.

    Its arguments are tokens (B, T), the places (N,) that `wanted_at` finds in trained (B, T), and the other arrays.
    The parts are computed at once, each on a stream of its own, with their share of the BLAS's threads. Where they
    would have more than `most_tokens` there are more of them, some after the others.
    """
    at_once = min(len(batch.tokens), machine.batch_parts(machine.device_kind(), machine.own_cores()))
    parts = split(batch, part_count(batch.tokens.shape, at_once, most_tokens))

    def made(tokens: npt.NDArray[np.generic], trained: npt.NDArray[np.generic], *rest: npt.NDArray[np.generic]) -> Any:
        return function(mx.array(tokens), mx.array(wanted_at(trained)), *map(mx.array, rest))

    yield from together([partial(made, *arrays) for arrays in parts])


def together(calls: Sequence[Callable[[], Any]]) -> Iterator[Any]:
    """What calls return, evaluated: on a CPU as many of them at once as there are cores, on a stream each."""
    cores = machine.own_cores()
    at_once = min(len(calls), machine.batch_parts(machine.device_kind(), cores))
    for start in range(0, len(calls), at_once or 1):
        some = calls[start : start + at_once]
        streams = _streams(len(some)) if at_once > 1 else [mx.default_stream(mx.default_device())]
        made = []
        for stream, call in zip(streams, some, strict=True):
            with mx.stream(stream):
                made.append(call())
        with machine.blas_threads(cores // len(some)):
            mx.eval(made)
        while made:
            yield made.pop(0)  # and keep it no longer


def part_count(shape: tuple[int, ...], at_once: int, most_tokens: int | None) -> int:
    """Parts of a batch of shape (B, T): as many as are computed at once, or a multiple, but no more than lines."""
    lines, width = shape
    rounds = 1 if most_tokens is None else math.ceil(lines * width / (at_once * most_tokens))
    return min(lines, at_once * rounds)


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
    head = find(net)
    most_tokens = None
    if head is None:
        vocabulary = net(mx.zeros((1, 1), dtype=mx.int32)).shape[-1]  # the shape is known without computing
        most_tokens = LOGITS_BYTES // (4 * vocabulary)
    nats = [0.0] * len(samples)
    done = 0
    for rows in in_order([len(sample.tokens) for sample in samples], batch_size, most_tokens):
        batch = make_batch(samples, rows)
        found = in_parts(batch, lambda tokens, wanted: row_nats(net, tokens, wanted, head))
        for row, value in zip(rows, np.concatenate([np.array(part) for part in found]), strict=True):
            nats[row] = float(value)
        done += len(rows)
        on_row(done)
    return nats


def mean_nats(net: nn.Module, samples: Sequence[Sample], batch_size: int = 8, workers: Workers = ALONE) -> float:
    """Loss over all samples in nats per supervised token: every token weighs the same. Each worker does its share."""
    (nats,) = workers.summed([sum(measure(net, workers.share(samples), batch_size))])
    return nats / max(1, sum(sample.trained_count for sample in samples))
