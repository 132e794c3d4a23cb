"""Where the answers of a conversation stand in the text of its chat template. Knows texts, not tokens.

Nothing is guessed: an answer is found by rendering. The messages before it, with the generation prompt, are what a
model is asked with; what the template writes behind them once the answer is there is what the model should say.
Where the template renders those messages otherwise once the answer is there (Mistral moves the system prompt, R1 and
Qwen3 drop or add thoughts), the text that asks is kept, and what the template writes for the answer is put behind it.
"""

import bisect
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2

from mlxtune.data.formats import Chat, is_learned
from mlxtune.errors import DataError

OPEN, CLOSE = "<think>", "</think>"
_OPENED = re.compile(rf"{OPEN}\s*\Z")
_CLOSED = re.compile(rf"(?:{OPEN}\s*)?{CLOSE}\s*\Z")  # no thought, or an empty one
_SAME = 8  # characters at the end of a prompt that must be there for its place to be known


@dataclass(frozen=True, slots=True)
class Turn:
    """One answer, the message `number` (from 0), in a text that ends with it.

    The first `asked` characters of `text` ask a model for it; the end-of-turn token follows behind `stop`, where the
    answer has ended, with only white space between.
    """

    number: int
    text: str
    asked: int
    stop: int


def whole_text(where: str, chat: Chat, tokenizer: Any) -> str:
    """The template's text of the whole conversation. Raises DataError where the template refuses it."""
    return _rendered(where, chat, chat.messages, tokenizer, thinks=_thinks(chat.messages[-1]))


def find_turn(where: str, chat: Chat, number: int, tokenizer: Any, controls: Sequence[str]) -> Turn:
    """The answer `number` of a conversation; `controls` are the texts of the tokenizer's control tokens.

    Raises DataError where it cannot be shown what a model that is asked would have to say.
    """
    message = chat.messages[number]
    thinks = _thinks(message)
    asked = _rendered(where, chat, chat.messages[:number], tokenizer, ask=True, thinks=thinks)
    said = _rendered(where, chat, chat.messages[: number + 1], tokenizer, thinks=thinks)
    at = f"message {number + 1}"
    if said.startswith(asked):
        written = said[len(asked) :]
    elif opened := _OPENED.search(asked):
        visible = _behind_another_prompt(where, at, asked[: opened.start()], said)
        written = _rest_of_thought(where, at, opened[0], visible, message)
    else:
        closed = _CLOSED.search(asked)
        written = _behind_another_prompt(where, at, asked[: closed.start()] if closed else asked, said)
    _refuse_changed(where, at, written, message)
    stop = _end_of_answer(where, at, written, message, controls)
    return Turn(number, asked + written, len(asked), len(asked) + stop)


def learned_turns(chat: Chat, learn: str) -> list[int]:
    """The numbers of the answers that are learned: all, or the last."""
    numbers = [number for number, message in enumerate(chat.messages) if is_learned(message)]
    return numbers[-1:] if learn == "last" else numbers


def _thinks(message: dict[str, Any]) -> bool:
    """Whether an answer holds its thoughts."""
    content = str(message["content"])
    return bool(message.get("reasoning_content")) or (OPEN in content and CLOSE in content)


def _spoken(message: dict[str, Any]) -> str:
    """An answer's thought and text, white space around them aside."""
    content: str = message["content"].strip()
    thought = message.get("reasoning_content")
    return f"{OPEN}\n{thought.strip()}\n{CLOSE}\n\n{content}" if thought else content


def _rendered(
    where: str, chat: Chat, messages: list[dict[str, Any]], tokenizer: Any, *, thinks: bool, ask: bool = False
) -> str:
    """The template's text. For an answer without thoughts, a template that can ask without them does."""
    shown = [{name: value for name, value in message.items() if name != "weight"} for message in messages]
    try:
        return str(
            tokenizer.apply_chat_template(
                shown, tools=chat.tools or None, add_generation_prompt=ask, tokenize=False, enable_thinking=thinks
            )
        )
    except (jinja2.TemplateError, ValueError, TypeError, AttributeError) as error:
        raise DataError(f"the chat template refuses it: {error}", where=where) from None


