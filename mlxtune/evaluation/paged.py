"""Has a network read a tree of choices behind each prompt: every token once, though many choices begin with it.

Knows networks and their attention, not what is chosen. The keys and values of all tokens lie in one bank, and a table
says which of them a line sees: its own and those before it.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from mlxtune import beginnings, machine
from mlxtune.caches import given, tried
from mlxtune.data.batches import balanced
from mlxtune.evaluation.branches import Branches, Ints, groups, grown
from mlxtune.evaluation.figures import figures, row_figures
from mlxtune.head import Head, alike, find
from mlxtune.likelihood import LOGITS_BYTES, part_count, together, wanted_at
from mlxtune.prefix import Prefix, Recorder

MOST_TOKENS = 4096  # that a GPU computes at once; a prompt or tree may have more
KEYS_BYTES = 2**28  # of keys and values that the lines of a call see in a layer; one tree may take more
PROBED = (2, 5, 3, 4)  # tokens of prompts behind a random beginning
Figures = npt.NDArray[np.float64]
Unit = tuple[list[int], Branches]  # places of some choices of a row, and their tree
Planted = dict[tuple[tuple[int, ...], ...], list[Unit]]


class Kept(Prefix):
    """A cache that keeps the keys and values that it gets, but not those (1, H, P, D) that it puts before them."""

    def __init__(self, before: list[mx.array], length: int) -> None:
        super().__init__(before, length)
        self.own: list[mx.array] = []

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        self.own = [keys, values]
        return super().update_and_fetch(keys, values) if self.held else (keys, values)

    def bank(self) -> list[mx.array]:
        """All keys and values (K, H, D): those before, then the others, one row after the other."""
        own = [_flat(each) for each in self.own]
        if not self.held:
            return own
        return [mx.concatenate([_flat(old), new]) for old, new in zip(self.held, own, strict=True)]


class Paged:
    """A cache that gives each line the keys and values of what comes before it, of a bank (K, H, D) and of all lines.

    offset (N,): the tokens before a line; table (N, S): where their keys lie, and then its own. It keeps nothing.
    `masks` is shared by the caches of a network.
    """

    def __init__(self, bank: list[mx.array], offset: mx.array, table: mx.array, masks: dict[int | None, mx.array]):
        self.bank, self.offset, self.table, self.masks = bank, offset, table, masks
        self.held: list[mx.array] = []

    def make_mask(self, length: int, return_array: bool = False, window_size: int | None = None) -> mx.array:
        """The mask (N, 1, W, S) of who sees whom."""
        if window_size not in self.masks:
            query = (self.offset[:, None] + mx.arange(length))[:, None, :, None]
            key = mx.arange(self.table.shape[1])
            seen = key <= query
            self.masks[window_size] = seen if window_size is None else seen & (query - key < window_size)
        return self.masks[window_size]

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        return self._seen(self.bank[0], keys), self._seen(self.bank[1], values)

    def _seen(self, bank: mx.array, own: mx.array) -> mx.array:
        """(K, H, D), (N, H, W, D) -> (N, H, S, D)"""
        return mx.concatenate([bank, _flat(own)])[self.table].swapaxes(1, 2)


def _flat(each: mx.array) -> mx.array:
    """(N, H, W, D) -> (N·W, H, D)"""
    return each.swapaxes(1, 2).reshape(-1, each.shape[1], each.shape[3])


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A row: its number, the tokens of its prompt behind what it shares, and its choices in trees of some of them."""

    row: int
    prompt: Sequence[int]
    units: list[Unit]

    @property
    def trees(self) -> list[Branches]:
        return [tree for _, tree in self.units]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bank:
    """What a network keeps of the prompts of some rows: of each layer keys and values (K, H, D).

    First those of the `beginning` tokens with which all begin, then of each row as many as the longest one has.
    """

    rows: list[Asked]
    layers: list[list[mx.array]]
    beginning: int

    @property
    def width(self) -> int:
        return max(len(each.prompt) for each in self.rows)

    @property
    def token_bytes(self) -> int:
        """Of a token's keys and values in the layer that has the most."""
        return max(sum(each[0].nbytes for each in layer) for layer in self.layers)


def supported(net: nn.Module, length: int) -> bool:
    """Whether trees behind prompts of `length` tokens get the nats of whole rows, tried with random tokens."""

    def works() -> bool:
        logits = net(mx.zeros((1, 1), dtype=mx.int32))  # shape and type are known without computing
        random = np.random.default_rng(0)

        def drawn(count: int) -> list[int]:
            return random.integers(0, logits.shape[-1], count).tolist()  # type: ignore[no-any-return]

        begin, choice = drawn(max(0, length - max(PROBED))), drawn(6)
        prompts = [begin + drawn(min(count, length)) for count in PROBED]
        choices = [choice, [*choice[:2], *drawn(2)]]
        found = read(net, prompts, [choices] * len(prompts), len(prompts))
        head = find(net)
        for prompt, made in zip(prompts[:2], found, strict=False):
            for each, (nats, _) in zip(choices, made, strict=True):
                trained = np.array([[False] * len(prompt) + [True] * len(each)])
                expected = row_figures(net, mx.array([prompt + each]), mx.array(wanted_at(trained)), head)[:, 0]
                if not alike(mx.array([nats], dtype=logits.dtype), expected.astype(logits.dtype)):
                    return False
        return True

    return tried(net, works)


