"""The same row asked in other ways: with a better prompt, with examples, with passages. Knows texts, not models.

What is expected of a row never changes, so all candidates are scored on the same answers.
"""

import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from mlxtune.data import columns
from mlxtune.data.files import Row
from mlxtune.data.formats import Chat, Completion, Example, Text, answer_text, as_chat, last_learned
from mlxtune.data.labels import find_labels, label_in
from mlxtune.errors import DataError, RecipeError

MOST_LABELS = 100  # that a prompt names
PASSAGES = "Use what these passages say where it helps."


def label_prompt(labels: Sequence[str], *, alone: bool) -> str | None:
    """A prompt that names the labels; `alone`: they are the whole answer. None without labels, or with too many."""
    if not 2 <= len(labels) <= MOST_LABELS:
        return None
    how = "Answer with exactly one of these labels" if alone else "Begin the answer with one of these labels"
    return f"{how}: {', '.join(labels)}."


def check_prompt(prompt: str) -> None:
    """Refuses a `compare.prompt` that cannot be filled in. Raises RecipeError."""
    if not prompt.strip():
        raise RecipeError("is empty", where="compare.prompt", hint="write a system message, or leave it out")
    if _is_template(prompt):
        filled = _filled(prompt, "a question", "compare.prompt")
        if "a question" not in filled:
            raise RecipeError("has no {{ prompt }}", where="compare.prompt", hint="put {{ prompt }} where the row goes")


def with_prompt(example: Example, prompt: str, where: str, *, system: bool = True) -> Example:
    """The row with a better prompt. Plain text stays as it is.

    A Jinja text takes the place of what is asked last, which it gets as `prompt`. Other texts become a system message
    of a conversation, behind its own; where templates know no `system`, and of a prompt and its answer, they stand
    before what is asked last.
    """
    if isinstance(example, Text):
        return example
    if _is_template(prompt):
        return _asked_otherwise(example, lambda asked: _filled(prompt, asked, where))
    if isinstance(example, Completion) or not system:
        return _asked_otherwise(example, lambda asked: f"{prompt}\n\n{asked}")
    own = example.messages[0] if example.messages[0]["role"] == "system" else None
    message = {"role": "system", "content": f"{own['content']}\n\n{prompt}" if own is not None else prompt}
    return Chat([message, *example.messages[own is not None :]], example.tools)


def with_examples(example: Example, shown: Sequence[Example]) -> Example:
    """The row behind `shown` ones, the best first, as earlier turns of the conversation: the best stands last.

    Their answers are context and never scored. A system message of theirs is left out where the row has its own, and
    so is what is not a conversation.
    """
    if isinstance(example, Text) or not shown:
        return example
    chat = example if isinstance(example, Chat) else as_chat(example)
    system = [message for message in chat.messages[:1] if message["role"] == "system"]
    turns: list[dict[str, Any]] = []
    for each in reversed(shown):
        turns += _as_context(each)
    return Chat([*system, *turns, *chat.messages[len(system) :]], chat.tools)


def with_passages(example: Example, passages: Sequence[str]) -> Example:
    """The row with passages, the best first, before what is asked last; the best stands next to the question."""
    if isinstance(example, Text) or not passages:
        return example
    shown = "\n\n".join([PASSAGES, *reversed(passages)])
    return _asked_otherwise(example, lambda asked: f"{shown}\n\n{asked}")


def fixed_examples(answers: Sequence[str | None], count: int, label: str | None, seed: int) -> list[int]:
    """The places of `count` rows that are shown for every question: as many of each label as of any other.

    `answers` are those of the training rows, None for plain text. The label is what the pattern `label` finds, else
    the whole answer where answers repeat. Drawn from `seed` alone; the labels take turns in an order drawn too.
    """
    draw = random.Random(seed)
    strata: dict[str | None, list[int]] = defaultdict(list)
    usable = [place for place, answer in enumerate(answers) if answer is not None]
    texts = {place: (answers[place] or "").strip() for place in usable}
    repeats = len(set(texts.values())) <= len(usable) / 2
    for place in usable:
        key = label_in(answers[place], label) if label is not None else texts[place] if repeats else None
        strata[key].append(place)
    groups = [strata[key] for key in sorted(strata, key=str)]
    for group in groups:
        draw.shuffle(group)
    draw.shuffle(groups)
    found = []
    for turn in range(max(map(len, groups), default=0)):
        found += [group[turn] for group in groups if turn < len(group)]
    return found[:count]


def labels_of(answers: Sequence[str | None], pattern: str | None) -> tuple[list[str], bool]:
    """The labels in some answers, sorted, and whether they are the whole answers; none where answers give no labels.

    Raises InputError for a bad pattern.
    """
    given = [answer for answer in answers if answer is not None]
    found = find_labels(given, pattern) or []
    alone = all(label == answer.strip() for label, answer in zip(found, given, strict=False))
    return sorted({label for label in found if label is not None}), alone


def messages_asked(example: Example) -> list[dict[str, Any]]:
    """The messages that ask for a row's last answer. Raises ValueError for plain text."""
    if isinstance(example, Text):
        raise ValueError("plain text asks nothing")
    chat = example if isinstance(example, Chat) else as_chat(example)
    return chat.messages[: last_learned(chat)]


def _as_context(example: Example) -> list[dict[str, Any]]:
    """The messages of an example up to its last answer, none of which is learned."""
    if isinstance(example, Text) or answer_text(example) is None:
        return []
    chat = example if isinstance(example, Chat) else as_chat(example)
    kept = [message for message in chat.messages[: last_learned(chat) + 1] if message["role"] != "system"]
    return [{**message, "weight": 0} if message["role"] == "assistant" else message for message in kept]


def _asked_otherwise(example: Example, change: Callable[[str], str]) -> Example:
    """The example with what is asked last changed."""
    if isinstance(example, Completion):
        return Completion(change(example.prompt), example.completion)
    assert isinstance(example, Chat)
    last = last_learned(example)
    asked = [number for number in range(last) if example.messages[number]["role"] == "user"]
    if not asked:
        return example
    changed = {**example.messages[asked[-1]], "content": change(example.messages[asked[-1]]["content"])}
    return Chat([*example.messages[: asked[-1]], changed, *example.messages[asked[-1] + 1 :]], example.tools)


def _is_template(prompt: str) -> bool:
    return "{{" in prompt or "{%" in prompt


def _filled(prompt: str, asked: str, where: str) -> str:
    """The Jinja text `prompt`, rendered in a sandbox with the question. Raises RecipeError."""
    try:
        return columns.filled(prompt, Row(where, 1, {"prompt": asked}))
    except (RecipeError, DataError) as error:
        hint = "{{ prompt }} is all that it is given"
        raise RecipeError(error.what.rstrip("."), where="compare.prompt", hint=hint) from None
