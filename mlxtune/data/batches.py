"""Samples -> batches, in an order that is a pure function of seed and epoch. Knows no model.

Rows stand alone, padded on the right, or several in one line, as segments that a model must not mix.
"""

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mlxtune.data.render import Sample

SORTED_BATCHES = 32  # batches whose rows are sorted by length together: little padding, still a random order
MOST_SHAPES = 8  # of a run, where each new one makes a device compile
WIDTHS = 64  # between which these shapes are chosen

Shape = tuple[int, int]  # lines, width


@dataclass(frozen=True, slots=True)
class Batch:
    """`tokens` (B, T) int32, padded with 0 on the right; `trained` (B, T) bool, false on padding; row indices.

    Packed, a line holds several rows, one behind the other: `segments` (B, T) int32 counts them from 0, and what
    pads a line is a segment too. The first token of each is not trained: nothing comes before it.
    """

    tokens: npt.NDArray[np.int32]
    trained: npt.NDArray[np.bool_]
    rows: list[int]
    segments: npt.NDArray[np.int32] | None = None

    @property
    def arrays(self) -> tuple[npt.NDArray[np.generic], ...]:
        """What a loss is computed from: tokens, trained and, packed, segments."""
        return (self.tokens, self.trained) if self.segments is None else (self.tokens, self.trained, self.segments)


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


def pack(lengths: Mapping[int, int]) -> list[list[int]]:
    """Lines of rows, no longer than the longest row: each row, long ones first, goes into the first line with room.

    So packed rows never are more tokens than padded ones: as many lines or fewer, of the same width.
    """
    lines: list[list[int]] = []
    room: list[int] = []
    for row in sorted(lengths, key=lambda row: -lengths[row]):
        line = next((i for i, left in enumerate(room) if left >= lengths[row]), len(lines))
        if line == len(lines):
            lines.append([])
            room.append(max(lengths.values()))
        lines[line].append(row)
        room[line] -= lengths[row]
    return lines


def few_shapes(needed: Iterable[Shape], most: int = MOST_SHAPES) -> list[Shape]:
    """At most `most` shapes such that one of them covers each of the `needed`, with little padding.

    From the needed ones, the two that cost least together become one, until they are few enough.
    """
    counts = Counter(needed)
    while len(counts) > most:
        shapes = np.array(list(counts))  # (N, 2)
        times = np.array(list(counts.values()))
        area = times * shapes.prod(axis=1)
        joined = np.maximum(shapes[:, None], shapes[None]).prod(axis=2) * (times[:, None] + times[None])
        added = joined - area[:, None] - area[None]
        np.fill_diagonal(added, np.iinfo(added.dtype).max)
        one, other = (tuple(shapes[i].tolist()) for i in np.unravel_index(added.argmin(), added.shape))
        together = counts.pop(one) + counts.pop(other)
        counts[max(one[0], other[0]), max(one[1], other[1])] += together
    return sorted(counts)


def make_batch(samples: Sequence[Sample], rows: list[int], pad_multiple: int = 1) -> Batch:
    """The samples at `rows`, padded to the longest of them and on to a multiple of `pad_multiple`."""
    longest = max(len(samples[row].tokens) for row in rows)
    return make_lines(samples, [[row] for row in rows], (len(rows), up(longest, pad_multiple)))


def make_lines(samples: Sequence[Sample], lines: list[list[int]], shape: Shape) -> Batch:
    """A batch of lines of row indices, in a `shape` that holds them; one row a line is not packed."""
    tokens = np.zeros(shape, dtype=np.int32)
    trained = np.zeros(shape, dtype=np.bool_)
    segments = np.zeros(shape, dtype=np.int32)
    for i, line in enumerate(lines):
        start = 0
        for number, row in enumerate(line):
            sample = samples[row]
            end = start + len(sample.tokens)
            tokens[i, start:end] = sample.tokens
            trained[i, start:end] = sample.trained
            trained[i, start] &= number == 0  # nothing comes before it
            segments[i, start:end] = number
            start = end
        segments[i, start:] = len(line)
    packed = any(len(line) > 1 for line in lines)
    return Batch(tokens, trained, [row for line in lines for row in line], segments if packed else None)


def up(length: int, multiple: int) -> int:
    """The next multiple that is not less."""
    return -(-length // multiple) * multiple


def split(batch: Batch, parts: int) -> list[tuple[npt.NDArray[np.generic], ...]]:
    """The arrays of a batch in at most `parts` runs of its lines: of like work, each as wide as its own lines need.

    What comes behind the last trained token of a line changes no loss, so it is cut off where a part allows it.
    """
    if parts == 1:
        return [batch.arrays]
    behind = batch.trained[:, ::-1].argmax(axis=1)
    needed = np.where(batch.trained.any(axis=1), batch.trained.shape[1] - behind, 2).tolist()
    bounds = balanced(needed, parts)
    return [
        tuple(each[start:end, : max(needed[start:end])] for each in batch.arrays)
        for start, end in itertools.pairwise(bounds)
    ]


def balanced(widths: Sequence[int], parts: int) -> list[int]:
    """Bounds of at most `parts` runs of lines, such that the one with most work has the least: lines x longest."""
    low, high = max(widths), max(widths) * len(widths)
    while low < high:
        most = (low + high) // 2
        if len(_bounds(widths, most)) <= parts + 1:
            high = most
        else:
            low = most + 1
    return _bounds(widths, low)


def work(widths: Sequence[int], parts: int) -> int:
    """Tokens, padding included, of the part with most of them."""
    return max((end - start) * max(widths[start:end]) for start, end in itertools.pairwise(balanced(widths, parts)))


def _bounds(widths: Sequence[int], most: int) -> list[int]:
    """Bounds of runs that are as long as `most` work allows."""
    bounds, longest = [0], 0
    for i, width in enumerate(widths):
        longest = max(longest, width)
        if (i + 1 - bounds[-1]) * longest > most:
            bounds.append(i)
            longest = width
    return [*bounds, len(widths)]
