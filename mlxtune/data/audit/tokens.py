"""What a model's tokenizer makes of the rows: tokens, what is learned of them, what does not fit. Loads nothing."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mlxtune.data.audit.entries import Entry
from mlxtune.data.audit.findings import Finding, about_rows
from mlxtune.data.audit.lengths import spread
from mlxtune.data.render import Limit, Sample, render
from mlxtune.errors import DataError
from mlxtune.recipe import DataRecipe

CHUNK = 256  # rows rendered at once; one by one where one of them is refused
UNBOUNDED = Limit(2**31)  # rows of any length are counted
ADVICE = {
    "error": "training refuses them: raise it, or set data.too_long to drop or truncate",
    "drop": "training leaves them out, as data.too_long says",
    "truncate": "training cuts their prompts from the left, as data.too_long says",
}


@dataclass(frozen=True, slots=True)
class Counted:
    """One row: its tokens, how many of them are learned, and the tokens of its longest sample."""

    entry: Entry
    tokens: int
    trained: int
    longest: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Counting:
    """How rows are counted: `tokenizer` and `ends` as in `render`, `model` for people, and what training does."""

    model: str
    tokenizer: Any
    ends: set[int]
    data: DataRecipe
    limit: Limit
    on_row: Callable[[int, int], None] = lambda done, total: None

    def count(self, entries: Sequence[Entry]) -> tuple[list[Counted], list[DataError]]:
        """The tokens of the rows, and the rows that this tokenizer cannot render exactly."""
        counted: list[Counted] = []
        refused: list[DataError] = []
        for start in range(0, len(entries), CHUNK):
            chunk = entries[start : start + CHUNK]
            try:
                counted += self._rendered(chunk)
            except DataError:
                for entry in chunk:
                    try:
                        counted += self._rendered([entry])
                    except DataError as error:
                        refused.append(error)
            self.on_row(start + len(chunk), len(entries))
        return counted, refused

    def _rendered(self, entries: Sequence[Entry]) -> list[Counted]:
        data = replace(self.data, too_long="drop")
        found = render([(entry.row, entry.example) for entry in entries], self.tokenizer, self.ends, data, UNBOUNDED)
        samples: dict[str, list[Sample]] = defaultdict(list)
        for sample in found.samples:
            samples[sample.where].append(sample)
        return [_counted(entry, samples[entry.row.where]) for entry in entries if samples[entry.row.where]]


def _counted(entry: Entry, samples: Sequence[Sample]) -> Counted:
    lengths = [len(sample.tokens) for sample in samples]
    return Counted(entry, sum(lengths), sum(sample.trained_count for sample in samples), max(lengths))


def token_checks(counted: Sequence[Counted], counting: Counting, places: int) -> list[Finding]:
    """Rows that do not fit into train.max_seq_length."""
    limit = counting.limit
    long = [(each.entry, f"{each.longest:,} tokens") for each in counted if each.longest > limit.tokens]
    if not long:
        return []
    longest = max(each.longest for each in counted)
    detail = f"more tokens than {limit.name} {limit.tokens:,} ({len(long) / len(counted):.1%}); the longest {longest:,}"
    advice = ADVICE[counting.data.too_long]
    return [about_rows("length", "warning", long, detail, advice, places=places)]


def token_stats(counted: Sequence[Counted], counting: Counting) -> dict[str, Any]:
    """The spread of the tokens, how many rows do not fit, and what one epoch over the rows of train costs.

    A single file is counted whole: what a run holds out of it for validation and test is learned by nobody.
    """
    bound = counting.limit.tokens
    learned = [each for each in counted if each.entry.split == "train"] or counted
    fitting = [each for each in learned if each.longest <= bound]
    return {
        "model": counting.model,
        "rows": len(counted),
        "max_seq_length": bound,
        "too_long": sum(each.longest > bound for each in counted),
        "row": spread([each.tokens for each in counted]),
        "trained": spread([each.trained for each in counted]),
        "epoch": {
            "rows": len(fitting),
            "tokens": sum(each.tokens for each in fitting),
            "trained": sum(each.trained for each in fitting),
        },
    }
