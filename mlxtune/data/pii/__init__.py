"""Personal data in a text, one module per family of entities. Knows shapes, check digits and words beside, not meaning.

Careful rather than complete: a number counts as personal only where its form, its check digit or the words beside it
say so, because order numbers, dates and prices are far more frequent in training data. Names and places need the
optional `mlxtune.data.pii.presidio`.
"""

import bisect
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from mlxtune.data.pii.internet import emails, ips
from mlxtune.data.pii.keys import keys
from mlxtune.data.pii.national import national_ids
from mlxtune.data.pii.payment import cards, ibans
from mlxtune.data.pii.phones import phones

__all__ = ["ENTITIES", "NAMES", "Finding", "find", "without_overlap"]

# entity: what a reader is told that it is, in the plural
NAMES = {
    "email": "e-mail addresses",
    "phone": "phone numbers",
    "card": "payment cards",
    "iban": "IBANs",
    "ip": "IP addresses",
    "national_id": "national ids",
    "key": "keys, tokens and passwords",
}
ENTITIES = tuple(NAMES)
_Search = Callable[[str], Iterator[tuple[int, int]]]
# a stricter form comes first and keeps its place
_SEARCHES: tuple[tuple[str, _Search], ...] = (
    ("key", keys),
    ("iban", ibans),
    ("card", cards),
    ("national_id", national_ids),
    ("email", emails),
    ("ip", ips),
    ("phone", phones),
)
_WITHOUT_NUMBERS = tuple(each for each in _SEARCHES if each[0] in ("key", "email", "ip"))
_SIX_DIGITS = re.compile(r"\d(?:\D{0,3}\d){5}")  # every number that is looked for has that many so near


@dataclass(frozen=True, slots=True)
class Finding:
    """One piece of personal data: what it is, and `text[start:end]`."""

    entity: str
    start: int
    end: int


def find(text: str) -> list[Finding]:
    """The personal data in a text in order of place; no two overlap."""
    searches = _SEARCHES if _SIX_DIGITS.search(text) else _WITHOUT_NUMBERS
    return without_overlap(Finding(entity, *span) for entity, search in searches for span in search(text))


def without_overlap(findings: Iterable[Finding]) -> list[Finding]:
    """Findings in order of place; of two that overlap the one that comes first in `findings` stays."""
    kept: list[Finding] = []
    for each in findings:
        place = bisect.bisect(kept, each.start, key=lambda other: other.start)
        after_the_last = place == 0 or kept[place - 1].end <= each.start
        if after_the_last and (place == len(kept) or each.end <= kept[place].start):
            kept.insert(place, each)
    return kept
