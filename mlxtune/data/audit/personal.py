"""Personal data in the rows, a finding a kind. Knows what `pii` finds, not whose it is."""

import functools
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from mlxtune.data import pii
from mlxtune.data.audit.entries import Entry, Table
from mlxtune.data.audit.findings import Finding, about_rows
from mlxtune.data.formats import Chat, last_learned
from mlxtune.data.messages import written_calls
from mlxtune.data.pii import presidio

ADVICE = "replace them by made-up ones, or with --fix OUT --redact; a model can repeat what it has learned"
REMEMBERED = 1000  # answers; those that are labels come again and again


def personal_data(table: Table) -> Iterator[Finding]:
    """A finding for each kind of personal data."""

    def entities(text: str) -> frozenset[str]:
        return frozenset(each.entity for each in table.find(text))

    remembered = functools.lru_cache(maxsize=REMEMBERED)(entities)
    noted: dict[str, list[tuple[Entry, str]]] = defaultdict(list)
    for entry in table.entries:
        asked, answered = _texts(entry)
        in_answer = frozenset[str]().union(*map(remembered, answered))
        for entity in in_answer.union(*map(remembered if len(asked) > 1 else entities, asked)):
            noted[entity].append((entry, "in the answer" if entity in in_answer else ""))
    known = [each for each in pii.ENTITIES if noted[each]]
    for entity in [*known, *sorted(set(noted) - set(pii.ENTITIES))]:
        name = (pii.NAMES | presidio.NAMES).get(entity, entity.replace("_", " "))
        detail = name if name == entity else f"{name} ({entity})"
        yield about_rows("pii", "warning", noted[entity], detail, ADVICE, places=table.places, entity=entity)


def _texts(entry: Entry) -> tuple[list[str], list[str]]:
    """The texts that stand in a row beside its answer, and those of the answer."""
    if not isinstance(entry.example, Chat):
        return [entry.prompt], [entry.answer or ""]
    asked: list[str] = []
    answered: list[str] = []
    last = last_learned(entry.example)
    for place, message in enumerate(entry.example.messages):
        (answered if place == last else asked).extend(_said(message))
    return asked, answered


def _said(message: dict[str, Any]) -> list[str]:
    """What a message says: its content, its thought, and its tool calls as JSON."""
    return [message["content"], message.get("reasoning_content", ""), *written_calls(message)]
