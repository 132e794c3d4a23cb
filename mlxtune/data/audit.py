"""What is wrong with the rows before anything is trained on them. Knows the rows and the recipe's `data`, no model.

To add a check: a function `list[_Entry] -> Iterator[Finding]` and a line in `CHECKS`.
"""

import difflib
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mlxtune.data import pii
from mlxtune.data.files import Row, scan_rows
from mlxtune.data.formats import Chat, Example, answer_text, kept, last_learned, prompt_text, reader
from mlxtune.data.labels import find_labels
from mlxtune.data.similar import near_pairs, normalise
from mlxtune.errors import DataError
from mlxtune.recipe import DataRecipe

SEVERITIES = ("error", "warning", "info")
PLACES = 20  # how many places a finding names
REASONS = 10  # how many kinds of malformed rows are told apart
SMALL_CLASS = 5  # rows
IMBALANCE = 10  # times
MOST_LABELS = 200  # that are compared with each other
LABEL_CHARACTERS = 40  # shown of a label
LONG, TIMES_MEDIAN = 1000, 10  # characters, and how many times the median


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One kind of mistake: how many rows have it, where the first 20 are (`file:line`), and what to do.

    `notes` says something about each of these places, where there is something to say; `entity` is the kind of
    personal data that a `pii` finding is about.
    """

    kind: str
    severity: str
    count: int
    where: tuple[str, ...]
    detail: str
    advice: str
    notes: tuple[str, ...] = ()
    entity: str | None = None

    def to_dict(self) -> dict[str, Any]:
        value = {**asdict(self), "where": list(self.where), "notes": list(self.notes)}
        return {key: each for key, each in value.items() if key not in ("notes", "entity") or each}


@dataclass(frozen=True, kw_only=True, slots=True)
class Audit:
    """The findings, the most severe first, and figures of the rows. `files`: split, path and good rows of each."""

    files: tuple[dict[str, Any], ...]
    rows: int
    findings: tuple[Finding, ...]
    stats: dict[str, Any]

    def has(self, severity: str) -> bool:
        return any(finding.severity == severity for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        findings = [finding.to_dict() for finding in self.findings]
        return {"files": list(self.files), "rows": self.rows, "findings": findings, "stats": self.stats}


@dataclass(frozen=True, slots=True)
class _Entry:
    """A good row with what the checks compare.

    `place` counts all good rows; `key` is the normalised prompt, or the answer of a row that asks nothing;
    `answer_key` is the label, or the normalised answer.
    """

    place: int
    split: str
    row: Row
    example: Example
    prompt: str
    answer: str | None
    key: str
    label: str | None
    answer_key: str


def audit(files: dict[str, Path], data: DataRecipe, label: str | None) -> Audit:
    """Checks the files of a data set, by split, or one file under any name; `label` as in `find_labels`.

    Malformed rows are findings, all of them in one pass; the other checks look at the good rows that `data.keep`
    keeps. Raises DataError for a file that cannot be read at all, RecipeError or InputError for a malformed template or
    pattern.
    """
    read: list[tuple[str, Row, Example]] = []
    mistakes: list[DataError] = []
    for name, path in files.items():
        good, bad = _read(path, data)
        read += [(name, row, example) for row, example in good]
        mistakes += bad
    answers = [answer_text(example) for _, _, example in read]
    labels = find_labels(answers, label) or [None] * len(read)
    entries = [
        _entry(place, *each, answer, found)
        for place, (each, answer, found) in enumerate(zip(read, answers, labels, strict=True))
    ]
    findings = [
        *_malformed(mistakes),
        *_unlabelled(entries, label),
        *(finding for check in CHECKS for finding in check(entries)),
    ]
    findings.sort(key=lambda finding: SEVERITIES.index(finding.severity))
    counts = Counter(entry.split for entry in entries)
    return Audit(
        files=tuple({"split": name, "path": str(path), "rows": counts[name]} for name, path in files.items()),
        rows=len(entries),
        findings=tuple(findings),
        stats=_stats(entries),
    )


def _read(path: Path, data: DataRecipe) -> tuple[list[tuple[Row, Example]], list[DataError]]:
    """The good rows of a file that `data.keep` keeps, and what is wrong with the others."""
    rows, mistakes = scan_rows(path)
    read = reader(rows, data)
    good, left_out = [], 0
    for row in rows:
        try:
            if kept(row, data):
                good.append((row, read(row)))
            else:
                left_out += 1
        except DataError as error:
            mistakes.append(error)
    if not good and not mistakes:
        what = "has no row that data.keep keeps" if left_out else "has no rows"
        mistakes.append(DataError(what, where=path, hint="check data.keep" if left_out else "write one row a line"))
    return good, mistakes


def _entry(place: int, split: str, row: Row, example: Example, answer: str | None, label: str | None) -> _Entry:
    prompt = prompt_text(example)
    answer_key = label if label is not None else normalise(answer or "")
    key = normalise(prompt.strip() or answer or "")
    return _Entry(place, split, row, example, prompt, answer, key, label, answer_key)


def _stats(entries: list[_Entry]) -> dict[str, Any]:
    found: dict[str, Any] = {
        "prompt_characters": _spread([len(entry.prompt) for entry in entries]),
        "answer_characters": _spread([len(entry.answer) for entry in entries if entry.answer is not None]),
    }
    labels = _label_counts(entries)
    return {**found, "labels": labels} if labels else found


def _spread(lengths: list[int]) -> dict[str, int] | None:
    if not lengths:
        return None
    return {"min": min(lengths), "median": statistics.median_low(lengths), "max": max(lengths)}


def _label_counts(entries: list[_Entry]) -> dict[str, int]:
    """Rows of each label, the most frequent first."""
    counts = Counter(entry.label for entry in entries if entry.label is not None)
    return dict(sorted(counts.items(), key=lambda each: (-each[1], each[0])))


def _finding(kind: str, severity: str, places: Sequence[tuple[_Entry, str]], detail: str, advice: str) -> Finding:
    """A finding about rows, each with its note."""
    first = sorted(places, key=lambda each: each[0].place)[:PLACES]
    return Finding(
        kind=kind,
        severity=severity,
        count=len(places),
        where=tuple(entry.row.where for entry, _ in first),
        notes=tuple(note for _, note in first) if any(note for _, note in first) else (),
        detail=detail,
        advice=advice,
    )


def _malformed(mistakes: list[DataError]) -> Iterator[Finding]:
    reasons: dict[str, list[DataError]] = defaultdict(list)
    for mistake in mistakes:
        reason = re.sub(r" at column \d+", "", mistake.what)
        reasons[reason if reason in reasons or len(reasons) < REASONS else "for other reasons"].append(mistake)
    for reason, having in sorted(reasons.items(), key=lambda each: -len(each[1])):
        yield Finding(
            kind="malformed",
            severity="error",
            count=len(having),
            where=tuple(str(mistake.where) for mistake in having[:PLACES]),
            detail=reason,
            advice=(having[0].hint or "correct or delete these rows").removeprefix("or "),
        )


def _unlabelled(entries: list[_Entry], pattern: str | None) -> Iterator[Finding]:
    if pattern is not None and entries and not any(entry.label for entry in entries):
        places = [(entry, "") for entry in entries]
        yield _finding("label", "warning", places, f"{pattern!r} finds no label in any answer", "correct the pattern")


def _by_key(entries: list[_Entry]) -> dict[str, list[_Entry]]:
    found: dict[str, list[_Entry]] = defaultdict(list)
    for entry in entries:
        found[entry.key].append(entry)
    return found


def _differ(a: _Entry, b: _Entry) -> bool:
    """Whether two rows are told apart by their labels."""
    return a.label is not None and b.label is not None and a.label != b.label


def _near(entries: list[_Entry]) -> Iterator[tuple[_Entry, _Entry, float]]:
    """A row, an earlier row with a nearly equal prompt, and their similarity."""
    for pair in near_pairs([entry.key for entry in entries]):
        yield entries[pair.second], entries[pair.first], pair.similarity


def _repeats(entries: list[_Entry]) -> Iterator[Finding]:
    """Duplicates, near-duplicates and contradictions; across splits only contradictions, the rest are leaks."""
    same, other = [], []
    contrary: dict[str, tuple[_Entry, str]] = {}
    for having in _by_key(entries).values():
        first_with: dict[tuple[str, str], _Entry] = {}
        first_in: dict[str, _Entry] = {}
        for entry in having:
            twin = first_with.setdefault((entry.split, entry.answer_key), entry)
            first = first_in.setdefault(entry.split, entry)
            if _differ(entry, having[0]):
                contrary[entry.row.where] = (entry, _opposite(entry, having[0]))
            elif twin is not entry:
                same.append((entry, f"as {twin.row.where}"))
            elif first is not entry:
                other.append((entry, f"as {first.row.where}"))
    near: dict[str, tuple[_Entry, str]] = {}
    for entry, earlier_entry, similarity in _near(entries):
        if _differ(entry, earlier_entry):
            contrary.setdefault(entry.row.where, (entry, _opposite(entry, earlier_entry)))
        elif entry.split == earlier_entry.split:
            near.setdefault(entry.row.where, (entry, f"like {earlier_entry.row.where} ({similarity:.2f})"))
    if contrary:
        detail = "the same prompt as in another row, or nearly, but another label"
        yield _finding(
            "contradiction",
            "warning",
            list(contrary.values()),
            detail,
            "decide which label is right; correct the other",
        )
    if same:
        detail = "the same prompt and answer as an earlier row"
        yield _finding("duplicate", "warning", same, detail, "delete the copies: they weigh double")
    if other:
        detail = "the same prompt as an earlier row with another answer"
        yield _finding("duplicate", "info", other, detail, "fine if both answers are right")
    if near:
        detail = "nearly the same prompt as an earlier row"
        advice = "keep them on one side of the split, as mlxtune does; delete those that add nothing"
        yield _finding("near_duplicate", "info", list(near.values()), detail, advice)


def _opposite(entry: _Entry, other: _Entry) -> str:
    return f"{_named(entry.label)}, but {other.row.where} says {_named(other.label)}"


def _named(label: str | None) -> str:
    """A label for a sentence: quoted, and cut where it is long."""
    text = label or ""
    return repr(text if len(text) <= LABEL_CHARACTERS else text[:LABEL_CHARACTERS] + "…")


def _leaks(entries: list[_Entry]) -> Iterator[Finding]:
    """Rows with the same or nearly the same prompt as a row of another split."""
    order = {split: place for place, split in enumerate(dict.fromkeys(entry.split for entry in entries))}
    if len(order) < 2:
        return
    alike: dict[str, list[tuple[str, float]]] = defaultdict(list)
    for entry, earlier, similarity in _near(entries):
        alike[entry.key].append((earlier.key, similarity))
        alike[earlier.key].append((entry.key, similarity))
    first = {key: having[0] for key, having in _by_key(entries).items()}  # in the earliest split that has the prompt
    places: list[tuple[_Entry, str]] = []
    equal = 0
    for entry in entries:
        for key, similarity in [(entry.key, 1.0), *alike[entry.key]]:
            source = first[key]
            if order[source.split] < order[entry.split]:
                equal += key == entry.key
                close = f"as {source.row.where}" if key == entry.key else f"like {source.row.where} ({similarity:.2f})"
                places.append((entry, close))
                break
    if places:
        detail = f"a prompt of another split again: {equal} the same, {len(places) - equal} nearly"
        advice = "delete them from one side, or give mlxtune one file to split; scores on such rows mean nothing"
        yield _finding("leak", "warning", places, detail, advice)


def _labels(entries: list[_Entry]) -> Iterator[Finding]:
    counts = _label_counts(entries)
    if not counts:
        return
    places: dict[str | None, list[tuple[_Entry, str]]] = defaultdict(list)
    for entry in entries:
        places[entry.label].append((entry, ""))
    if places[None]:
        yield _finding("label", "warning", places[None], "no label in the answer", "correct the answer, or the pattern")
    for name, twin in _look_alikes(list(counts)):
        detail = f"the label {_named(name)} looks like {_named(twin)}"
        yield _finding("label", "warning", places[name], detail, "write both the same if they mean the same")
    small = [name for name, count in counts.items() if count < SMALL_CLASS]
    if small:
        named = ", ".join(f"{_named(name)} ({counts[name]})" for name in small[:5]) + (", …" if len(small) > 5 else "")
        detail = f"labels with fewer than {SMALL_CLASS} rows: {named}"
        advice = "add examples, or merge them with other labels"
        yield _finding("label", "warning", [each for name in small for each in places[name]], detail, advice)
    most, least = next(iter(counts)), list(counts)[-1]
    if counts[most] > IMBALANCE * counts[least]:
        times = round(counts[most] / counts[least])
        detail = f"{_named(most)} has {counts[most]:,} rows, {_named(least)} {counts[least]:,}: {times:,} times as many"
        advice = "add examples of the rare labels; read the scores label by label"
        yield _finding("label", "warning", places[least], detail, advice)


def _look_alikes(labels: list[str]) -> Iterator[tuple[str, str]]:
    """Each label with a more frequent one that differs only in case, punctuation, spacing, or a slip of the pen."""
    if len(labels) > MOST_LABELS:  # free text rather than labels
        return
    plain = {label: re.sub(r"[\W_]+", "", label).casefold() for label in labels}
    for place, label in enumerate(labels):
        for earlier in labels[:place]:
            a, b = plain[label], plain[earlier]
            # labels that differ in a number, such as level_1 and level_2, differ on purpose
            numbered = re.sub(r"\d", "", a) == re.sub(r"\d", "", b) and a != b
            if (a == b and a) or (not numbered and difflib.SequenceMatcher(None, a, b).ratio() >= 0.9):
                yield label, earlier
                break


def _personal_data(entries: list[_Entry]) -> Iterator[Finding]:
    places: dict[str, list[tuple[_Entry, str]]] = defaultdict(list)
    for entry in entries:
        in_answer = {each.entity for each in pii.find(entry.answer or "")}
        if isinstance(entry.example, Chat):
            answer = last_learned(entry.example)
            texts = [str(each["content"]) for place, each in enumerate(entry.example.messages) if place != answer]
        else:
            texts = [entry.prompt]
        in_prompt = {each.entity for text in texts for each in pii.find(text)}
        for entity in in_prompt | in_answer:
            places[entity].append((entry, "in the answer" if entity in in_answer else ""))
    names = {"email": "e-mail addresses", "phone": "phone numbers", "card": "payment cards", "iban": "IBANs"}
    for entity in pii.ENTITIES:
        if places[entity]:
            detail = f"{names.get(entity, 'IP addresses')} ({entity})"
            advice = "replace them by made-up ones; a model can repeat what it has learned"
            found = _finding("pii", "warning", places[entity], detail, advice)
            yield replace(found, entity=entity)


def _lengths(entries: list[_Entry]) -> Iterator[Finding]:
    tiny = [(entry, "prompt") for entry in entries if len(entry.prompt.strip()) <= 1]
    if not _label_counts(entries):
        answered = [entry for entry in entries if entry.answer is not None]
        tiny += [(entry, "answer") for entry in answered if len((entry.answer or "").strip()) <= 1]
    if tiny:
        yield _finding("length", "warning", tiny, "empty, or one character", "fill them in or delete the rows")
    for part, texts in (
        ("prompt", [(entry, entry.prompt) for entry in entries]),
        ("answer", [(entry, entry.answer) for entry in entries if entry.answer is not None]),
    ):
        lengths = [len(text) for _, text in texts]
        bound = max(LONG, TIMES_MEDIAN * statistics.median_low(lengths)) if lengths else 0
        long = [(entry, f"{len(text):,} characters") for entry, text in texts if len(text) > bound]
        if long:
            detail = f"the {part} is more than {TIMES_MEDIAN} times as long as most"
            advice = "look at them; they may not fit into train.max_seq_length"
            yield _finding("length", "info", long, detail, advice)


CHECKS: tuple[Callable[[list[_Entry]], Iterator[Finding]], ...] = (
    _leaks,
    _repeats,
    _labels,
    _personal_data,
    _lengths,
)
