"""An Example -> Samples: tokens, and which of them are learned. Knows a tokenizer, not a model.

What is learned of a conversation is each answer, as its chat template writes it (see `turns`), and the end-of-turn
token behind it. Answers that the text of the whole conversation has as a model would be asked for them share one
sample; each other one gets a sample of its own, which ends with it. A row for which this cannot be shown is refused.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mlxtune.data.files import Row, first_of
from mlxtune.data.formats import Chat, Completion, Example, Text, as_chat, is_learned
from mlxtune.data.turns import Turn, find_turn, learned_turns, whole_text
from mlxtune.errors import DataError, ModelError
from mlxtune.recipe import DataRecipe

RECIPE_LIMIT = "train.max_seq_length"
_HALF_CHARACTER = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Sample:
    """Tokens of a row, or of a part of one; `trained[t]` says whether token t is a target. Both have length T.

    The last learned answer's text is `answer`, and the `prompt_length` tokens before it ask for it; plain text has
    None and 0. `notes` say what was done to the row, and `cut` that tokens of it are missing or in another sample.
    """

    where: str
    tokens: list[int]
    trained: list[bool]
    prompt_length: int
    answer: str | None
    notes: tuple[str, ...] = ()
    cut: bool = False

    @property
    def trained_count(self) -> int:
        """How many tokens are scored: nothing comes before the first one, so it never is."""
        return sum(self.trained[1:])


@dataclass(frozen=True, slots=True)
class Rendered:
    """The samples of a file; the places of what was too long and left out, of what was cut, and of what was empty."""

    samples: list[Sample]
    too_long: list[str]
    cut: list[str]
    empty: list[str]

    @property
    def losses(self) -> str:
        """What was not taken as it stands: `2 too long, left out; 3 cut to fit`."""
        counts = (
            (self.too_long, "too long, left out"),
            (self.cut, "cut to fit"),
            (self.empty, "with nothing to learn, left out"),
        )
        return "; ".join(f"{len(set(places))} {what}" for places, what in counts if places)


@dataclass(frozen=True, slots=True)
class Limit:
    """The longest sample in tokens, and what sets it."""

    tokens: int
    name: str = RECIPE_LIMIT

    @staticmethod
    def of(max_seq_length: int, context: int | None) -> "Limit":
        """The recipe's limit, or the context that the model was made for where that is shorter."""
        if context is not None and context < max_seq_length:
            return Limit(context, "the model's context of")
        return Limit(max_seq_length)


@dataclass(frozen=True, slots=True)
class _Reader:
    """What turns texts into tokens: the tokenizer, the texts of its control tokens, and the tokens that end a turn.

    `control` finds any of these texts: a tokenizer can have hundreds, and every text of every row is searched.
    """

    tokenizer: Any
    controls: list[str]
    control: re.Pattern[str]
    closing: set[int]