def read(
    net: nn.Module,
    prompts: Sequence[Sequence[int]],
    choices: Sequence[Sequence[Sequence[int]]],
    batch_size: int,
    on_row: Callable[[int], None] = lambda done: None,
) -> list[Figures]:
    """Nats and first-ranked tokens (C, 2) of each row's choices, none of them empty, where that is `supported`.

    At once there are the keys and values of `batch_size` prompts and of the four beginnings that they may share;
    beside them, on each core, in one layer at a time, what the lines of `batch_size` choices see, or of more choices
    if that takes no more than 256 MB.
    """
    head = find(net)
    most = machine.most_tokens(machine.device_kind()) or MOST_TOKENS
    if head is None:  # the logits of all tokens are made
        most = min(most, LOGITS_BYTES // (4 * net(mx.zeros((1, 1), dtype=mx.int32)).shape[-1]))
    found = [np.zeros((len(some), 2)) for some in choices]
    planted: Planted = {}
    done = 0
    for beginning, rows in _together(prompts, batch_size):
        asked = [
            Asked(
                row=row,
                prompt=prompts[row][len(beginning) :],
                units=_units(choices[row], batch_size, planted),
            )
            for row in rows
            if choices[row]
        ]
        for each, of_trees in _answered(net, head, beginning, asked, most):
            for (places, tree), of_tokens in zip(each.units, of_trees, strict=True):
                for place, path in zip(places, tree.paths, strict=True):
                    found[each.row][place] = of_tokens[path].sum(axis=0)
        done += len(rows)
        on_row(done)
    return found


def _together(prompts: Sequence[Sequence[int]], batch_size: int) -> Iterator[tuple[tuple[int, ...], list[int]]]:
    """What rows begin with, and rows that do, at most `batch_size`, of like length."""
    lengths = beginnings.shared(prompts)
    alike: dict[tuple[int, ...], list[int]] = {}
    for row in sorted(range(len(prompts)), key=lambda row: len(prompts[row])):
        alike.setdefault(tuple(prompts[row][: lengths[row]]), []).append(row)
    for beginning, rows in alike.items():
        for start in range(0, len(rows), batch_size):
            yield beginning, rows[start : start + batch_size]


def _units(choices: Sequence[Sequence[int]], most: int, planted: Planted) -> list[Unit]:
    """Trees of at most `most` choices each; `planted` keeps them for rows with the same choices."""
    known = tuple(map(tuple, choices))
    if known not in planted:
        planted[known] = [(places, grown([choices[at] for at in places])) for places in groups(choices, most)]
    return planted[known]


def _answered(
    net: nn.Module, head: Head | None, beginning: Sequence[int], asked: list[Asked], most: int
) -> Iterator[tuple[Asked, list[Figures]]]:
    """Rows with the figures (M, 2) of all tokens of each of their trees, `most` tokens at once."""
    if not asked:
        return
    before = _begun(net, beginning)
    bounds = _bounds([len(each.prompt) for each in asked], most)
    parts = [asked[start:end] for start, end in itertools.pairwise(bounds)]
    read = together([partial(_prompted, net, head, before, len(beginning), part) for part in parts])
    banks, firsts = [], []
    for part, (made, layers) in zip(parts, read, strict=True):
        banks.append(Bank(rows=part, layers=layers, beginning=len(beginning)))
        firsts += _split(made, [tree.first_count for each in part for tree in each.trees])
    calls = [(bank, call) for bank in banks for call in _calls(bank, most)]
    made_of = together([partial(_branched, net, head, bank, call) for bank, call in calls])
    later: dict[tuple[int, int], Figures] = {}
    for (bank, call), made in zip(calls, made_of, strict=True):
        sizes = [len(tree.before) - tree.first_count for tree in _trees(bank, call)]
        later |= {(bank.rows[at].row, unit): each for (at, unit), each in zip(call, _split(made, sizes), strict=True)}
    begun = iter(firsts)
    for each in asked:
        rest = (later.get((each.row, unit), np.zeros((0, 2))) for unit in range(len(each.units)))
        yield each, [np.concatenate([next(begun), some]) for some in rest]


def _split(made: mx.array, sizes: Sequence[int]) -> list[Figures]:
    return np.split(np.array(made, dtype=np.float64), np.cumsum(sizes)[:-1])


def _bounds(lengths: Sequence[int], most: int) -> list[int]:
    """Bounds of runs of prompts that are computed as one."""
    at_once = min(len(lengths), machine.batch_parts(machine.device_kind(), machine.own_cores()))
    return balanced(lengths, part_count((len(lengths), max(lengths)), at_once, most))


def _begun(net: nn.Module, beginning: Sequence[int]) -> list[list[mx.array]]:
    """Of each layer the keys and values (1, H, P, D) of the beginning."""
    if not beginning:
        return []
    with given(net, Recorder) as recorders:
        net(mx.array([beginning]))
    before = [each.held for each in recorders]
    mx.eval(before)
    return before


def _prompted(
    net: nn.Module, head: Head | None, before: list[list[mx.array]], beginning: int, rows: list[Asked]
) -> tuple[mx.array, list[list[mx.array]]]:
    """The figures (M, 2) of the first tokens of all trees of all rows, and the layers of a bank."""
    width = max(len(each.prompt) for each in rows)
    tokens = np.zeros((len(rows), width), dtype=np.int32)
    for place, each in enumerate(rows):
        tokens[place, : len(each.prompt)] = each.prompt
    ends = [place * width + len(each.prompt) - 1 for place, each in enumerate(rows)]
    which = np.repeat(np.arange(len(rows)), [sum(tree.first_count for tree in each.trees) for each in rows])
    targets = np.concatenate([tree.targets[: tree.first_count] for each in rows for tree in each.trees])
    layers = iter(before)
    with given(net, lambda: Kept(next(layers, []), beginning)) as caches:
        made = figures(net, mx.array(tokens), mx.array(ends), which, mx.array(targets), head)
    return made, [cache.bank() for cache in caches]


def _calls(bank: Bank, most: int) -> list[list[tuple[int, int]]]:
    """Trees to be read at once, as rows of the bank and numbers of their units; not those of single tokens."""
    found: list[list[tuple[int, int]]] = []
    lines = longest = 0
    for at, each in enumerate(bank.rows):
        for unit, tree in enumerate(each.trees):
            count, width = tree.tokens.shape
            if count == 0:
                continue
            seen = bank.beginning + len(each.prompt) + tree.line.shape[1]
            lines, longest = lines + count, max(longest, seen)
            if not found or lines * width > most or lines * longest * bank.token_bytes > KEYS_BYTES:
                found.append([])
                lines, longest = count, seen
            found[-1].append((at, unit))
    return found


def _trees(bank: Bank, call: Sequence[tuple[int, int]]) -> list[Branches]:
    return [bank.rows[at].trees[unit] for at, unit in call]


def _branched(net: nn.Module, head: Head | None, bank: Bank, call: Sequence[tuple[int, int]]) -> mx.array:
    """The figures (M, 2) of all but the first tokens of these trees."""
    trees = _trees(bank, call)
    prompts = [(at, len(bank.rows[at].prompt)) for at, _ in call]
    first = np.cumsum([0, *(tree.tokens.size for tree in trees)])
    before = np.concatenate(
        [tree.before[tree.first_count :] + start for tree, start in zip(trees, first, strict=False)]
    )
    slots, which = np.unique(before, return_inverse=True)
    targets = np.concatenate([tree.targets[tree.first_count :] for tree in trees])
    offset = np.concatenate(
        [bank.beginning + length + tree.starts for tree, (_, length) in zip(trees, prompts, strict=True)]
    )
    shared = mx.array(offset), mx.array(table(trees, prompts, bank.beginning, bank.width, len(bank.rows)))
    layers, masks = iter(bank.layers), dict[int | None, mx.array]()
    with given(net, lambda: Paged(next(layers), *shared, masks)):
        tokens = mx.array(np.concatenate([tree.tokens for tree in trees]))
        return figures(net, tokens, mx.array(slots), which, mx.array(targets), head)


def table(trees: Sequence[Branches], prompts: Sequence[tuple[int, int]], beginning: int, width: int, rows: int) -> Ints:
    """Of each line of the trees where its prompt's keys lie, those before it and its own: (N, S); what pads it is not
    seen.

    prompts: of each tree the row of its prompt in a bank, and how many tokens that has behind the `beginning`. The
    bank has the beginning, then `rows` of a `width`, and the lines' own keys come behind it.
    """
    most = max(length + tree.line.shape[1] for tree, (_, length) in zip(trees, prompts, strict=True))
    made, start = [], beginning + rows * width
    for tree, (row, length) in zip(trees, prompts, strict=True):
        some = np.zeros((len(tree.tokens), beginning + most), dtype=np.int32)
        some[:, :beginning] = np.arange(beginning)
        behind = some[:, beginning:]
        behind[:, :length] = beginning + row * width + np.arange(length)
        behind[:, length : length + tree.line.shape[1]] = start + tree.line
        made.append(some)
        start += tree.tokens.size
    return np.concatenate(made)
