"""An Example -> a Sample: tokens, and which of them are learned. Knows a tokenizer, not a model.

With a chat template, the place of each answer is found in the template's own text: the rendering of the messages
before it, with the generation prompt, must be the beginning of the rendering of the whole. What is learned is the
answer's text and the end-of-turn token behind it. A row for which this cannot be shown is refused.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2

from mlxtune.data.files import Row, first_of
from mlxtune.data.formats import Chat, Completion, Example, Text, is_learned
from mlxtune.errors import DataError, ModelError
from mlxtune.recipe import DataRecipe


@dataclass(frozen=True, slots=True)
class Sample:
    """Tokens of one row; `trained[t]` says whether token t is a target. Both have length T.

    The last learned answer's text is `answer`, and the `prompt_length` tokens before it ask for it; plain text has
    None and 0.
    """

    where: str
    tokens: list[int]
    trained: list[bool]
    prompt_length: int
    answer: str | None

    @property
    def trained_count(self) -> int:
        """How many tokens are scored: nothing comes before the first one, so it never is."""
        return sum(self.trained[1:])


@dataclass(frozen=True, slots=True)
class Rendered:
    """The samples of a file, and the rows left out because they are too long."""

    samples: list[Sample]
    too_long: list[str]


def render(
    rows: Sequence[tuple[Row, Example]],
    tokenizer: Any,
    ends: set[int],
    data: DataRecipe,
    max_seq_length: int,
    on_row: Callable[[int], None] = lambda done: None,
) -> Rendered:
    """Samples of all rows. `tokenizer` is a fast tokenizer of transformers, `ends` its end-of-turn tokens.

    An answer of weight 0 is never learned, also with `data.mask_prompt` false. Raises DataError for a row that cannot
    be rendered exactly, and for rows longer than `max_seq_length` tokens unless `data.too_long` is `drop`; ModelError
    for a tokenizer that does not say where its tokens stand in the text.
    """
    added = {token_id: str(token) for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    controls = list(added.values())
    closing = {*ends, *added, *tokenizer.all_special_ids}
    unreadable = [error for row, example in rows if (error := _unreadable(row.where, example, controls)) is not None]
    if unreadable:
        raise first_of(unreadable)
    samples: list[Sample] = []
    too_long: list[tuple[str, int]] = []
    for done, (row, example) in enumerate(rows, start=1):
        sample = _sample(row.where, example, tokenizer, closing, data.mask_prompt)
        if len(sample.tokens) > max_seq_length:
            too_long.append((row.where, len(sample.tokens)))
        else:
            samples.append(sample)
        on_row(done)
    if too_long and data.too_long == "error":
        where, longest = max(too_long, key=lambda each: each[1])
        raise DataError(
            f"has {longest} tokens, more than train.max_seq_length {max_seq_length} ({len(too_long)} such rows)",
            where=where,
            hint=f"set max_seq_length to {longest}, or data.too_long to drop",
        )
    return Rendered(samples, [where for where, _ in too_long])


def _sample(where: str, example: Example, tokenizer: Any, closing: set[int], mask_prompt: bool) -> Sample:
    if isinstance(example, Text):
        tokens = [*_plain(tokenizer, example.text), _end_of_text(where, tokenizer)]
        return Sample(where, tokens, [False] + [True] * (len(tokens) - 1), 0, None)
    if isinstance(example, Completion) and tokenizer.chat_template is None:
        return _plain_completion(where, example, tokenizer, mask_prompt)
    chat = example if isinstance(example, Chat) else _as_chat(example)
    return _chat(where, chat, tokenizer, closing, mask_prompt)


def _as_chat(example: Completion) -> Chat:
    return Chat([{"role": "user", "content": example.prompt}, {"role": "assistant", "content": example.completion}])


def _unreadable(where: str, example: Example, controls: list[str]) -> DataError | None:
    """What keeps a row's texts from being read as they stand."""
    texts = (
        [str(message["content"]) for message in example.messages]
        if isinstance(example, Chat)
        else [example.prompt, example.completion] if isinstance(example, Completion) else [example.text]
    )  # fmt: skip
    if any("\ud800" <= character <= "\udfff" for text in texts for character in text):
        return DataError("holds half a character (a lone surrogate)", where=where, hint="delete it")
    for text, control in itertools.product(texts, controls):
        if control in text:
            what = f"holds the text {control!r}, which this tokenizer reads as a control token"
            return DataError(what, where=where, hint="delete it")
    return None


def _plain(tokenizer: Any, text: str) -> list[int]:
    """Tokens of a text without the end that some tokenizers add of themselves."""
    tokens: list[int] = tokenizer.encode(text)
    return tokens[:-1] if tokens[-1:] == [tokenizer.eos_token_id] else tokens


