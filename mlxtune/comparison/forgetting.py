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
import numpy as np

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


def measure(before: Before, net: nn.Module, on_row: OnRow = lambda done: None) -> dict[str, Any]:
    """How the tuned `net` differs from the base: `tokens`, `base_loss`, `tuned_loss`, `kl` and `kl_error`.

    Losses in nats per token, weighted by tokens; `kl` in nats per kept position. Its standard error takes samples as
    independent: sqrt(R / (R - 1) · sum over samples of (n · (kl of the sample - kl))²) / N, as that of a ratio of two
    sums; None for a single sample.
    """
    nats = likelihood.measure(net, before.samples)
    tokens = sum(sample.trained_count for sample in before.samples)
    each = np.zeros(len(before.kept))
    for done, (reference, _) in enumerate(before.kept, start=1):
        each[done - 1] = reference.kl(net)
        on_row(done)
    counts = np.array([count for _, count in before.kept], dtype=np.float64)
    kl = float((each * counts).sum() / counts.sum())
    off, rows = counts * (each - kl), len(counts)
    error = math.sqrt(rows / (rows - 1) * float((off**2).sum())) / float(counts.sum()) if rows > 1 else None
    return {
        "tokens": tokens,
        "base_loss": sum(before.nats) / tokens,
        "tuned_loss": sum(nats) / tokens,
        "kl": kl,
        "kl_error": error,
    }
