"""Rows that ask the same or nearly: duplicates, near-duplicates, contradictions, and leaks between splits.

Knows prompts, answers and labels, not what they mean: two answers in other words differ.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator

from mlxtune.data.audit.entries import Entry, Table, by_question
from mlxtune.data.audit.findings import Finding, about_rows, quoted
from mlxtune.data.audit.labels import ceiling
from mlxtune.data.audit.near import near_prompts
from mlxtune.data.similar import Pair, jaccard, normalise, shingles

CLEARLY = 0.5  # answers that share fewer of their words and word pairs are clearly different
Noted = dict[int, tuple[Entry, str]]  # by place


def repeat_checks(table: Table) -> Iterator[Finding]:
    """Leaks, contradictions, duplicates and near-duplicates; the last three name rows of one split only."""
    entries = table.entries
    near_pairs = near_prompts(entries) if table.near else []
    contrary, same, free, near = _equal(entries)
    close: Noted = {}
    for entry, earlier, similarity in _pairs(entries, near_pairs):
        if entry.meaning != earlier.meaning:
            if entry.place not in contrary:
                close.setdefault(entry.place, (entry, _opposite(entry, earlier)))
        elif entry.split == earlier.split and entry.place not in same:
            near.setdefault(entry.place, (entry, f"like {earlier.row.where} ({similarity:.2f})"))
    yield from _leaks(table, near_pairs)
    equal = f"the same prompt as in another row, but another label: no model gets above {ceiling(entries) or 0:.1%}"
    right = "decide which label is right; correct the other"
    for kind, severity, noted, detail, advice in (
        ("contradiction", "warning", contrary, equal, right),
        ("contradiction", "warning", close, "nearly the same prompt as in another row, but another label", right),
        (
            "duplicate",
            "warning",
            same,
            "the same prompt and answer as an earlier row",
            "delete the copies (--fix does)",
        ),
        (
            "contradiction",
            "info",
            free,
            "the same prompt as an earlier row with a clearly different answer",
            "fine if both answers are right",
        ),
        (
            "near_duplicate",
            "info",
            near,
            "nearly the same as an earlier row",
            "keep them on one side of the split, as mlxtune does; delete those that add nothing",
        ),
    ):
        if noted:
            yield about_rows(kind, severity, list(noted.values()), detail, advice, places=table.places)


def _equal(entries: list[Entry]) -> tuple[Noted, Noted, Noted, Noted]:
    """Of rows with equal prompts those with another label, the same answer, a clearly other answer, a similar one."""
    contrary: Noted = {}
    same: Noted = {}
    free: Noted = {}
    near: Noted = {}
    for having in by_question(entries).values():
        if len(having) == 1:
            continue
        usual = _usual(having)
        first_with: dict[tuple[str, str], Entry] = {}
        first_in: dict[tuple[str, str | None], Entry] = {}
        for entry in having:
            if entry.meaning is not None and usual is not None and entry.meaning != usual.meaning:
                contrary[entry.place] = (entry, _opposite(entry, usual))
            twin = first_with.setdefault((entry.split, normalise(entry.answer or "")), entry)
            first = first_in.setdefault((entry.split, entry.meaning), entry)
            if twin is not entry:
                same[entry.place] = (entry, f"as {twin.row.where}")
            elif first is not entry and _clearly_different(entry, first):
                free[entry.place] = (entry, f"as {first.row.where}")
            elif first is not entry:
                near[entry.place] = (entry, f"as {first.row.where}, with nearly the same answer")
    return contrary, same, free, near


def _usual(having: list[Entry]) -> Entry | None:
    """The first row with the most frequent label; among equally frequent ones the label that comes first."""
    counts = Counter(entry.meaning for entry in having if entry.meaning is not None)
    most = counts.most_common(1)[0][0] if counts else None
    return next((entry for entry in having if entry.meaning == most), None) if most is not None else None


def _clearly_different(entry: Entry, other: Entry) -> bool:
    return jaccard(shingles(entry.answer or ""), shingles(other.answer or "")) < CLEARLY


def _opposite(entry: Entry, other: Entry) -> str:
    return f"{quoted(entry.label or '')}, but {other.row.where} says {quoted(other.label or '')}"


def _pairs(entries: list[Entry], near_pairs: Iterable[Pair]) -> Iterator[tuple[Entry, Entry, float]]:
    """A row, an earlier row with a nearly equal prompt in the same context, and their similarity."""
    having: dict[str, list[Entry]] = defaultdict(list)
    sources: dict[str, dict[tuple[str, str | None, str], Entry]] = defaultdict(dict)
    for entry in entries:
        having[entry.key].append(entry)
        sources[entry.key].setdefault((entry.context, entry.meaning, entry.split), entry)
    for each in near_pairs:
        keys = entries[each.first].key, entries[each.second].key
        for key, other in (keys, keys[::-1]):
            for entry in having[key]:
                found = [e for e in sources[other].values() if e.context == entry.context and e.place < entry.place]
                if found:
                    yield entry, min(found, key=lambda e: (e.meaning != entry.meaning, e.place)), each.similarity


def _leaks(table: Table, near_pairs: Iterable[Pair]) -> Iterator[Finding]:
    """Rows with the same or nearly the same prompt as a row of an earlier split."""
    entries = table.entries
    order = {split: place for place, split in enumerate(dict.fromkeys(entry.split for entry in entries))}
    if len(order) < 2:
        return
    near: dict[str, list[tuple[str, float]]] = defaultdict(list)
    for each in near_pairs:
        one, other = entries[each.first].key, entries[each.second].key
        near[one].append((other, each.similarity))
        near[other].append((one, each.similarity))
    first: dict[tuple[str, str], Entry] = {}  # in the earliest split that asks it
    for entry in entries:
        first.setdefault(entry.question, entry)
    equal: list[tuple[Entry, str]] = []
    close: list[tuple[Entry, str]] = []
    for entry in entries:
        source = first[entry.question]
        if order[source.split] < order[entry.split]:
            equal.append((entry, f"as {source.row.where}"))
            continue
        for key, similarity in near.get(entry.key, ()):
            like = first.get((entry.context, key))
            if like is not None and order[like.split] < order[entry.split] and like.meaning == entry.meaning:
                close.append((entry, f"like {like.row.where} ({similarity:.2f})"))
                break
    advice = "delete them from one side, or give mlxtune one file to split; scores on such rows mean nothing"
    for noted, detail in ((equal, "the same prompt as in another split"), (close, "nearly a prompt of another split")):
        if noted:
            yield about_rows("leak", "warning", noted, detail, advice, places=table.places)
