"""Personal data out of an Example, and back in: `[EMAIL_1]` for what `pii` finds. Knows Examples, not files.

`redact` is pure and gives the map from placeholder to original, so that a caller writes it only where a user asks.
`restore` undoes it where each value is spelt alike throughout the example. Its limits: a value spelt in two ways comes
back as first spelt, an integer in a tool call's arguments comes back as a text, and a letter that JSON within a text
escaped comes back as the letter.
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from mlxtune.data import pii
from mlxtune.data.formats import Completion, Example, Text

Find = Callable[[str], list[pii.Finding]]
_PLACEHOLDER = re.compile(r"\[[A-Z][A-Z_]{0,30}_\d{1,9}\]")
_LITERAL = re.compile(r'"(?:[^"\\]|\\.)*+"(?P<colon>\s*:)?|(?<![\w.+-])-?\d+(?![\w.])')  # of JSON: a string, an integer
# numbers are the same however they are grouped; a dot moves an IP address, and a capital makes another password
_ONLY_DIGITS_COUNT = ("phone", "card", "iban", "national_id")
_EXACT = ("key",)


def redact(example: Example, find: Find = pii.find) -> tuple[Example, dict[str, str]]:
    """The example with a placeholder for each finding, and placeholder -> original.

    The same value has the same placeholder throughout the example: numbers are compared without case, spaces and
    punctuation, keys as they are, the rest without case. Placeholders that the example has already are left alone.
    """
    names = _Names(find, taken={name for text in _texts(example) for name in _PLACEHOLDER.findall(text)})
    return _changed(example, names.redacted), names.originals


def restore(example: Example, originals: dict[str, str]) -> Example:
    """The example with each placeholder of the map replaced by its original."""

    def restored(text: str, _: str) -> str:
        return _PLACEHOLDER.sub(lambda match: originals.get(match[0], match[0]), text)

    return _changed(example, restored)


@dataclass(slots=True)
class _Names:
    """The placeholders given out in one example."""

    find: Find
    taken: set[str]
    originals: dict[str, str] = field(default_factory=dict)
    by_value: dict[tuple[str, str], str] = field(default_factory=dict)
    last: dict[str, int] = field(default_factory=dict)

    def redacted(self, text: str, key: str) -> str:
        """A text with placeholders; the `key` that it is the value of in JSON speaks of it as words before it do."""
        # again until nothing is left: what stood beside a finding can be one itself
        while found := self.found(text, f"{key}: " if key else ""):
            pieces, end = [], 0
            for each in found:
                pieces += [text[end : each.start], self.placeholder(each.entity, text[each.start : each.end])]
                end = each.end
            text = "".join([*pieces, text[end:]])
        return text

    def found(self, text: str, before: str) -> list[pii.Finding]:
        """The findings in a text, alone and with the words before it, that touch no placeholder."""
        findings = self.find(text)
        if before:
            moved = [replace(e, start=e.start - len(before), end=e.end - len(before)) for e in self.find(before + text)]
            findings = pii.without_overlap([*findings, *(each for each in moved if each.start >= 0)])
        marks = [mark.span() for mark in _PLACEHOLDER.finditer(text)]
        return [each for each in findings if all(each.end <= start or each.start >= end for start, end in marks)]

    def placeholder(self, entity: str, value: str) -> str:
        same = (entity, _compared(entity, value))
        if same not in self.by_value:
            number = self.last.get(entity, 0) + 1
            while (name := f"[{entity.upper()}_{number}]") in self.taken:
                number += 1
            self.last[entity] = number
            self.by_value[same] = name
            self.originals[name] = value
        return self.by_value[same]


def _compared(entity: str, value: str) -> str:
    if entity in _EXACT:
        return value
    return re.sub(r"[\W_]", "", value).casefold() if entity in _ONLY_DIGITS_COUNT else value.casefold()


_Change = Callable[[str, str], str]  # text, the key that it is the value of -> text


def _changed(example: Example, change: _Change) -> Example:
    if isinstance(example, Completion):
        return Completion(change(example.prompt, ""), change(example.completion, ""))
    if isinstance(example, Text):
        return Text(change(example.text, ""))
    return replace(example, messages=[_message(message, change) for message in example.messages])


def _message(message: dict[str, Any], change: _Change) -> dict[str, Any]:
    """A message with its content, its reasoning and the arguments of its tool calls changed; names and ids stay."""
    changed = dict(message)
    for part in ("content", "reasoning_content"):
        if part in message:
            is_result = message.get("role") == "tool"
            changed[part] = _value(message[part], "", change, as_json=is_result)
    if message.get("tool_calls"):
        changed["tool_calls"] = [_call(call, change) for call in message["tool_calls"]]
    return changed


def _call(call: dict[str, Any], change: _Change) -> dict[str, Any]:
    if isinstance(call.get("function"), dict):
        return {**call, "function": _call(call["function"], change)}
    if "arguments" not in call:
        return call
    return {**call, "arguments": _value(call["arguments"], "", change, as_json=True)}


def _value(value: Any, key: str, change: _Change, as_json: bool) -> Any:
    """A JSON value with its texts changed, and its integers where they are personal data."""
    if isinstance(value, dict):
        return {change(name, ""): _value(each, name, change, as_json) for name, each in value.items()}
    if isinstance(value, list):
        return [_value(each, key, change, as_json) for each in value]
    if isinstance(value, str):
        if not as_json or not _is_json(value):
            return change(value, key)
        changed = _json(value, change)
        if "\\" in changed:  # an escape is no text
            return changed
        whole = change(changed, "")  # words in one string can speak of a number in the next
        return whole if _is_json(whole) else changed
    if isinstance(value, int) and not isinstance(value, bool):
        text = change(str(value), key)
        return value if text == str(value) else text
    return value


def _is_json(text: str) -> bool:
    if not text.lstrip().startswith(("{", "[")):
        return False
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _json(text: str, change: _Change) -> str:
    """JSON as text with its strings and integers changed; layout and everything else stay as written."""
    key = ""

    def literal(match: re.Match[str]) -> str:
        nonlocal key
        colon = match["colon"] or ""
        written = match[0].removesuffix(colon)
        value = json.loads(written)
        changed = change(str(value), "" if colon else key)
        if colon:
            key = value
        if changed == str(value):
            return match[0]
        return json.dumps(changed, ensure_ascii=written.isascii() and "\\u" in written) + colon

    return _LITERAL.sub(literal, text)


def _texts(example: Example) -> Iterator[str]:
    """Every text that `redact` may change."""
    seen: list[str] = []

    def note(text: str, _: str) -> str:
        seen.append(text)
        return text

    _changed(example, note)
    yield from seen
