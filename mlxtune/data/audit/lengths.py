"""How long prompts and answers are, and which are odd. Knows characters, not tokens."""

from collections.abc import Iterator, Sequence
from typing import Any

from mlxtune.data.audit.entries import Entry, Table, labelled
from mlxtune.data.audit.findings import Finding, about_rows

LONG, TIMES_MEDIAN = 1000, 10  # characters, and how many times the median
BINS = 16


def length_stats(entries: Sequence[Entry]) -> dict[str, Any]:
    """The spread of the prompts' and the answers' characters."""
    return {
        "prompt_characters": spread([len(entry.prompt) for entry in entries]),
        "answer_characters": spread([len(entry.answer) for entry in entries if entry.answer is not None]),
    }


def spread(lengths: Sequence[int]) -> dict[str, Any] | None:
    """Shortest, middle and longest, and how many there are in each step on the way; None without lengths.

    The steps are equally wide up to the length that 99 % do not exceed; the last one holds the longer ones too.
    """
    if not lengths:
        return None
    ordered = sorted(lengths)
    low, high = ordered[0], percentile(ordered, 99)
    width = max(1, -(-(high - low + 1) // BINS))
    counts = [0] * (1 + (high - low) // width)
    for length in ordered:
        counts[min((length - low) // width, len(counts) - 1)] += 1
    return {
        "min": low,
        "median": percentile(ordered, 50),
        "p95": percentile(ordered, 95),
        "max": ordered[-1],
        "histogram": [{"from": low + place * width, "rows": count} for place, count in enumerate(counts)],
    }


def percentile(ordered: Sequence[int], percent: int) -> int:
    """The length that so many percent of the ordered lengths do not exceed; 50: the middle, the lower one of two."""
    return ordered[max(0, -(-percent * len(ordered) // 100) - 1)]


def length_checks(table: Table) -> Iterator[Finding]:
    """Prompts and answers that are hardly there, or far longer than most."""
    entries = table.entries
    tiny = [(entry, "prompt") for entry in entries if len(entry.prompt.strip()) <= 1]
    answered = [(entry, entry.answer) for entry in entries if entry.answer is not None]
    if not labelled(entries):
        tiny += [(entry, "answer") for entry, answer in answered if len(answer.strip()) <= 1]
    if tiny:
        detail, advice = "empty, or one character", "fill them in or delete the rows"
        yield about_rows("length", "warning", tiny, detail, advice, places=table.places)
    for part, texts in (("prompt", [(entry, entry.prompt) for entry in entries]), ("answer", answered)):
        lengths = sorted(len(text) for _, text in texts)
        bound = max(LONG, TIMES_MEDIAN * percentile(lengths, 50)) if lengths else 0
        long = [(entry, f"{len(text):,} characters") for entry, text in texts if len(text) > bound]
        if long:
            detail = f"the {part} is more than {TIMES_MEDIAN} times as long as most"
            advice = "look at them; they may not fit into train.max_seq_length (--model M counts tokens)"
            yield about_rows("length", "info", long, detail, advice, places=table.places)
