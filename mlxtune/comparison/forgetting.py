"""What tuning made a model forget: its loss on a text, and how far its predictions moved there. Knows networks.

Base and tuned are measured one after the other, so that only one of them is in memory. Of what the base predicts, the
logits of some evenly spread positions are kept meanwhile. KL(base ‖ tuned) is that of `metrics/divergence`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxtune import fidelity, likelihood
from mlxtune.data import files, load
from mlxtune.data.files import EMBEDDED
from mlxtune.data.render import Sample
from mlxtune.errors import DataError
from mlxtune.metrics.divergence import REFERENCE_BYTES, Reference
from mlxtune.model import LanguageModel
from mlxtune.quant import own_text
from mlxtune.recipe import DataRecipe

OWN_TEXT = "own text"
OWN_ROWS, OWN_LENGTH = 32, 128

OnRow = Callable[[int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """A piece of the anchor: its scored tokens, the summed nats that base and tuned model give them, and mean KL.

    `kl` is the mean over `positions` of them, in nats.
    """

    tokens: int
    base_nats: float
    tuned_nats: float
    kl: float
    positions: int


@dataclass(frozen=True, slots=True)
class Before:
    """What the base makes of the samples: summed nats of each (N,), and what it predicts at some of their positions."""

    samples: list[Sample]
    nats: list[float]
    kept: list[tuple[Reference, int]]  # of each sample, with the number of positions


def anchor_samples(lm: LanguageModel, anchor: str | None, data: str | None, seed: int) -> tuple[str, list[Sample]]:
    """The anchor's name and its text for `lm`, in windows.

    Without an `anchor` it is the embedded text; where `data`, what the model was tuned on, is that text itself, it is
    one that the base `lm` writes: what it would say of itself. Raises DataError for a file without text.
    """
    if anchor is None and _is_embedded(data):
        start = lm.tokenizer.bos_token_id if lm.tokenizer.bos_token_id is not None else lm.tokenizer.eos_token_id
        length = min(OWN_LENGTH, lm.context_length or OWN_LENGTH)
        return OWN_TEXT, own_text.write(lm.net, OWN_ROWS, length, int(start or 0), seed)
    name = anchor if anchor is not None else fidelity.EMBEDDED
    return name, fidelity.read_text(lm, name)


def check_anchor(name: str) -> None:
    """Refuses an anchor that cannot be read or has no text, before a model is there to read it. Raises DataError."""
    path = files.resolve(name)
    if path.suffix in (".txt", ".md"):
        load.anchor_text(str(path))
    else:
        load.read_examples(path, DataRecipe())


def _is_embedded(data: str | None) -> bool:
    if data is None:
        return False
    try:
        return files.resolve(data).resolve() == EMBEDDED.resolve()
    except DataError:
        return False


def remember(
    net: nn.Module, samples: Sequence[Sample], on_row: OnRow = lambda done: None, most_bytes: int = REFERENCE_BYTES
) -> Before:
    """Measures the base on samples of two tokens and more. Raises DataError without one."""
    usable = [sample for sample in samples if len(sample.tokens) > 1]
    if not usable:
        raise DataError("the anchor has no two tokens", hint="give some pages of text as compare.anchor")
    vocabulary = net(mx.zeros((1, 1), dtype=mx.int32)).shape[-1]  # the shape is known without computing
    share = max(most_bytes // len(usable), 4 * vocabulary)
    kept = []
    for done, sample in enumerate(usable, start=1):
        kept.append((Reference(net, [sample], share), _kept_positions(len(sample.tokens), vocabulary, share)))
        on_row(done)
    return Before(usable, likelihood.measure(net, usable), kept)


def _kept_positions(tokens: int, vocabulary: int, most_bytes: int) -> int:
    """How many of a single sample's predicted positions a `Reference` keeps: every so many of them."""
    every = math.ceil((tokens - 1) * 4 * vocabulary / most_bytes)
    return len(range(0, tokens - 1, every))


def measure(before: Before, net: nn.Module, on_row: OnRow = lambda done: None) -> list[Window]:
    """How the tuned `net` differs from the base on each sample."""
    nats = likelihood.measure(net, before.samples)
    found = []
    for place, (reference, positions) in enumerate(before.kept):
        found.append(
            Window(
                tokens=before.samples[place].trained_count,
                base_nats=before.nats[place],
                tuned_nats=nats[place],
                kl=reference.kl(net),
                positions=positions,
            )
        )
        on_row(place + 1)
    return found


def summed_up(windows: Sequence[Window]) -> dict[str, Any]:
    """`tokens`, `base_loss`, `tuned_loss`, `kl` and `kl_error` of all windows together.

    Losses in nats per token, weighted by tokens; `kl` in nats per kept position. Its standard error takes windows as
    independent: sqrt(R / (R - 1) · sum over windows of (n · (kl of the window - kl))²) / N, as that of a ratio of two
    sums; None for a single window. Raises DataError for no window, and for one without a token or a position.
    """
    if not windows or any(each.tokens < 1 or each.positions < 1 for each in windows):
        raise DataError("a window of the anchor has no token", hint="give some pages of text as compare.anchor")
    tokens, positions = sum(each.tokens for each in windows), sum(each.positions for each in windows)
    kl = sum(each.kl * each.positions for each in windows) / positions
    off, rows = [each.positions * (each.kl - kl) for each in windows], len(windows)
    error = math.sqrt(rows / (rows - 1) * sum(each * each for each in off)) / positions if rows > 1 else None
    return {
        "tokens": tokens,
        "base_loss": sum(each.base_nats for each in windows) / tokens,
        "tuned_loss": sum(each.tuned_nats for each in windows) / tokens,
        "kl": kl,
        "kl_error": error,
    }
