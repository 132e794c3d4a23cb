"""How likely a network finds given continuations, and which of their tokens it would have chosen itself.

Knows networks, samples and tokens; knows nothing of labels, questions or texts.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from mlxtune import beginnings, machine
from mlxtune.attention import lean
from mlxtune.caches import given, measured
from mlxtune.data.batches import in_order, make_batch
from mlxtune.data.render import Sample
from mlxtune.evaluation import paged
from mlxtune.evaluation.figures import row_figures
from mlxtune.head import Head, find
from mlxtune.likelihood import LOGITS_BYTES, in_parts, wanted_at


@dataclass(frozen=True, slots=True)
class Read:
    """Of N continuations the summed negative log-likelihood in nats, float64 (N,), and the tokens that the network
    ranks first where they stand, (N,)."""

    nats: npt.NDArray[np.float64]
    right: npt.NDArray[np.int64]


def measure(
    net: nn.Module, samples: Sequence[Sample], batch_size: int = 8, on_row: Callable[[int], None] = lambda done: None
) -> Read:
    """The supervised tokens of each sample, (N,) in the order of `samples`."""
    both = np.zeros((len(samples), 2))
    done = 0
    with measured(net), lean(*machine.attention_blocks(machine.device_kind())):
        head = find(net)
        most_tokens = None if head is not None else LOGITS_BYTES // (4 * _vocabulary(net))
        for rows in in_order([len(sample.tokens) for sample in samples], batch_size, most_tokens):
            parts = in_parts(make_batch(samples, rows), lambda tokens, wanted: row_figures(net, tokens, wanted, head))
            both[rows] = np.concatenate([np.array(part) for part in parts])
            done += len(rows)
            on_row(done)
    return Read(both[:, 0], both[:, 1].astype(np.int64))


def nats(
    net: nn.Module,
    prompts: Sequence[Sequence[int]],
    choices: Sequence[Sequence[Sequence[int]]],
    batch_size: int = 32,
    on_row: Callable[[int], None] = lambda done: None,
) -> list[npt.NDArray[np.float64]]:
    """-log P(choice | prompt) in nats, summed over its tokens, of each row's choices (C,); errors as for `read`."""
    return [each.nats for each in read(net, prompts, choices, batch_size, on_row)]


def read(
    net: nn.Module,
    prompts: Sequence[Sequence[int]],
    choices: Sequence[Sequence[Sequence[int]]],
    batch_size: int = 32,
    on_row: Callable[[int], None] = lambda done: None,
) -> list[Read]:
    """Each row's choices (C,), which are tokens that continue its prompt; `batch_size` prompts and choices at a time.

    A prompt is computed once for all of its choices, what many prompts begin with once for all of them, and what many
    choices of a row begin with once for these (see `paged`). Where a network shows on random tokens that this changes
    something, as one with a recurrent state does, choices are read whole behind copies of their prompt's cache; where
    that does too, every choice with its prompt.
    Raises ValueError for an empty prompt or choice, which say nothing.
    """
    if any(not prompt for prompt in prompts) or any(not choice for some in choices for choice in some):
        raise ValueError("a prompt or a choice has no tokens")
    longest = max((len(prompt) for prompt, some in zip(prompts, choices, strict=True) if some), default=1) - 1
    with measured(net), lean(*machine.attention_blocks(machine.device_kind())):
        if paged.supported(net, longest + 1):
            return [
                Read(each[:, 0], each[:, 1].astype(np.int64))
                for each in paged.read(net, prompts, choices, batch_size, on_row)
            ]
        if longest == 0 or not beginnings.copies_are_exact(net, longest):
            return _read_whole(net, prompts, choices, batch_size, on_row)
        return _read_behind(net, prompts, choices, batch_size, on_row)


def _read_whole(
    net: nn.Module,
    prompts: Sequence[Sequence[int]],
    choices: Sequence[Sequence[Sequence[int]]],
    batch_size: int,
    on_row: Callable[[int], None],
) -> list[Read]:
    """As `read`, each choice behind a prompt of its own."""
    samples = [
        Sample("", [*prompt, *choice], [False] * len(prompt) + [True] * len(choice), len(prompt), None)
        for prompt, some in zip(prompts, choices, strict=True)
        for choice in some
    ]
    share = len(prompts) / max(1, len(samples))
    found = measure(net, samples, batch_size, lambda done: on_row(int(done * share)))
    bounds = np.cumsum([len(some) for some in choices])[:-1]
    return [Read(*each) for each in zip(np.split(found.nats, bounds), np.split(found.right, bounds), strict=True)]


