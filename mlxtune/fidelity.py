"""What a smaller copy of a model lost: it and the source read the same text. Knows folders and text, not methods."""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlxtune import model
from mlxtune.convert import convert
from mlxtune.data import files, load
from mlxtune.data.files import Row
from mlxtune.data.formats import Chat, Completion, Example, Text
from mlxtune.data.render import Limit, Sample, render
from mlxtune.metrics import divergence
from mlxtune.metrics.divergence import Divergence
from mlxtune.model import LanguageModel
from mlxtune.precision import bits_per_weight
from mlxtune.recipe import DataRecipe, QuantizeRecipe
from mlxtune.rundir import size_of
from mlxtune.tokenizer import inner

WINDOW = 256  # tokens that are read together
MOST_WINDOWS = 64
EMBEDDED = "tickets"
OnProgress = Callable[[str, int, int], None]  # what is done, how much of it, of how much


def ignore(what: str, done: int, total: int) -> None:
    """An `OnProgress` that does nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fidelity:
    """A copy's size in bytes, its bits per weight, scales included, and how far its predictions are off."""

    name: str
    bytes: int
    bits_per_weight: float
    divergence: Divergence

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def read_text(lm: LanguageModel, name: str = EMBEDDED) -> list[Sample]:
    """The text of a file for `lm`, in windows: a plain text (.txt, .md), or what is said in each row of examples.

    Of many windows, `MOST_WINDOWS` that lie evenly over the file. Raises DataError where there is no text.
    """
    path = files.resolve(name)
    rows: list[tuple[Row, Example]]
    if path.suffix in (".txt", ".md"):
        rows = [(Row(name, 1, {}), Text(load.anchor_text(str(path))))]
    else:
        rows = [(row, Text(said(example))) for row, example in load.read_examples(path, DataRecipe())]
    limit = Limit.of(WINDOW, lm.context_length)
    pieces = DataRecipe(too_long="truncate")
    made = render(rows, inner(lm.tokenizer), lm.tokenizer.eos_token_ids, pieces, limit).samples
    step = max(1.0, len(made) / MOST_WINDOWS)
    return [made[int(number * step)] for number in range(min(len(made), MOST_WINDOWS))]


def said(example: Example) -> str:
    """The texts of an example, one a line."""
    if isinstance(example, Chat):
        return "\n".join(message["content"] for message in example.messages if message.get("content"))
    if isinstance(example, Completion):
        return f"{example.prompt}\n{example.completion}"
    return example.text


def compare(
    source: LanguageModel, copy: Path, samples: Sequence[Sample], name: str, on_progress: OnProgress = ignore
) -> Fidelity:
    """What the model in the folder `copy` lost of `source`, on `samples`."""
    stored, _ = model.outline(copy)
    other = model.load(copy)
    found = divergence.measure(
        source.net, other.net, samples, on_row=lambda done: on_progress(f"read by {name}", done, len(samples))
    )
    return Fidelity(
        name=name,
        bytes=sum(size_of(file) for file in model.weight_files(copy)),
        bits_per_weight=bits_per_weight(stored),
        divergence=found,
    )


def sweep(
    source: Path,
    choices: Sequence[QuantizeRecipe],
    name: str = EMBEDDED,
    on_progress: OnProgress = ignore,
    seen: Sequence[Sample] = (),
) -> list[Fidelity]:
    """What `source` loses by each of the ways to quantize it, on the text `name`. Copies are gone afterwards.

    `seen` are rows for methods that look at what goes into the layers.
    """
    lm = model.load(source)
    samples = read_text(lm, name)
    found = []
    for number, choice in enumerate(choices):
        on_progress("quantized", number, len(choices))
        with tempfile.TemporaryDirectory(prefix="mlxtune-sweep-") as scratch:
            convert(source, Path(scratch) / "copy", quantize=choice, samples=seen)
            found.append(compare(lm, Path(scratch) / "copy", samples, title(choice), on_progress))
    return found


def title(choice: QuantizeRecipe) -> str:
    """`4 bits`, or the mode where it is not affine."""
    return f"{choice.bits} bits" if choice.mode == "affine" else choice.mode