def _behind_another_prompt(where: str, at: str, prompt: str, said: str) -> str:
    """What the template writes for an answer where it writes another text before it than the `prompt`.

    The two must end alike, so that the answer's place is known: behind the longest end of the prompt that is there.
    """
    stripped = prompt.rstrip()
    gap = prompt[len(stripped) :]
    length = bisect.bisect_left(range(len(stripped)), True, key=lambda size: stripped[-size - 1 :] not in said)
    place = said.rfind(stripped[len(stripped) - length :])
    behind = said[place + length :]
    if length < min(_SAME, len(stripped)) or not behind.startswith(gap):
        raise DataError(
            f"{at}: the chat template renders the messages before it otherwise once it is there",
            where=where,
            hint="put a system prompt into the question, or set data.chat_template to a plainer one",
        )
    return behind[len(gap) :]


def _rest_of_thought(where: str, at: str, opened: str, visible: str, message: dict[str, Any]) -> str:
    """What follows a prompt that opens the thought itself, as R1's does: the rest of it, and what stays `visible`."""
    spoken = _spoken(message)
    thought, close, answer = spoken.partition(CLOSE)
    if not thought.startswith(OPEN) or not close:
        raise DataError(
            f"{at}: the chat template asks for a thought, and this answer has none",
            where=where,
            hint=f"begin the answer with {OPEN}…{CLOSE}, or set data.chat_template to one without thoughts",
        )
    if not visible.lstrip().startswith(answer.strip()):
        raise _changed(where, at)
    rest = spoken.removeprefix(opened if spoken.startswith(opened) else OPEN)
    return rest + visible.lstrip()[len(answer.strip()) :]


def _refuse_changed(where: str, at: str, written: str, message: dict[str, Any]) -> None:
    """Raises DataError unless an answer stands at the start of what is written for it, white space around it aside.

    A template may set a thought in lines of its own, or have opened it already, and may write tool calls behind a
    text: then all but the white space must be the same.
    """
    spoken = _spoken(message)
    if not _thinks(message) and not message.get("tool_calls"):
        same = written.lstrip().startswith(spoken)
    else:
        same = _bare(written).startswith(_bare(spoken))
    if not same:
        raise _changed(where, at)


def _end_of_answer(where: str, at: str, written: str, message: dict[str, Any], controls: Sequence[str]) -> int:
    """Where the answer ends in what is written for it."""
    if message.get("tool_calls"):
        return _end_of_calls(where, at, written, message, controls)
    answer = _spoken(message)
    start = len(written) - len(written.lstrip())
    if _thinks(message):
        answer = answer.rpartition(CLOSE)[2].strip()
        start = written.index(answer, written.rindex(CLOSE) + len(CLOSE))
    return start + len(answer)


def _end_of_calls(where: str, at: str, written: str, message: dict[str, Any], controls: Sequence[str]) -> int:
    """Where an answer's tool calls end: before the first control token behind the last one's name.

    The names must stand there in order, and every name and value of their arguments somewhere before the end.
    """
    place = 0
    for call in message["tool_calls"]:
        found = written.find(call["function"]["name"], place)
        if found < 0:
            raise DataError(
                f"{at}: the chat template does not write its call of {call['function']['name']}",
                where=where,
                hint="use a model that is made for tools",
            )
        place = found + len(call["function"]["name"])
    stop = min((found for each in controls if (found := written.find(each, place)) >= 0), default=len(written))
    calls = written[:stop].rstrip()
    for call in message["tool_calls"]:
        for value in _leaves(call["function"]["arguments"]):
            if value not in calls and json.dumps(value, ensure_ascii=False)[1:-1] not in calls:
                raise _changed(where, at)
    return len(calls)


def _leaves(value: Any) -> Iterator[str]:
    """The names, texts and whole numbers inside a call's arguments."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield str(name)
            yield from _leaves(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner)
    elif isinstance(value, str | int) and not isinstance(value, bool):
        yield str(value)


def _bare(text: str) -> str:
    """A text without white space and without the mark that opens a thought."""
    return "".join(text.split()).removeprefix(OPEN)


def _changed(where: str, at: str) -> DataError:
    return DataError(f"{at}: the chat template changes this answer", where=where)
