"""A row -> an Example, by a table of formats. Knows columns and types, not tokens.

To add a format: a function `row -> Example` and a line in `FORMATS`.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mlxtune.data.files import Row
from mlxtune.errors import DataError, RecipeError
from mlxtune.recipe import DataRecipe

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation: messages of `role` and `content`, and the tools offered in it.

    An assistant's message may have the `weight` 0: it is context and not learned. With 1, or without, it is.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Completion:
    """A prompt and its answer. With a chat template they are a user's and an assistant's message."""

    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class Text:
    """Plain text, learned as a whole."""

    text: str


Example = Chat | Completion | Text


def reader(rows: Sequence[Row], data: DataRecipe) -> Callable[[Row], Example]:
    """How to read each row of one file: in the format that most of `rows` have. It raises DataError as `to_example`."""
    return lambda row: to_example(row, data)


def to_example(row: Row, data: DataRecipe) -> Example:
    """The example in a row. Raises DataError with the row's place."""
    if data.prompt is not None and data.completion is not None:
        return Completion(_filled(data.prompt, row), _filled(data.completion, row))
    for columns, read in FORMATS:
        if columns <= row.value.keys():
            return read(row)
    known = ", or ".join(" + ".join(f"`{name}`" for name in sorted(columns, reverse=True)) for columns, _ in FORMATS)
    seen = ", ".join(f"`{name}`" for name in row.value) or "none"
    raise DataError(
        f"has the columns {seen}; expected {known}",
        where=row.where,
        hint="or set data.prompt and data.completion in the recipe",
    )


def kept(row: Row, data: DataRecipe) -> bool:
    """Whether `data.keep` keeps a row; it keeps canonical ones. Raises DataError if a column it names is missing."""
    for column, values in data.keep.items():
        if column not in row.value:
            raise DataError(f"has no column `{column}`, which data.keep names", where=row.where)
        if str(row.value[column]) not in values:
            return False
    return True


def to_value(example: Example) -> dict[str, Any]:
    """The canonical row of an example, as written to a run's `data/`."""
    if isinstance(example, Chat):
        return {"messages": example.messages, **({"tools": example.tools} if example.tools else {})}
    if isinstance(example, Completion):
        return {"prompt": example.prompt, "completion": example.completion}
    return {"text": example.text}


def is_learned(message: dict[str, Any]) -> bool:
    """Whether a message is an answer to learn: an assistant's, of a weight other than 0."""
    return message["role"] == "assistant" and message.get("weight") != 0


def last_learned(chat: Chat) -> int:
    """The index of the last message that is learned."""
    return max(index for index, message in enumerate(chat.messages) if is_learned(message))


def prompt_text(example: Example) -> str:
    """What an example asks, as one text: for comparing examples, not for models."""
    if isinstance(example, Chat):
        before = example.messages[: last_learned(example)]
        asked = [m for m in before if m["role"] == "user"] or before
        return "\n".join(str(m["content"]) for m in asked)
    return example.prompt if isinstance(example, Completion) else example.text


def answer_text(example: Example) -> str | None:
    """The answer that an example teaches last; None for plain text."""
    if isinstance(example, Chat):
        return str(example.messages[last_learned(example)]["content"])
    return example.completion if isinstance(example, Completion) else None


def _written(value: object) -> object:
    """What a template writes for a value; `None` or a Python list would be learned letter by letter."""
    if value is None or isinstance(value, list | dict):
        raise jinja2.UndefinedError(f"it would write {value!r}")
    return value


_TEMPLATES = ImmutableSandboxedEnvironment(
    undefined=jinja2.StrictUndefined, keep_trailing_newline=True, finalize=_written
)


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> jinja2.Template:
    return _TEMPLATES.from_string(template)


def _filled(template: str, row: Row) -> str:
    """A Jinja template with the columns of a row filled in. Raises DataError for one that is missing or no text."""
    try:
        text = _compiled(template).render(row.value)
    except jinja2.UndefinedError as error:
        seen = ", ".join(f"`{name}`" for name in row.value)
        raise DataError(f"{template!r} does not fit: {error}", where=row.where, hint=f"it has {seen}") from None
    except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError) as error:
        raise RecipeError(f"{template!r} is no valid template: {error}", where="data.prompt, data.completion") from None
    if not text.strip():
        raise DataError(f"{template!r} gives an empty text", where=row.where, hint="fill the row in or delete it")
    return text


def _text(row: Row, column: str) -> str:
    if column not in row.value:
        seen = ", ".join(f"`{name}`" for name in row.value)
        raise DataError(f"has no column `{column}`", where=row.where, hint=f"it has {seen}")
    value = row.value[column]
    if not isinstance(value, str):
        raise DataError(f"`{column}` is {value!r}, not a text", where=row.where)
    if not value.strip():
        raise DataError(f"`{column}` is empty", where=row.where, hint="fill it in or delete the row")
    return value


def _chat(row: Row) -> Example:
    messages = row.value["messages"]
    if not isinstance(messages, list) or not messages:
        raise DataError("`messages` is no list of messages", where=row.where)
    cleaned = []
    for number, message in enumerate(messages, start=1):
        at = f"message {number}"
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            role = message.get("role") if isinstance(message, dict) else message
            raise DataError(f"{at} has the role {role!r}", where=row.where, hint=f"use one of {', '.join(ROLES)}")
        if message.get("tool_calls"):
            raise DataError(f"{at} calls a tool, which is not supported", where=row.where, hint="delete the row")
        if not isinstance(message.get("content"), str):
            raise DataError(f"{at} has the content {message.get('content')!r}, not a text", where=row.where)
        if message["role"] == "assistant" and not message["content"].strip():
            raise DataError(f"{at}, an answer, is empty", where=row.where, hint="fill it in or delete the row")
        weight = message.get("weight")
        if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
            raise DataError(f"{at} has the weight {weight!r}", where=row.where, hint="use 0 or 1")
        cleaned.append({"role": message["role"], "content": message["content"]})
        if weight is not None and message["role"] == "assistant":
            cleaned[-1]["weight"] = int(weight)
    if cleaned[-1]["role"] != "assistant":
        raise DataError(
            f"ends with the {cleaned[-1]['role']}", where=row.where, hint="end it with an assistant's answer"
        )
    if not any(is_learned(message) for message in cleaned):
        raise DataError(
            "has no token to learn: every answer has the weight 0", where=row.where, hint="give one the weight 1"
        )
    tools = row.value.get("tools") or []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError("`tools` is no list of objects", where=row.where)
    return Chat(cleaned, tools)


def _completion(row: Row) -> Example:
    return Completion(_text(row, "prompt"), _text(row, "completion"))


def _plain(row: Row) -> Example:
    return Text(_text(row, "text"))


FORMATS: list[tuple[frozenset[str], Callable[[Row], Example]]] = [
    (frozenset({"messages"}), _chat),
    (frozenset({"prompt", "completion"}), _completion),
    (frozenset({"text"}), _plain),
]
