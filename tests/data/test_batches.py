"""Batches: each row once an epoch, an order that seed and epoch alone decide, padding on the right."""

import numpy as np
import pytest

from mlxtune.data.batches import (
    SORTED_BATCHES,
    balanced,
    epoch_order,
    few_shapes,
    in_order,
    make_batch,
    make_lines,
    pack,
    split,
    work,
)
from mlxtune.data.render import Sample


def lengths(rows: int) -> list[int]:
    return [1 + (7 * row) % 13 for row in range(rows)]


def sample(tokens: list[int]) -> Sample:
    return Sample("rows.jsonl:1", tokens, [False] + [True] * (len(tokens) - 1), 1, "answer")


@pytest.mark.parametrize("batch_size", range(1, 10))
def test_every_row_comes_exactly_once_an_epoch(batch_size: int) -> None:
    for rows in range(1, 51):
        for order in (epoch_order(lengths(rows), batch_size, 3, 1), in_order(lengths(rows), batch_size)):
            assert sorted(row for batch in order for row in batch) == list(range(rows))
            assert len(order) == -(-rows // batch_size)
            # one batch at most is partial
            assert sorted(len(batch) for batch in order)[1:] == [batch_size] * (len(order) - 1)


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    order = epoch_order(lengths(50), 4, seed=0, epoch=0)
    np.random.seed(1)  # noqa: NPY002  # somebody else's randomness
    assert epoch_order(lengths(50), 4, seed=0, epoch=0) == order
    others = [epoch_order(lengths(50), 4, seed, epoch) for seed, epoch in [(0, 1), (1, 0), (1, 1), (2**63 - 1, 0)]]
    assert all(each != order for each in others) and others[0] != others[1]


def test_the_order_is_that_of_last_week() -> None:
    """A run that is resumed under a later version goes on with the same rows."""
    assert epoch_order([5, 3, 9, 1, 7, 2], 2, seed=0, epoch=0) == [[3, 5], [1, 0], [4, 2]]
    assert epoch_order([5, 3, 9, 1, 7, 2], 2, seed=1, epoch=1) == [[3, 5], [4, 2], [1, 0]]


def test_rows_of_like_length_come_together_within_a_stretch_only() -> None:
    rows, batch_size = 4 * SORTED_BATCHES * 2, 4
    known = [int(each) for each in np.random.default_rng(5).integers(1, 500, rows)]
    order = epoch_order(known, batch_size, 0, 0)
    spread = [max(known[row] for row in batch) - min(known[row] for row in batch) for batch in order]
    assert np.mean(spread) < 15  # at random it would be some 300
    assert sorted(map(min, order)) != [min(batch) for batch in order]
    firsts = [known[batch[0]] for batch in order]
    assert firsts != sorted(firsts)  # short batches do not all come first
    # two stretches, not one sort: short rows stand in batches of either
    assert sorted(firsts) != sorted(known[batch[0]] for batch in in_order(known, batch_size))


def test_measuring_goes_by_length_and_row() -> None:
    assert in_order([5, 3, 9, 3, 5], 2) == [[1, 3], [0, 4], [2]]


def test_a_batch_is_padded_on_the_right() -> None:
    samples = [sample([5, 6, 7]), sample([8, 9]), sample([1, 2, 3, 4, 5])]
    batch = make_batch(samples, [1, 0])
    assert batch.tokens.tolist() == [[8, 9, 0], [5, 6, 7]]
    assert batch.trained.tolist() == [[False, True, False], [False, True, True]]
    assert batch.rows == [1, 0]
    assert (batch.tokens.dtype, batch.trained.dtype) == (np.int32, np.bool_)


@pytest.mark.parametrize(("multiple", "width"), [(1, 5), (4, 8), (5, 5), (32, 32)])
def test_the_width_is_a_multiple(multiple: int, width: int) -> None:
    samples = [sample([5, 6, 7]), sample([1, 2, 3, 4, 5])]
    batch = make_batch(samples, [0, 1], multiple)
    assert batch.tokens.shape == batch.trained.shape == (2, width)
    assert batch.tokens[0].tolist() == [5, 6, 7] + [0] * (width - 3)
    assert batch.trained.sum() == 2 + 4


def test_measuring_batches_hold_at_most_so_many_tokens() -> None:
    lengths = [5, 1, 9, 3, 3, 20]
    assert in_order(lengths, 4) == [[1, 3, 4, 0], [2, 5]]
    assert in_order(lengths, 4, most_tokens=9) == [[1, 3, 4], [0], [2], [5]]  # padding counts; a long row stands alone
    assert in_order([], 4) == []


def test_packed_rows_never_are_more_tokens() -> None:
    random = np.random.default_rng(2)
    for _ in range(200):
        known = {row: int(random.integers(2, 100)) for row in random.permutation(50)[: random.integers(1, 17)].tolist()}
        lines = pack(known)
        assert sorted(row for line in lines for row in line) == sorted(known)
        assert all(sum(known[row] for row in line) <= max(known.values()) for line in lines)
    assert pack({0: 3, 1: 9, 2: 4, 3: 5}) == [[1], [3, 2], [0]]
    assert pack({4: 6, 2: 6}) == [[4], [2]]


def test_a_packed_batch_has_segments_and_trains_no_first_token() -> None:
    samples = [sample([5, 6, 7]), sample([8, 9]), Sample("rows.jsonl:3", [1, 2], [True, True], 0, None)]
    batch = make_lines(samples, [[0, 2], [1]], (3, 6))
    assert batch.tokens.tolist() == [[5, 6, 7, 1, 2, 0], [8, 9, 0, 0, 0, 0], [0] * 6]
    assert batch.trained.astype(int).tolist() == [[0, 1, 1, 0, 1, 0], [0, 1, 0, 0, 0, 0], [0] * 6]
    assert batch.segments is not None
    assert batch.segments.tolist() == [[0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 1, 1], [0] * 6]
    assert (batch.rows, batch.segments.dtype) == ([0, 2, 1], np.int32)
    assert make_lines(samples, [[0], [1]], (2, 3)).segments is None  # nothing is packed


def test_parts_are_of_like_work_and_no_wider_than_they_need() -> None:
    assert balanced([3, 3, 3, 9], 2) == [0, 3, 4]
    assert balanced([5] * 8, 2) == [0, 4, 8]
    assert balanced([5, 6], 4) == [0, 1, 2]
    assert [work([3, 3, 3, 9], parts) for parts in (1, 2, 3)] == [36, 9, 9]
    samples = [sample([1] * length) for length in (3, 3, 4, 9)]
    samples[2].trained[3] = False  # what comes behind the last learned token is of no use
    parts = split(make_batch(samples, [0, 1, 2, 3], 16), 2)
    assert [[each.shape for each in part] for part in parts] == [[(3, 3)] * 2, [(1, 9)] * 2]
    packed = split(make_lines(samples, [[3], [0, 1], []], (3, 9)), 2)
    assert [[each.shape for each in part] for part in packed] == [[(1, 9)] * 3, [(2, 6)] * 3]
    whole = make_batch(samples, [0, 1, 2, 3], 16)
    assert all(part is array for part, array in zip(split(whole, 1)[0], whole.arrays, strict=True))


def test_no_split_of_the_lines_has_less_work() -> None:
    random = np.random.default_rng(4)
    for _ in range(100):
        widths = random.integers(2, 50, random.integers(2, 12)).tolist()
        best = min(max(i * max(widths[:i]), (len(widths) - i) * max(widths[i:])) for i in range(1, len(widths)))
        assert work(widths, 2) == min(best, work(widths, 1))


def test_a_few_shapes_hold_all() -> None:
    assert few_shapes([(4, 32), (4, 64), (4, 32)]) == [(4, 32), (4, 64)]
    assert few_shapes([(4, 32), (4, 64), (4, 320), (1, 32)], most=2) == [(4, 64), (4, 320)]
    random = np.random.default_rng(6)
    needed = [(8, int(width)) for width in random.integers(1, 65, 500) * 32]
    shapes = few_shapes(needed)
    assert len(shapes) == 8 and max(needed) in shapes
    held = [min(shape[0] * shape[1] for shape in shapes if shape >= each) for each in needed]
    assert sum(held) < 1.12 * sum(lines * width for lines, width in needed)
