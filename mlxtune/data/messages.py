"""Messages as they stand in a file -> messages as templates want them. Knows roles, texts and tool calls, not rows.

A clean message has a `role` and a text `content`; an answer may have a `weight` of 0 or 1, `tool_calls` with objects
as arguments, and `reasoning_content`; the result of a tool may have its `tool_call_id`; any may have a `name`.
"""

import json
from collections.abc import Iterator
from typing import Any

from mlxtune.data import json_text
from mlxtune.errors import DataError

ROLES = ("system", "user", "assistant", "tool")
TEXTS = ("name", "tool_call_id", "reasoning_content")  # what a message may have besides, kept as it is
KEYS = ("role", "content", "weight", "tool_calls", *TEXTS)
# what the conversations of ShareGPT call the roles
SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "claude": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "system": "system",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "tool_response": "tool",
    "function_response": "tool",
    "function_call": "assistant",
    "tool_call": "assistant",
}
CALLERS = ("function_call", "tool_call")  # their value is a call as JSON
CORRECT = "correct or delete the row"
SHOWN = 60  # characters of a value in a message


def shown(value: object) -> str:
    """A value for an error, cut where it is long."""
    text = repr(value)
    return text if len(text) <= SHOWN else text[:SHOWN] + "…"


def clean(where: str, messages: object) -> list[dict[str, Any]]:
    """The messages of a row, checked. `where` names the row in a DataError."""
    if not isinstance(messages, list) or not messages:
        hint = 'write [{"role": "user", "content": …}, {"role": "assistant", "content": …}]'
        raise DataError("`messages` is no list of messages", where=where, hint=hint)
    return [_message(where, f"message {number}", each) for number, each in enumerate(messages, start=1)]


def from_conversations(where: str, items: object) -> list[dict[str, Any]]:
    """ShareGPT's list of `from` and `value` as messages that `clean` takes. Raises DataError."""
    if not isinstance(items, list) or not items:
        hint = 'write [{"from": "human", "value": …}, {"from": "gpt", "value": …}]'
        raise DataError("`conversations` is no list of messages", where=where, hint=hint)
    return [_spoken(where, f"message {number}", item) for number, item in enumerate(items, start=1)]


def unknown(message: dict[str, Any]) -> dict[str, Any]:
    """What stands in a message of a file that no template is given."""
    return {key: value for key, value in message.items() if key not in (*KEYS, "from", "value") and value is not None}


def parse_tools(where: str, tools: object) -> list[dict[str, Any]]:
    """The tools that a row offers: a list of objects, or its JSON. Raises DataError."""
    found = _from_json(tools)
    found = [] if found is None else found
    if not isinstance(found, list) or not all(isinstance(tool, dict) for tool in found):
        hint = 'write [{"type": "function", "function": {"name": …}}]'
        raise DataError("`tools` is no list of objects", where=where, hint=hint)
    return found


def written_calls(message: dict[str, Any]) -> Iterator[str]:
    """Each tool call of a clean message as compact JSON with sorted keys, as two of them are compared."""
    for call in message.get("tool_calls", ()):
        wanted = {key: call["function"][key] for key in ("name", "arguments")}
        yield json.dumps(wanted, ensure_ascii=False, sort_keys=True, separators=(",", ":"))


def _message(where: str, at: str, message: object) -> dict[str, Any]:
    role = message.get("role") if isinstance(message, dict) else message
    if not isinstance(message, dict) or role not in ROLES:
        raise DataError(f"{at} has the role {shown(role)}", where=where, hint=f"use one of {', '.join(ROLES)}")
    if message.get("function_call"):
        raise DataError(f"{at} has a `function_call`", where=where, hint="write it as `tool_calls`")
    calls = _calls(where, at, message)
    content = _content(where, at, message.get("content"), may_lack=bool(calls))
    if role == "assistant" and not content.strip() and not calls:
        raise DataError(f"{at}, an answer, is empty", where=where, hint="fill it in or delete the row")
    found: dict[str, Any] = {"role": role, "content": content}
    weight = message.get("weight")
    if weight is not None:
        if isinstance(weight, bool) or not isinstance(weight, int | float) or weight not in (0, 1):
            raise DataError(f"{at} has the weight {shown(weight)}", where=where, hint="use 0 or 1")
        if role == "assistant":
            found["weight"] = int(weight)
    if calls:
        found["tool_calls"] = calls
    return found | _texts(where, at, message)


