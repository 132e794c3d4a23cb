"""Choices as a tree of tokens in which what several of them begin with stands once, cut into pieces of equal width.

Knows tokens, not networks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int32]
WIDTH = 4  # tokens of a piece: fewer are more lines, each with its prompt's keys; more are more padding
ROOT = -1  # the prompt's last token


@dataclass(frozen=True, slots=True, kw_only=True)
class Branches:
    """Choices (C,) that may follow a prompt, as N pieces of W tokens; a slot is a token's place among these N·W.

    tokens (N, W), padded with 0 on the right. starts (N,): tokens of its choice before a piece. line (N, L): the slots
    of those and of the piece itself, in the order in which they follow the prompt, padded with 0 on the right.
    Of each token of the tree (M,): `targets`, the token, and `before`, ascending, the slot of the one before it, or
    `ROOT`. paths: of each choice which tokens of the tree it is. What ends every choice that it is in has no slot.
    """

    tokens: Ints
    starts: Ints
    line: Ints
    targets: Ints
    before: Ints
    paths: tuple[Ints, ...]

    @property
    def first_count(self) -> int:
        """How many tokens follow the prompt: the first ones of `targets`."""
        return int((self.before == ROOT).sum())


def grown(choices: Sequence[Sequence[int]], width: int = WIDTH) -> Branches:
    """The tree of choices, none of them empty."""
    parents, tokens, paths = _tree(choices)
    heavy = _heaviest(parents)
    inner = set(parents)  # those that another token follows
    slots = np.full(len(tokens), ROOT)
    pieces: list[list[int]] = []  # the slots before each piece
    filled: list[int] = []  # its tokens
    for node, parent in enumerate(parents):
        if node not in inner:
            continue
        piece = slots[parent] // width if parent != ROOT else ROOT
        if parent == ROOT or heavy[parent] != node or filled[piece] == width:
            behind = [] if parent == ROOT else [*pieces[piece], *range(piece * width, slots[parent] + 1)]
            pieces.append(behind)
            filled.append(0)
            piece = len(pieces) - 1
        slots[node] = piece * width + filled[piece]
        filled[piece] += 1
    laid = np.zeros((len(pieces), width), dtype=np.int32)
    at = slots != ROOT
    laid.reshape(-1)[slots[at]] = np.array(tokens, dtype=np.int32)[at]
    starts = np.array([len(each) for each in pieces], dtype=np.int32)
    line = np.zeros((len(pieces), max(starts, default=0) + width), dtype=np.int32)
    for number, each in enumerate(pieces):
        line[number, : len(each) + width] = [*each, *range(number * width, (number + 1) * width)]
    before = np.array([slots[parent] if parent != ROOT else ROOT for parent in parents], dtype=np.int32)
    order = np.argsort(before, kind="stable")
    place = np.argsort(order)
    return Branches(
        tokens=laid,
        starts=starts,
        line=line,
        targets=np.array(tokens, dtype=np.int32)[order],
        before=before[order],
        paths=tuple(place[path].astype(np.int32) for path in paths),
    )


def _tree(choices: Sequence[Sequence[int]]) -> tuple[list[int], list[int], list[list[int]]]:
    """Of each node its parent, which comes before it, and its token; and the nodes of each choice."""
    known: dict[tuple[int, int], int] = {}
    parents: list[int] = []
    tokens: list[int] = []
    paths: list[list[int]] = []
    for choice in choices:
        node, path = ROOT, []
        for token in choice:
            number = known.setdefault((node, token), len(tokens))
            if number == len(tokens):
                parents.append(node)
                tokens.append(token)
            node = number
            path.append(node)
        paths.append(path)
    return parents, tokens, paths


def _heaviest(parents: Sequence[int]) -> dict[int, int]:
    """Of each node that has children the one with the longest way on, which goes on in its parent's piece."""
    height = [0] * len(parents)
    heavy: dict[int, int] = {}
    for node in reversed(range(len(parents))):
        parent = parents[node]
        if parent != ROOT and (parent not in heavy or height[node] >= height[heavy[parent]]):
            heavy[parent] = node
            height[parent] = height[node] + 1
    return heavy


def groups(choices: Sequence[Sequence[int]], most: int) -> list[list[int]]:
    """Places of the choices in groups of at most `most`, those that begin alike side by side."""
    order = sorted(range(len(choices)), key=lambda place: tuple(choices[place]))
    return [order[start : start + most] for start in range(0, len(order), most)]
