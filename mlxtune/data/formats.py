"""A row -> an Example, by a table of formats. Knows columns and types, not tokens.

To add a format: a function `row -> Example` and a line in `FORMATS`.
"""

import difflib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from mlxtune.data import columns
from mlxtune.data.files import Row
from mlxtune.data.messages import checked_text, clean, from_conversations, parse_tools, shown, written_calls
from mlxtune.errors import DataError
from mlxtune.recipe import DataRecipe


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation: messages of `role` and a text `content`, as `messages.clean` makes them; the tools offered in it.

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


@dataclass(frozen=True, slots=True)
class Format:
    """How rows with the columns `needed` are read; those of `optional` are read too where a row has them."""

    needed: tuple[str, ...]
    optional: tuple[str, ...]
    read: Callable[[Row], Example]

    def __str__(self) -> str:
        return " + ".join(f"`{name}`" for name in self.needed)


def reader(rows: Sequence[Row], data: DataRecipe) -> Callable[[Row], Example]:
    """How to read each row of one file: in the format that most of `rows` have.

    It raises DataError with the row's place, also for a row of another format. Raises RecipeError as `to_example`.
    """
    if columns.wanted(data) is not None:
        return lambda row: to_example(row, data)
    votes = Counter(each.needed for row in rows if (each := format_of(row)) is not None)
    if not votes:
        return lambda row: to_example(row, data)
    most = next(each for each in FORMATS if each.needed == votes.most_common(1)[0][0])

    def read(row: Row) -> Example:
        if format_of(row) is not most:
            what = f"has the columns {columns.named(row)}; the other rows of this file have {most}"
            raise DataError(what, where=row.where, hint="write all rows of a file in one format")
        return most.read(row)

    return read


def to_example(row: Row, data: DataRecipe) -> Example:
    """The example in a row. Raises DataError with the row's place, RecipeError for a malformed `data`."""
    texts = columns.wanted(data)
    if texts is not None:
        prompt, completion = texts
        return Completion(columns.filled(prompt, row), columns.filled(completion, row))
    found = format_of(row)
    if found is None:
        raise _unknown(row)
    return found.read(row)


def format_of(row: Row) -> Format | None:
    """The first format whose columns a row has; a row that has a value in each of them comes before one with gaps."""
    filled = {name for name, value in row.value.items() if value is not None}
    for names in (filled, set(row.value)):
        for each in FORMATS:
            if names.issuperset(each.needed):
                return each
    return None


def _unknown(row: Row) -> DataError:
    known = ", or ".join(str(each) for each in FORMATS)
    what = f"has the columns {columns.named(row)}; expected {known}"
    return DataError(what, where=row.where, hint=_nearest(row))


def _nearest(row: Row) -> str:
    """What could make examples of rows in no known format."""
    names = [name for each in FORMATS for name in each.needed]
    for name in row.value:
        near = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.8)
        if near and near[0] not in row.value:
            return f"rename `{name}` to `{near[0]}`, or set data.prompt and data.completion in the recipe"
    asked = next((name for name in ASKED if name in row.value), None)
    answered = next((name for name in ANSWERED if name in row.value and name != asked), None)
    if asked and answered:
        return f"set data.prompt to {asked} and data.completion to {answered} in the recipe"
    return "rename its columns, or set data.prompt and data.completion in the recipe"


def kept(row: Row, data: DataRecipe) -> bool:
    """Whether `data.keep` keeps a row. Raises DataError if a column that it names is missing."""
    for column, values in data.keep.items():
        if column not in row.value:
            what = f"has no column `{column}`, which data.keep names"
            raise DataError(what, where=row.where, hint=f"it has {columns.named(row)}")
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


def as_chat(example: Completion) -> Chat:
    """A prompt and its answer as the conversation that a chat template is given."""
    return Chat([{"role": "user", "content": example.prompt}, {"role": "assistant", "content": example.completion}])


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
    """The answer that an example teaches last, each tool call as JSON on a line of its own; None for plain text."""
    if isinstance(example, Chat):
        answer = example.messages[last_learned(example)]
        return "\n".join([*filter(None, [answer["content"]]), *written_calls(answer)])
    return example.completion if isinstance(example, Completion) else None


def _text(row: Row, column: str) -> str:
    value = row.value[column]
    if not isinstance(value, str):
        raise DataError(f"`{column}` is {shown(value)}, not a text", where=row.where, hint="correct or delete the row")
    if not value.strip():
        raise DataError(f"`{column}` is empty", where=row.where, hint="fill it in or delete the row")
    return checked_text(row.where, f"`{column}`", value)


def _chat(row: Row) -> Example:
    return _conversation(row, row.value["messages"])


def _sharegpt(row: Row) -> Example:
    messages = from_conversations(row.where, row.value["conversations"])
    system = [{"role": "system", "content": _text(row, "system")}] if row.value.get("system") else []
    return _conversation(row, system + messages)


def _conversation(row: Row, messages: object) -> Chat:
    cleaned = clean(row.where, messages)
    if cleaned[-1]["role"] != "assistant":
        raise DataError(
            f"ends with the {cleaned[-1]['role']}", where=row.where, hint="end it with an assistant's answer"
        )
    if not any(is_learned(message) for message in cleaned):
        raise DataError(
            "has no token to learn: every answer has the weight 0", where=row.where, hint="give one the weight 1"
        )
    return Chat(cleaned, parse_tools(row.where, row.value.get("tools")))


def _completion(row: Row) -> Example:
    return Completion(_text(row, "prompt"), _text(row, "completion"))


def _alpaca(row: Row) -> Example:
    for column in ("system", "history"):
        if row.value.get(column):
            what = f"has a `{column}`, which is not read beside `instruction`"
            raise DataError(what, where=row.where, hint="write the conversation as `messages`")
    prompt = _text(row, "instruction")
    given = row.value.get("input")
    if given is not None and not isinstance(given, str):
        raise DataError(f"`input` is {shown(given)}, not a text", where=row.where, hint="correct or delete the row")
    prompt = f"{prompt}\n\n{_text(row, 'input')}" if given and given.strip() else prompt
    return Completion(prompt, _text(row, "output"))


def _plain(row: Row) -> Example:
    return Text(_text(row, "text"))


FORMATS = (
    Format(("messages",), ("tools",), _chat),
    Format(("conversations",), ("system", "tools"), _sharegpt),
    Format(("prompt", "completion"), (), _completion),
    Format(("instruction", "output"), ("input",), _alpaca),
    Format(("text",), (), _plain),
)
# what the columns of a question and its answer are often called, to guess what the recipe could name
ASKED = ("question", "query", "prompt", "instruction", "input", "ticket", "title", "text", "sentence", "request")
ANSWERED = (
    "answer", "response", "completion", "output", "reply", "solution", "label", "category", "intent", "summary",
)  # fmt: skip
