"""JSON as the standard has it (RFC 8259), stricter than Python's `json`: in a file, and in a text within a row.

Refused are NaN and infinities, keys that come twice, what is nested too deep, and half characters. Knows no rows.
"""

import json
import math
from collections import Counter
from typing import Any

DEEPEST = 100  # lists and objects inside each other


def loads(text: str) -> object:
    """A JSON value. Raises ValueError or RecursionError, also for what Python reads but JSON does not have."""
    value: object = _DECODER.decode(text)
    if text.count("[") + text.count("{") > DEEPEST:
        _check_depth(value)
    return value


def reason(error: ValueError | RecursionError) -> str:
    """Why JSON cannot be read, in a few words."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg.removesuffix(' at')} at column {error.colno}"
    if isinstance(error, RecursionError):
        return f"lists and objects more than {DEEPEST} deep"
    return "a number of thousands of digits" if "integer string conversion" in str(error) else str(error)


def has_half_character(value: object) -> bool:
    r"""Whether a text in a value has one half of an escaped pair, such as \ud83d, which no file can hold as UTF-8."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {text[:20]} is too large")
    return number


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {twice[:40]!r} comes twice in one object")
    return value


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, parse_float=_finite, object_pairs_hook=_without_repeats)


def _check_depth(value: object) -> None:
    level = [value]
    for _ in range(DEEPEST):
        inner = [each for each in level if isinstance(each, list | dict)]
        level = [item for each in inner for item in (each.values() if isinstance(each, dict) else each)]
        if not level:
            return
    raise RecursionError