def render(
    rows: Sequence[tuple[Row, Example]],
    tokenizer: Any,
    ends: set[int],
    data: DataRecipe,
    limit: Limit,
    on_row: Callable[[int], None] = lambda done: None,
) -> Rendered:
    """Samples of all rows. `tokenizer` is a fast tokenizer of transformers, `ends` its end-of-turn tokens.

    An answer of weight 0 is never learned, also with `data.mask_prompt` false. What is longer than `limit` is treated
    as `data.too_long` says; `truncate` cuts prompts from the left and never an answer, and makes several samples of a
    long plain text. Raises DataError for a row that cannot be rendered exactly, and for samples that are too long
    where that is an error; ModelError for a tokenizer that does not say where its tokens stand in the text.
    """
    added = {token_id: str(token) for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    controls = list(added.values())
    control = re.compile("|".join(map(re.escape, controls)) or "(?!)")
    reader = _Reader(tokenizer, controls, control, {*ends, *added, *tokenizer.all_special_ids})
    unreadable = [error for row, example in rows if (error := _unreadable(row.where, example, reader)) is not None]
    if unreadable:
        raise first_of(unreadable)
    found = Rendered([], [], [], [])
    too_long: list[Sample] = []
    for done, (row, example) in enumerate(rows, start=1):
        samples = _samples(row.where, example, reader, data)
        if data.too_long == "truncate" and any(len(each.tokens) > limit.tokens for each in samples):
            samples = _cut(samples, row.where, example, reader, data, limit.tokens)
        for sample in samples:
            if not any(sample.trained[1:]):
                found.empty.append(sample.where)
            elif len(sample.tokens) > limit.tokens:
                too_long.append(sample)
            else:
                found.samples.append(sample)
                found.cut.extend([sample.where] * sample.cut)
        on_row(done)
    if too_long and data.too_long == "error":
        longest = max(too_long, key=lambda each: len(each.tokens))
        count = len({each.where for each in too_long})
        raise DataError(
            f"has {len(longest.tokens)} tokens, more than {limit.name} {limit.tokens} ({count} such rows)",
            where=longest.where,
            hint=f"set max_seq_length to {len(longest.tokens)}, or data.too_long to drop or truncate"
            if limit.name == RECIPE_LIMIT
            else "set data.too_long to drop or truncate",
        )
    found.too_long.extend(each.where for each in too_long)
    return found


def _unreadable(where: str, example: Example, reader: _Reader) -> DataError | None:
    """What keeps a row's texts from being read as they stand."""
    texts = list(_texts(example))
    if any(_HALF_CHARACTER.search(text) for text in texts):
        return DataError("holds half a character (a lone surrogate)", where=where, hint="delete it")
    control = next((found[0] for text in texts if (found := reader.control.search(text))), None)
    if control is not None:
        what = f"holds the text {control!r}, which this tokenizer reads as a control token"
        return DataError(what, where=where, hint="delete it")
    return None


def _texts(value: Any) -> Iterator[str]:
    """Every text in an example, at any depth: contents, thoughts, tool calls, tools."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Chat):
        yield from _texts([value.messages, value.tools])
    elif isinstance(value, Completion):
        yield from (value.prompt, value.completion)
    elif isinstance(value, Text):
        yield value.text
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield str(name)
            yield from _texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner)


def _samples(where: str, example: Example, reader: _Reader, data: DataRecipe, apart: bool = False) -> list[Sample]:
    """The samples of one example; `apart`: a sample for each answer."""
    if isinstance(example, Text):
        tokens = [*_plain(reader.tokenizer, example.text), _end_of_text(where, reader.tokenizer)]
        return [Sample(where, tokens, [False] + [True] * (len(tokens) - 1), 0, None)]
    chat = example if isinstance(example, Chat) else as_chat(example)
    tokenizer = reader.tokenizer
    if tokenizer.chat_template is None:
        raise DataError(
            "needs a chat template, which this tokenizer has not", where=where, hint="set data.chat_template"
        )
    if not tokenizer.is_fast:
        raise ModelError("has no fast tokenizer (tokenizer.json), which exact masks need", where=tokenizer.name_or_path)
    numbers = learned_turns(chat, data.learn)
    if not numbers:
        raise DataError("has no token to learn", where=where, hint="give it an answer or delete it")
    if not data.mask_prompt:
        return [_unmasked(where, chat, numbers, reader)]
    return _masked(where, chat, numbers, reader, apart)


def _plain(tokenizer: Any, text: str) -> list[int]:
    """Tokens of a text without the end that some tokenizers add of themselves."""
    tokens: list[int] = tokenizer.encode(text)
    return tokens[:-1] if tokens[-1:] == [tokenizer.eos_token_id] else tokens


def _end_of_text(where: str, tokenizer: Any) -> int:
    if tokenizer.eos_token_id is None:
        raise DataError("needs an end-of-text token, which this tokenizer does not name", where=where)
    return int(tokenizer.eos_token_id)


@dataclass(frozen=True, slots=True)
class _Encoded:
    """A text's tokens, and the characters `[begin, end)` of the text that each stands for."""

    text: str
    tokens: list[int]
    offsets: list[tuple[int, int]]


def _encoded(text: str, reader: _Reader) -> _Encoded:
    found = reader.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return _Encoded(text, found["input_ids"], found["offset_mapping"])


def _masked(where: str, chat: Chat, numbers: list[int], reader: _Reader, apart: bool) -> list[Sample]:
    """The answers `numbers` of a conversation: one sample of those that its whole text has, and one for each other."""
    whole = _encoded(whole_text(where, chat, reader.tokenizer), reader)
    shared: list[tuple[Turn, int]] = []
    samples: list[tuple[int, Sample]] = []
    for place, number in enumerate(numbers, start=1):
        turn = find_turn(where, chat, number, reader.tokenizer, reader.controls)
        first = _first_token(whole, turn, reader) if whole.text.startswith(turn.text[: turn.stop]) else None
        if first is not None and not apart:
            shared.append((turn, first))
            continue
        own = _encoded(turn.text, reader)
        first = _first_token(own, turn, reader)
        if first is None:
            own, first = _joined(where, own, turn, chat, reader)
        note = f"answer {place} of {len(numbers)}, in a sample of its own"
        sample = _sample(where, chat, own, [(turn, first)], reader)
        samples.append((number, replace(sample, notes=(note,) if len(numbers) > 1 else ())))
    if shared:
        samples.append((shared[-1][0].number, _sample(where, chat, whole, shared, reader)))
    return [sample for _, sample in sorted(samples, key=lambda each: each[0])]


def _unmasked(where: str, chat: Chat, numbers: list[int], reader: _Reader) -> Sample:
    """The whole text of a conversation, all of it learned but for its first token and the answers of weight 0."""
    whole = _encoded(whole_text(where, chat, reader.tokenizer), reader)

    def found(number: int) -> tuple[Turn, int]:
        turn = find_turn(where, chat, number, reader.tokenizer, reader.controls)
        first = _first_token(whole, turn, reader) if whole.text.startswith(turn.text[: turn.stop]) else None
        if first is None:
            raise DataError(
                f"message {number + 1}: the chat template writes it otherwise in the whole conversation",
                where=where,
                hint="leave data.mask_prompt on, or split the conversation",
            )
        return turn, first

    answers = [number for number, message in enumerate(chat.messages) if message["role"] == "assistant"]
    hidden = [found(number) for number in answers if not is_learned(chat.messages[number])]
    weightless = _sample(where, chat, whole, hidden, reader).trained if hidden else [False] * len(whole.tokens)
    sample = _sample(where, chat, whole, [found(numbers[-1])], reader)
    return replace(sample, trained=[place > 0 and not hide for place, hide in enumerate(weightless)])


def _first_token(encoded: _Encoded, turn: Turn, reader: _Reader) -> int | None:
    """The index of an answer's first token: behind the tokens of the text that asks for it; None if they merge."""
    prompt = reader.tokenizer.encode(turn.text[: turn.asked], add_special_tokens=False)
    first, written = len(prompt), turn.text[turn.asked :]
    # a control token may take the white space behind it with it, as in Phi-3: then the answer starts later
    starts = turn.asked + len(written) - len(written.lstrip())
    return first if encoded.tokens[:first] == prompt and encoded.offsets[first][0] <= starts else None


def _joined(where: str, encoded: _Encoded, turn: Turn, chat: Chat, reader: _Reader) -> tuple[_Encoded, int]:
    """The tokens that ask and those of the answer, one behind the other, where the text as a whole would merge them.

    That is what a model meets: it is asked with the former and says the latter. Raises DataError where they do not
    read the same as the whole text.
    """
    prompt, rest = _encoded(turn.text[: turn.asked], reader), _encoded(turn.text[turn.asked :], reader)
    tokens = prompt.tokens + rest.tokens
    if reader.tokenizer.decode(tokens) != reader.tokenizer.decode(encoded.tokens):
        raise DataError(
            f"message {turn.number + 1}: its beginning and the end of the generation prompt make one token",
            where=where,
            hint="delete the white space at the start of this answer"
            if chat.messages[turn.number]["content"][:1].isspace()
            else None,
        )
    offsets = [(begin + turn.asked, end + turn.asked) for begin, end in rest.offsets]
    return _Encoded(turn.text, tokens, prompt.offsets + offsets), len(prompt.tokens)


def _sample(where: str, chat: Chat, encoded: _Encoded, turns: list[tuple[Turn, int]], reader: _Reader) -> Sample:
    """The sample of a text in which the answers `turns`, each with its first token, are learned, and their ends."""
    trained = [False] * len(encoded.tokens)
    for turn, first in turns:
        last = _end_of_turn(where, f"message {turn.number + 1}", encoded, turn.stop, reader.closing)
        trained[first : last + 1] = [True] * (last + 1 - first)
    turn, first = turns[-1]
    return Sample(where, encoded.tokens, trained, first, _answer(chat, turn, encoded.text))


def _answer(chat: Chat, turn: Turn, text: str) -> str:
    """An answer's text; that of one with thoughts or tool calls as the template writes it."""
    message = chat.messages[turn.number]
    content: str = message["content"]
    plain = not message.get("tool_calls") and not message.get("reasoning_content")
    return content if plain else text[turn.asked : turn.stop]


def _end_of_turn(where: str, at: str, encoded: _Encoded, stop: int, closing: set[int]) -> int:
    """Index of the token that ends the turn: the first end or control token behind the answer, only space between."""
    for index, (begin, _) in enumerate(encoded.offsets):
        if begin < stop:
            continue
        if encoded.text[stop:begin].strip():
            break
        if encoded.tokens[index] in closing:
            return index
    raise DataError(
        f"{at}: no end-of-turn token follows it in the chat template", where=where, hint="use a model made for chat"
    )


def _cut(
    samples: list[Sample], where: str, example: Example, reader: _Reader, data: DataRecipe, limit: int
) -> list[Sample]:
    """The samples of an example, shortened to `limit` tokens where that takes nothing from an answer.

    A plain text is cut into several samples, each of which begins with the last token of the one before. Of a
    conversation the left of the prompt goes; where answers are in the way, each gets a sample of its own.
    """
    if isinstance(example, Text):
        return [piece for sample in samples for piece in _pieces(sample, limit)]
    begin = reader.tokenizer.bos_token_id
    shortened = [_without_left(sample, limit, begin) for sample in samples]
    if data.mask_prompt and any(len(each.tokens) > limit for each in shortened):
        shortened = [_without_left(each, limit, begin) for each in _samples(where, example, reader, data, apart=True)]
    return shortened


def _pieces(sample: Sample, limit: int) -> list[Sample]:
    starts = range(0, len(sample.tokens) - 1, limit - 1)
    parts = [sample.tokens[start : start + limit] for start in starts]
    return [
        Sample(
            sample.where,
            tokens,
            [False] + [True] * (len(tokens) - 1),
            0,
            None,
            (f"piece {number} of {len(parts)}: cut to fit",),
            cut=True,
        )
        for number, tokens in enumerate(parts, start=1)
    ]


def _without_left(sample: Sample, limit: int, begin: int | None) -> Sample:
    """A sample without as many tokens on its left as it has too many, but for a beginning-of-text token.

    It is returned as it is where an answer, or the token before it, would be among them.
    """
    kept = int(sample.tokens[0] == begin)
    surplus = len(sample.tokens) - limit
    if surplus <= 0 or kept + surplus > max(sample.trained.index(True) - (not kept), 0):
        return sample
    return replace(
        sample,
        tokens=sample.tokens[:kept] + sample.tokens[kept + surplus :],
        trained=sample.trained[:kept] + sample.trained[kept + surplus :],
        prompt_length=sample.prompt_length - surplus,
        notes=(*sample.notes, f"{surplus} tokens cut from the left of the prompt"),
        cut=True,
    )
