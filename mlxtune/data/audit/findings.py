"""Findings and the audit they make up. Knows their shape, not how they are found."""

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from mlxtune.errors import DataError

if TYPE_CHECKING:
    from mlxtune.data.audit.entries import Entry

SEVERITIES = ("error", "warning", "info")
PLACES = 20  # how many places a finding names
REASONS = 10  # how many kinds of malformed rows are told apart
SHOWN = 40  # characters of a text that a finding quotes


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One kind of mistake: how many rows have it, where the first ones are (`file:line`), and what to do.

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


def about_rows(
    kind: str,
    severity: str,
    noted: Sequence[tuple["Entry", str]],
    detail: str,
    advice: str,
    *,
    places: int,
    entity: str | None = None,
) -> Finding:
    """A finding about rows, each with its note, which may be empty; it names the first `places` of them."""
    first = sorted(noted, key=lambda each: each[0].place)[:places]
    return Finding(
        kind=kind,
        severity=severity,
        count=len(noted),
        where=tuple(entry.row.where for entry, _ in first),
        notes=tuple(note for _, note in first) if any(note for _, note in first) else (),
        detail=detail,
        advice=advice,
        entity=entity,
    )


def malformed(mistakes: Sequence[DataError], places: int) -> Iterator[Finding]:
    """A finding for each reason for which rows cannot be used, the most frequent first."""
    reasons: dict[str, list[DataError]] = defaultdict(list)
    for mistake in mistakes:
        reason = re.sub(r" at column \d+", "", mistake.what)
        reasons[reason if reason in reasons or len(reasons) < REASONS else "for other reasons"].append(mistake)
    for reason, having in sorted(reasons.items(), key=lambda each: -len(each[1])):
        yield Finding(
            kind="malformed",
            severity="error",
            count=len(having),
            where=tuple(str(mistake.where) for mistake in having[:places]),
            detail=reason,
            advice=(having[0].hint or "correct or delete these rows").removeprefix("or "),
        )


def quoted(text: str) -> str:
    """A text for a sentence: in quotes, and cut where it is long."""
    return repr(text if len(text) <= SHOWN else text[:SHOWN] + "…")