def _read_behind(
    net: nn.Module,
    prompts: Sequence[Sequence[int]],
    choices: Sequence[Sequence[Sequence[int]]],
    batch_size: int,
    on_row: Callable[[int], None],
) -> list[Read]:
    """As `read`, all choices behind copies of their prompt's cache; the prompt's last token stands before each."""
    head = find(net)
    lengths = beginnings.shared(prompts)
    begun = {
        start: beginnings.computed(net, start)
        for start in {tuple(p[:n]) for p, n in zip(prompts, lengths, strict=True)}
    }
    both = [np.zeros((len(some), 2)) for some in choices]
    done = 0
    for rows in _together(prompts, choices, batch_size):
        caches = _merged([begun[tuple(prompts[row][: lengths[row]])] for row in rows])
        _feed(net, [prompts[row][lengths[row] : -1] for row in rows], caches)
        lines = [(place, choice) for place, row in enumerate(rows) for choice in range(len(choices[row]))]
        fed = [[prompts[rows[place]][-1], *choices[rows[place]][choice]] for place, choice in lines]
        for some in in_order([len(each) for each in fed], batch_size):
            copies = copy.deepcopy(caches)
            for cache in copies:
                cache.filter(mx.array([lines[line][0] for line in some]))
            for line, figures in zip(some, _behind(net, head, [fed[line] for line in some], copies), strict=True):
                place, choice = lines[line]
                both[rows[place]][choice] = figures
        done += len(rows)
        on_row(done)
    return [Read(each[:, 0], each[:, 1].astype(np.int64)) for each in both]


def _together(
    prompts: Sequence[Sequence[int]], choices: Sequence[Sequence[Sequence[int]]], batch_size: int
) -> list[list[int]]:
    """Rows to be read at once: prompts of like length, all of whose choices are `batch_size` lines or one row's."""
    found: list[list[int]] = []
    lines = 0
    for row in sorted(range(len(prompts)), key=lambda row: len(prompts[row])):
        lines += max(1, len(choices[row]))
        if not found or lines > batch_size:
            found.append([])
            lines = max(1, len(choices[row]))
        found[-1].append(row)
    return found


def _merged(rows: list[list[Any]]) -> list[Any]:
    """Caches of single rows as caches of all of them."""
    return [layer[0].merge(list(layer)) for layer in zip(*rows, strict=True)]


def _feed(net: nn.Module, rows: Sequence[Sequence[int]], caches: list[Any]) -> None:
    """Has `net` read rows of unequal length behind what is in `caches`, a line each."""
    counts = [len(row) for row in rows]
    widest = max(counts)
    if widest == 0:
        return
    if min(counts) < widest:
        for cache in caches:
            cache.prepare(lengths=counts, right_padding=[widest - count for count in counts])
    beginnings.feed(net, np.stack([np.pad(row, (0, widest - len(row))) for row in map(_array, rows)]), caches)
    if min(counts) < widest:
        for cache in caches:
            cache.finalize()


def _array(tokens: Sequence[int]) -> npt.NDArray[np.int32]:
    return np.array(tokens, dtype=np.int32)


def _behind(
    net: nn.Module, head: Head | None, lines: Sequence[list[int]], caches: list[Any]
) -> npt.NDArray[np.float64]:
    """Nats and first-ranked tokens (B, 2) of all but the first token of each line, behind `caches`."""
    width = max(map(len, lines))
    tokens = np.stack([np.pad(line, (0, width - len(line))) for line in map(_array, lines)])
    trained = np.arange(width)[None] < np.array([len(line) for line in lines])[:, None]
    given_caches = iter(caches)
    with given(net, lambda: next(given_caches)):
        return np.array(row_figures(net, mx.array(tokens), mx.array(wanted_at(trained)), head), dtype=np.float64)


def _vocabulary(net: nn.Module) -> int:
    return int(net(mx.zeros((1, 1), dtype=mx.int32)).shape[-1])  # the shape is known without computing
