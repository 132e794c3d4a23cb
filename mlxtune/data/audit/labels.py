"""Labels: how many rows each has, spellings that should be one, classes too small or missing. Knows no meaning."""

import difflib
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

from mlxtune.data.audit.entries import Entry, Table, by_question
from mlxtune.data.audit.findings import Finding, about_rows, quoted
from mlxtune.data.labels import label_span, plain

SMALL_CLASS = 5  # rows
IMBALANCE = 10  # times
MOST_LABELS = 250  # that are compared with each other
ALIKE = 0.9  # ratio of two labels' equal letters
LISTED = 5  # labels that a sentence names
HELD_OUT = ("valid", "test")


def label_counts(entries: Sequence[Entry]) -> dict[str, int]:
    """Rows of each label, the most frequent first."""
    counts = Counter(entry.label for entry in entries if entry.label is not None)
    return dict(sorted(counts.items(), key=lambda each: (-each[1], each[0])))


def ceiling(entries: Sequence[Entry]) -> float | None:
    """The best accuracy that any model can reach: of equal prompts only the most frequent label can be right."""
    right = total = 0
    for having in by_question(entries).values():
        counts = Counter(entry.meaning for entry in having if entry.meaning is not None)
        right += max(counts.values(), default=0)
        total += counts.total()
    return right / total if total else None


def spelling(entry: Entry, pattern: str | None) -> str | None:
    """The label as the answer writes it, with the white space that the pattern or a one-line answer gives it."""
    span = label_span(entry.answer or "", pattern) if entry.label is not None else None
    return (entry.answer or "")[slice(*span)] if span is not None else None


def twins(entries: Sequence[Entry], pattern: str | None) -> dict[str, str]:
    """Each spelling of a label that has a more frequent one with the same letters, and that one."""
    counts = Counter(each for entry in entries if (each := spelling(entry, pattern)) is not None)
    usual: dict[str, str] = {}
    for each, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        usual.setdefault(plain(each), each)
    return {each: usual[plain(each)] for each in counts if usual[plain(each)] != each}


def label_checks(table: Table) -> Iterator[Finding]:
    """Everything about labels, where answers give labels."""
    entries = table.entries
    counts = label_counts(entries)
    if not counts:
        if table.pattern is not None and entries:
            yield _about(table, entries, f"{table.pattern!r} finds no label in any answer", "correct the pattern")
        return
    missing = [entry for entry in entries if entry.label is None]
    if missing:
        yield _about(table, missing, "no label in the answer", "correct the answer, or the pattern")
    yield from _spellings(table)
    yield from _absent(table)
    yield from _sizes(table)


def _about(table: Table, entries: Sequence[Entry], detail: str, advice: str, *, severity: str = "warning") -> Finding:
    noted = [(entry, "") for entry in entries]
    return about_rows("label", severity, noted, detail, advice, places=table.places)


def _spellings(table: Table) -> Iterator[Finding]:
    """Labels that look like a more frequent one."""
    having: dict[str, list[Entry]] = defaultdict(list)
    for entry in table.entries:
        written = spelling(entry, table.pattern)
        if written is not None:
            having[written].append(entry)
    same = twins(table.entries, table.pattern)
    for name, twin in same.items():
        advice = "write both the same if they mean the same (--fix does)"
        yield _about(table, having[name], f"the label {quoted(name)} looks like {quoted(twin)}", advice)
    others = sorted((name for name in having if name not in same), key=lambda name: (-len(having[name]), name))
    for name, twin in _slips(others):
        detail = f"the label {quoted(name)} looks like {quoted(twin)}"
        yield _about(table, having[name], detail, "write both the same if they mean the same")


def _slips(names: list[str]) -> Iterator[tuple[str, str]]:
    """Each label with a more frequent one from which a slip of the pen tells it apart."""
    if len(names) > MOST_LABELS:  # free text rather than labels
        return
    for place, name in enumerate(names):
        for earlier in names[:place]:
            a, b = plain(name), plain(earlier)
            # labels that differ in a number, such as level_1 and level_2, differ on purpose
            numbered = re.sub(r"\d", "", a) == re.sub(r"\d", "", b)
            matcher = difflib.SequenceMatcher(None, a, b)
            if not numbered and matcher.real_quick_ratio() >= ALIKE and matcher.ratio() >= ALIKE:
                yield name, earlier
                break


def _absent(table: Table) -> Iterator[Finding]:
    """Labels that are asked for in a held-out split and not learned, and the reverse."""
    having: dict[str, dict[str, list[Entry]]] = defaultdict(lambda: defaultdict(list))
    for entry in table.entries:
        if entry.label is not None and entry.meaning is not None:
            having[entry.split][entry.meaning].append(entry)
    train = having.get("train")
    for split in HELD_OUT if train else ():
        held_out = having.get(split)
        if not held_out or not train:
            continue
        strange = [rows for meaning, rows in held_out.items() if meaning not in train]
        if strange:
            detail = f"labels of {split} that train does not have: {_listed(strange)}"
            advice = "add rows with them to train: they are never learned, and count as mistakes"
            yield _about(table, [entry for rows in strange for entry in rows], detail, advice)
        unasked = [rows for meaning, rows in train.items() if meaning not in held_out]
        if unasked:
            detail = f"labels of train that {split} does not have: {_listed(unasked)}"
            advice = f"add rows with them to {split}: its scores say nothing about them"
            yield _about(table, [entry for rows in unasked for entry in rows], detail, advice, severity="info")


def _sizes(table: Table) -> Iterator[Finding]:
    """Classes too small to learn, and far smaller than others; counted in the rows that are learned from."""
    splits = {entry.split for entry in table.entries}
    learned = [entry for entry in table.entries if entry.split == "train" or "train" not in splits]
    having: dict[str, list[Entry]] = defaultdict(list)
    for entry in learned:
        if entry.label is not None:
            having[entry.label].append(entry)
    counts = label_counts(learned)
    small = [having[name] for name, count in counts.items() if count < SMALL_CLASS]
    if small:
        detail = f"labels with fewer than {SMALL_CLASS} rows: {_listed(small)}"
        advice = "add examples, or merge them with other labels"
        yield _about(table, [entry for rows in small for entry in rows], detail, advice)
    if not counts:
        return
    most, least = next(iter(counts)), list(counts)[-1]
    if counts[most] > IMBALANCE * counts[least]:
        times = round(counts[most] / counts[least])
        detail = f"{quoted(most)} has {counts[most]:,} rows, {quoted(least)} {counts[least]:,}: {times:,} times as many"
        advice = "add examples of the rare labels; read the scores label by label"
        yield _about(table, having[least], detail, advice)


def _listed(classes: Sequence[Sequence[Entry]]) -> str:
    """A few labels with their rows, in a sentence."""
    named = ", ".join(f"{quoted(rows[0].label or '')} ({len(rows)})" for rows in classes[:LISTED])
    return named + (f" and {len(classes) - LISTED} more" if len(classes) > LISTED else "")