def _texts(where: str, at: str, message: dict[str, Any]) -> dict[str, str]:
    found: dict[str, str] = {}
    for key in TEXTS:
        value = message.get(key)
        if value is None:
            continue
        if not isinstance(value, str):
            raise DataError(f"{at} has the {key} {shown(value)}, not a text", where=where, hint=CORRECT)
        if key == "reasoning_content" and message["role"] != "assistant":
            raise DataError(f"{at}, of the {message['role']}, has a thought", where=where, hint=CORRECT)
        found[key] = checked_text(where, f"{at}, its {key},", value)
    return found


def _content(where: str, at: str, content: object, *, may_lack: bool) -> str:
    """A message's text: as it is, or joined from OpenAI's parts."""
    if content is None and may_lack:
        return ""
    if isinstance(content, list) and content:
        kinds = [part.get("type") if isinstance(part, dict) else part for part in content]
        other = next((kind for kind in kinds if kind != "text"), None)
        if other is not None or not all(isinstance(part.get("text"), str) for part in content):
            named = f"a part of the type {shown(other)}" if other is not None else "a part without text"
            raise DataError(f"{at} has {named}", where=where, hint="only texts can be learned; delete the row")
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise DataError(f"{at} has the content {shown(content)}, not a text", where=where, hint=CORRECT)
    return checked_text(where, at, content)


def checked_text(where: str, at: str, text: str) -> str:
    """A text that has no NUL, which no tokenizer reads well. Raises DataError."""
    if "\x00" in text:
        raise DataError(f"{at} holds a NUL character", where=where, hint="delete it")
    return text


def _calls(where: str, at: str, message: dict[str, Any]) -> list[dict[str, Any]]:
    calls = message.get("tool_calls")
    if calls is None or calls == []:
        return []
    if not isinstance(calls, list):
        raise DataError(f"{at} has the tool_calls {shown(calls)}, not a list", where=where, hint=CORRECT)
    if message["role"] != "assistant":
        what = f"{at}, of the {message['role']}, calls a tool"
        raise DataError(what, where=where, hint="only an assistant can")
    return [_call(where, f"{at}, tool call {number},", call) for number, call in enumerate(calls, start=1)]


def _call(where: str, at: str, call: object) -> dict[str, Any]:
    """A call as OpenAI writes it, with its arguments as an object; `{name, arguments}` alone will do."""
    hint = 'write {"type": "function", "function": {"name": …, "arguments": {…}}}'
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(call, dict) or not isinstance(function, dict):
        raise DataError(f"{at} is {shown(call)}", where=where, hint=hint)
    if call.get("type") not in (None, "function"):
        raise DataError(f"{at} has the type {shown(call['type'])}", where=where, hint="only functions can be called")
    if not isinstance(function.get("name"), str) or not function["name"].strip():
        raise DataError(f"{at} has the name {shown(function.get('name'))}", where=where, hint=hint)
    if not isinstance(call.get("id", ""), str | None):
        raise DataError(f"{at} has the id {shown(call['id'])}, not a text", where=where, hint=hint)
    given = function.get("arguments")
    arguments = _from_json(given)
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, dict):
        raise DataError(f"{at} has the arguments {shown(given)}, no JSON object", where=where, hint=hint)
    named = {key: call[key] for key in ("id", "type") if call.get(key) is not None}
    return {**named, "function": {"name": function["name"], "arguments": arguments}}


def _from_json(value: object) -> object:
    """What a JSON text holds, None for an empty one; the value itself where it is no JSON text that a file may hold."""
    if not isinstance(value, str):
        return value
    try:
        found = json_text.loads(value) if value.strip() else None
    except (ValueError, RecursionError):
        return value
    return value if "\\u" in value and json_text.has_half_character(found) else found


def _spoken(where: str, at: str, item: object) -> dict[str, Any]:
    if isinstance(item, dict) and "from" not in item and "role" in item:
        return item
    speaker = item.get("from") if isinstance(item, dict) else item
    if not isinstance(item, dict) or not isinstance(speaker, str) or speaker.lower() not in SPEAKERS:
        raise DataError(f"{at} is from {shown(speaker)}", where=where, hint="use one of human, gpt, system, tool")
    value = item.get("value")
    if not isinstance(value, str):
        raise DataError(f"{at} has the value {shown(value)}, not a text", where=where, hint=CORRECT)
    kept = {key: each for key, each in item.items() if key in (*TEXTS, "weight")}
    role = SPEAKERS[speaker.lower()]
    if speaker.lower() in CALLERS:
        calls = _from_json(value)
        return {"role": role, "tool_calls": calls if isinstance(calls, list) else [calls], **kept}
    return {"role": role, "content": value, **kept}
