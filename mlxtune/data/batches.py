"""Samples -> padded batches, in an order that is a pure function of seed and epoch. Knows no model."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mlxtune.data.render import Sample

SORTED_BATCHES = 32  # batches whose rows are sorted by length together: little padding, still a random order


@dataclass(frozen=True, slots=True)
class Batch:
    """`tokens` (B, T) int32, padded with 0 on the right; `trained` (B, T) bool, false on padding; row indices (B,)."""

    tokens: npt.NDArray[np.int32]
    trained: npt.NDArray[np.bool_]
    rows: list[int]


def epoch_order(lengths: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Row indices of each batch of an epoch: every row exactly once, the last partial batch included.

    Rows are shuffled, then sorted by length within stretches of `SORTED_BATCHES` batches, and the batches shuffled.
    """
    random = np.random.default_rng([seed, epoch])
    shuffled = random.permutation(len(lengths))
    stretch = batch_size * SORTED_BATCHES
    batches: list[list[int]] = []
    for start in range(0, len(shuffled), stretch):
        part = sorted(shuffled[start : start + stretch].tolist(), key=lambda row: lengths[row])
        batches += [part[i : i + batch_size] for i in range(0, len(part), batch_size)]
    return [batches[i] for i in random.permutation(len(batches))]


def in_order(lengths: Sequence[int], batch_size: int, most_tokens: int | None = None) -> list[list[int]]:
    """Row indices of each batch for measuring: sorted by length, always the same.

    A batch has at most `batch_size` rows and, padding included, `most_tokens` tokens, but never less than one row.
    """
    batches: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: lengths[row]):
        rows = len(batches[-1]) + 1 if batches else 0
        if not rows or rows > batch_size or (most_tokens is not None and rows * lengths[row] > most_tokens):
            batches.append([])
        batches[-1].append(row)
    return batches


def make_batch(samples: Sequence[Sample], rows: list[int], pad_multiple: int = 1) -> Batch:
    """The samples at `rows`, padded to the longest of them and on to a multiple of `pad_multiple`."""
    longest = max(len(samples[row].tokens) for row in rows)
    width = -(-longest // pad_multiple) * pad_multiple
    tokens = np.zeros((len(rows), width), dtype=np.int32)
    trained = np.zeros((len(rows), width), dtype=np.bool_)
    for i, row in enumerate(rows):
        sample = samples[row]
        tokens[i, : len(sample.tokens)] = sample.tokens
        trained[i, : len(sample.tokens)] = sample.trained
    return Batch(tokens, trained, rows)
