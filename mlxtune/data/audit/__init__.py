"""What is wrong with the rows before anything is trained on them. Knows the rows and the recipe's `data`, no model.

One file a family of checks. To add one: a function `Table -> Iterator[Finding]` and a line in `CHECKS`.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from mlxtune.data.audit.entries import Table, read
from mlxtune.data.audit.findings import PLACES, SEVERITIES, Audit, Finding, malformed
from mlxtune.data.audit.labels import ceiling, label_checks, label_counts
from mlxtune.data.audit.lengths import length_checks, length_stats
from mlxtune.data.audit.personal import personal_data
from mlxtune.data.audit.repeats import repeat_checks
from mlxtune.data.audit.stale import stale_facts
from mlxtune.data.audit.style import style_checks
from mlxtune.data.audit.tokens import Counting, token_checks, token_stats
from mlxtune.recipe import DataRecipe

__all__ = ["Audit", "Counting", "Finding", "Table", "audit", "examine", "read"]

CHECKS: tuple[Callable[[Table], Iterator[Finding]], ...] = (
    repeat_checks,
    label_checks,
    personal_data,
    length_checks,
    style_checks,
    stale_facts,
)


def audit(
    files: dict[str, Path],
    data: DataRecipe,
    label: str | None,
    *,
    fast: bool = False,
    counting: Counting | None = None,
    places: int = PLACES,
) -> Audit:
    """Checks the files of a data set, by split, or one file under any name; `label` as in `find_labels`.

    Malformed rows are findings, all of them in one pass; the other checks look at the good rows that `data.keep`
    keeps. `fast` leaves the search for near-duplicates out; `counting` adds what a tokenizer makes of the rows; a
    finding names at most `places`. Raises DataError for a file that cannot be read at all, RecipeError or InputError
    for a malformed template or pattern.
    """
    return examine(read(files, data, label, near=not fast, places=places), counting)


def examine(table: Table, counting: Counting | None = None) -> Audit:
    """The audit of rows that have been read."""
    entries, mistakes = table.entries, list(table.mistakes)
    findings = [finding for check in CHECKS for finding in check(table)]
    stats = length_stats(entries)
    if any(entry.label is not None for entry in entries):
        stats |= {"labels": label_counts(entries), "accuracy_ceiling": ceiling(entries)}
    if counting is not None:
        counted, refused = counting.count(entries)
        mistakes += refused
        findings += token_checks(counted, counting, table.places)
        stats["tokens"] = token_stats(counted, counting)
    findings = [*malformed(mistakes, table.places), *findings]
    findings.sort(key=lambda finding: SEVERITIES.index(finding.severity))
    counts = Counter(entry.split for entry in entries)
    return Audit(
        files=tuple({"split": name, "path": str(path), "rows": counts[name]} for name, path in table.files.items()),
        rows=len(entries),
        findings=tuple(findings),
        stats=stats,
    )