def _end_of_text(where: str, tokenizer: Any) -> int:
    if tokenizer.eos_token_id is None:
        raise DataError("needs an end-of-text token, which this tokenizer does not name", where=where)
    return int(tokenizer.eos_token_id)


def _plain_completion(where: str, example: Completion, tokenizer: Any, mask_prompt: bool) -> Sample:
    prompt = _plain(tokenizer, example.prompt)
    tokens = _plain(tokenizer, example.prompt + example.completion)
    if tokens[: len(prompt)] != prompt:
        raise DataError(
            "the end of the prompt and the start of the answer make one token",
            where=where,
            hint="move the space from the prompt's end to the answer's start",
        )
    tokens = [*tokens, _end_of_text(where, tokenizer)]
    trained = [position >= (len(prompt) if mask_prompt else 1) for position in range(len(tokens))]
    return Sample(where, tokens, trained, len(prompt), example.completion)


def _chat(where: str, chat: Chat, tokenizer: Any, closing: set[int], mask_prompt: bool) -> Sample:
    if tokenizer.chat_template is None:
        raise DataError(
            "has messages, but the tokenizer has no chat template",
            where=where,
            hint="use prompt/completion rows, or a model made for chat",
        )
    if not tokenizer.is_fast:
        raise ModelError("has no fast tokenizer (tokenizer.json), which exact masks need", where=tokenizer.name_or_path)
    text = _template(where, chat, chat.messages, tokenizer, ask=False)
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    tokens, offsets = encoding["input_ids"], encoding["offset_mapping"]
    trained = [not mask_prompt and position > 0 for position in range(len(tokens))]
    prompt_length, answer = 0, None
    for number, message in enumerate(chat.messages):
        learned = is_learned(message)
        # where nothing else is learned, an answer of weight 0 need not be found: it may be one that cannot be
        if message["role"] != "assistant" or (mask_prompt and not learned):
            continue
        asked = _template(where, chat, chat.messages[:number], tokenizer, ask=True)
        if not text.startswith(asked):
            raise DataError(
                f"message {number + 1}: the chat template renders the messages before it otherwise once it is there",
                where=where,
                hint="split the conversation so that this answer comes last"
                if number + 1 < len(chat.messages)
                else "put a system prompt into the question, or set data.chat_template to one without thoughts",
            )
        content = message["content"]
        start = len(asked) + _find_answer(where, number, text[len(asked) :], content)
        last = _end_of_turn(where, number, offsets, tokens, start + len(content.strip()), text, closing)
        prompt = tokenizer.encode(asked, add_special_tokens=False)
        first = len(prompt)
        # a control token may take the white space behind it with it, as in Phi-3: then the answer starts later
        if tokens[:first] != prompt or offsets[first][0] > start:
            raise DataError(
                f"message {number + 1}: its beginning and the end of the generation prompt make one token",
                where=where,
                hint="delete the white space at the start of this answer" if content[:1].isspace() else None,
            )
        trained[first : last + 1] = [learned] * (last + 1 - first)
        if learned:
            prompt_length, answer = first, content
    if answer is None:
        raise DataError("has no token to learn", where=where, hint="give it an answer or delete it")
    return Sample(where, tokens, trained, prompt_length, answer)


def _template(where: str, chat: Chat, messages: list[dict[str, Any]], tokenizer: Any, *, ask: bool) -> str:
    """The template's text. Answers of examples hold no thoughts, so a template that can ask without them does."""
    shown = [{name: value for name, value in message.items() if name != "weight"} for message in messages]
    try:
        return str(
            tokenizer.apply_chat_template(
                shown, tools=chat.tools or None, add_generation_prompt=ask, tokenize=False, enable_thinking=False
            )
        )
    except (jinja2.TemplateError, ValueError, TypeError) as error:
        raise DataError(f"the chat template refuses it: {error}", where=where) from None


def _find_answer(where: str, number: int, rest: str, answer: str) -> int:
    """Where the answer starts in `rest`, the text behind the generation prompt: at its start, white space aside."""
    found = len(rest) - len(rest.lstrip())
    if not rest[found:].startswith(answer.strip()):
        raise DataError(f"message {number + 1}: the chat template changes this answer", where=where)
    return found


def _end_of_turn(
    where: str,
    number: int,
    offsets: list[tuple[int, int]],
    tokens: list[int],
    stop: int,
    text: str,
    closing: set[int],
) -> int:
    """Index of the token that ends the turn: the first end or control token behind the answer, only space between."""
    for index, (begin, _) in enumerate(offsets):
        if begin < stop:
            continue
        if text[stop:begin].strip():
            break
        if tokens[index] in closing:
            return index
    raise DataError(
        f"message {number + 1}: no end-of-turn token follows it in the chat template",
        where=where,
        hint="use a model made for chat",
    )
