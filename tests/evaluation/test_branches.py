"""Trees of choices: every beginning once, and every choice whole along its lines."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxtune.evaluation.branches import ROOT, WIDTH, Branches, groups, grown

SEVERAL = st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=7), max_size=8)


def told(tree: Branches, choice: int) -> list[int]:
    """The tokens of a choice, as its path names them."""
    return [int(tree.targets[token]) for token in tree.paths[choice]]


def beginnings(choices: Sequence[Sequence[int]]) -> set[tuple[int, ...]]:
    return {tuple(choice[:length]) for choice in choices for length in range(1, len(choice) + 1)}


@given(SEVERAL, st.integers(1, 5))
def test_a_tree_has_every_beginning_once(choices: list[list[int]], width: int) -> None:
    tree = grown(choices, width)
    assert [told(tree, number) for number in range(len(choices))] == choices
    assert len(tree.targets) == len(tree.before) == len(beginnings(choices))
    assert tree.before.tolist() == sorted(tree.before.tolist())
    assert tree.first_count == len({choice[0] for choice in choices}) and set(tree.before[: tree.first_count]) <= {ROOT}
    goes_on = {start[:-1] for start in beginnings(choices) if len(start) > 1}
    assert len(set(tree.before.tolist()) - {ROOT}) == len(goes_on)  # what ends every choice is never read


@given(SEVERAL, st.integers(1, 5))
def test_a_line_has_the_whole_beginning_of_its_tokens(choices: list[list[int]], width: int) -> None:
    tree = grown(choices, width)
    assert tree.tokens.shape == (len(tree.starts), width) and tree.tokens.dtype == np.int32
    for path, choice in zip(tree.paths, choices, strict=True):
        for place in range(1, len(choice)):
            slot = tree.before[path[place]]  # of the token at place - 1
            piece, column = divmod(int(slot), width)
            assert tree.starts[piece] + column == place - 1
            seen = tree.line[piece, :place]
            assert tree.tokens.reshape(-1)[seen].tolist() == choice[:place] and seen[-1] == slot


def test_a_tree_by_hand() -> None:
    tree = grown([[5, 6, 7, 8], [5, 6, 9], [4], [5, 6]], width=2)
    # 5 6 in a piece, 7 in the next; 8, 9 and 4 are only predicted
    assert tree.tokens.tolist() == [[5, 6], [7, 0]] and tree.starts.tolist() == [0, 2]
    assert tree.line.tolist() == [[0, 1, 0, 0], [0, 1, 2, 3]]
    assert tree.targets.tolist() == [5, 4, 6, 7, 9, 8] and tree.before.tolist() == [ROOT, ROOT, 0, 1, 1, 2]
    assert [path.tolist() for path in tree.paths] == [[0, 2, 3, 5], [0, 2, 4], [1], [0, 2]]


def test_the_longest_way_goes_on_in_its_piece() -> None:
    tree = grown([[1, 2, 9], [1, 3, 4, 5, 9]], width=WIDTH)
    assert tree.tokens.tolist() == [[1, 3, 4, 5], [2, 0, 0, 0]]


def test_single_tokens_are_only_predicted() -> None:
    tree = grown([[1], [2]])
    assert tree.tokens.shape == (0, WIDTH) and tree.line.shape[0] == 0 and tree.first_count == 2


@pytest.mark.parametrize(("most", "sizes"), [(1, [1, 1, 1, 1]), (3, [3, 1]), (4, [4]), (9, [4])])
def test_groups_keep_together_what_begins_alike(most: int, sizes: list[int]) -> None:
    found = groups([[2, 1], [1, 5], [2], [1, 4]], most)
    assert [len(each) for each in found] == sizes
    assert [place for each in found for place in each] == [3, 1, 2, 0]
