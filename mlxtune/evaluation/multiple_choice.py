"""Multiple-choice questions: which of the given answers a model finds likeliest. Knows rows of questions and a model.

Rows are those that lm-evaluation-harness's tasks have, and are scored as it scores them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlxtune import generate
from mlxtune.data.files import Row, first_of, read_rows
from mlxtune.errors import DataError
from mlxtune.evaluation import choices
from mlxtune.metrics.intervals import share
from mlxtune.model import LanguageModel
from mlxtune.report.score import Score

ASKED = ("question", "query", "ctx")
CHOICES = ("choices", "endings")
ANSWERED = ("answer", "gold", "label", "answerKey")
EXPECTED = 'e.g. {"question": "…", "choices": ["…", "…"], "answer": 0}'


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A `prompt`, texts that may continue it, at least two, and the number of the right one."""

    where: str
    prompt: str
    choices: tuple[str, ...]
    right: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """`scores`: `acc`, the share of questions whose right answer is the likeliest, and `acc_norm`, likeliest by its
    characters. `chosen`: the likeliest answer of each question, first as for `acc`, then as for `acc_norm`.
    """

    scores: list[Score]
    chosen: list[tuple[int, int]]


def read(path: Path) -> list[Question]:
    """The questions of a file. Raises DataError for the first row that is none, saying how many more there are."""
    questions: list[Question] = []
    mistakes: list[DataError] = []
    for row in read_rows(path):
        try:
            questions.append(question(row))
        except DataError as error:
            mistakes.append(error)
    if mistakes:
        raise first_of(mistakes)
    return questions


def question(row: Row) -> Question:
    """The question in a row: `question`, `query` or `ctx`; `choices` as a list of texts, or as `text` and `label`;
    `answer`, `gold`, `label` or `answerKey` as a number from 0, or as a letter or other label of a choice.

    A `question` is asked as `Question: …`, `Answer:`; other texts are continued as they stand. Raises DataError.
    """
    asked = next((name for name in ASKED if isinstance(row.value.get(name), str)), None)
    if asked is None:
        raise DataError("asks no `question`, `query` or `ctx`", where=row.where, hint=EXPECTED)
    text = row.value[asked]
    texts, labels = _choices(row)
    return Question(
        where=row.where,
        prompt=f"Question: {text}\nAnswer:" if asked == "question" else text,
        choices=tuple(texts),
        right=_right(row, labels),
    )


def _choices(row: Row) -> tuple[list[str], list[str]]:
    """The choices' texts and labels: those that the row gives, else letters."""
    value = next((row.value[name] for name in CHOICES if name in row.value), None)
    given = value.get("label") if isinstance(value, dict) else None
    texts = value.get("text") if isinstance(value, dict) else value
    if not isinstance(texts, list) or len(texts) < 2 or not all(isinstance(each, str) and each for each in texts):
        raise DataError("has no `choices`: two texts or more", where=row.where, hint=EXPECTED)
    labels = [chr(ord("A") + place) for place in range(len(texts))] if given is None else given
    if not isinstance(labels, list) or len(labels) != len(texts) or len(set(map(str, labels))) != len(labels):
        raise DataError("has other labels than choices", where=row.where, hint=EXPECTED)
    return texts, [str(label) for label in labels]


def _right(row: Row, labels: Sequence[str]) -> int:
    value: Any = next((row.value[name] for name in ANSWERED if row.value.get(name) is not None), None)
    if isinstance(value, str) and value in labels:
        return labels.index(value)
    if isinstance(value, str) and value.strip().isdecimal():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < len(labels):
        raise DataError(f"has no right answer among its {len(labels)} choices", where=row.where, hint=EXPECTED)
    return value


def measure(
    lm: LanguageModel, questions: Sequence[Question], on_row: Callable[[int, int], None] = lambda done, total: None
) -> Result:
    """Chooses by log P(" " + choice | prompt), and by that over the characters of the choice; Wilson's intervals.

    As lm-evaluation-harness does: tokens of prompt and choice together, those behind the prompt's own are scored.
    Where a row is longer than the model's context, the left of its prompt goes. Raises DataError for no questions.
    """
    if not questions:
        raise DataError("there are no questions", hint=EXPECTED)
    pairs = [[pair(lm, each.prompt, f" {choice}") for choice in each.choices] for each in questions]
    nats = grouped_nats(lm, pairs, lambda done: on_row(done, len(questions)))
    chosen = []
    for each, found in zip(questions, nats, strict=True):
        by_length = found / np.array([len(choice) for choice in each.choices])
        chosen.append((int(found.argmin()), int(by_length.argmin())))
    right = [(one == each.right, other == each.right) for each, (one, other) in zip(questions, chosen, strict=True)]
    acc, acc_norm = (sum(column) for column in zip(*right, strict=True))
    return Result(
        scores=[share("acc", acc, len(questions)), share("acc_norm", acc_norm, len(questions))], chosen=chosen
    )


Pair = tuple[list[int], list[int]]


def pair(lm: LanguageModel, prompt: str, continuation: str) -> Pair:
    """Tokens that are read and tokens that are scored: those of both texts together, cut behind the prompt's own.

    White space at the prompt's end belongs to the continuation. An empty prompt is the beginning- or end-of-text
    token. What does not fit into the model's context goes from the left, and a token is always read.
    """
    bare = prompt.rstrip()
    continuation, prompt = prompt[len(bare) :] + continuation, bare
    whole = generate.text_tokens(lm, prompt + continuation)
    at = len(generate.text_tokens(lm, prompt)) if prompt else len(whole) - len(_unbegun(lm, continuation))
    if at == 0:
        whole, at = [beginning(lm), *whole], 1
    at = min(at, len(whole) - 1)
    most = lm.context_length or len(whole)
    surplus = min(max(0, len(whole) - 1 - most), at - 1)
    return whole[surplus:at], whole[at : at + most]


def _unbegun(lm: LanguageModel, text: str) -> list[int]:
    return list(lm.tokenizer.encode(text, add_special_tokens=False))


def beginning(lm: LanguageModel) -> int:
    """The token that stands before a text that nothing comes before."""
    token = lm.tokenizer.bos_token_id
    return int(token if token is not None else lm.tokenizer.eos_token_id)


def grouped_nats(lm: LanguageModel, pairs: Sequence[Sequence[Pair]], on_row: Callable[[int], None]) -> list[Any]:
    """Nats (C,) of each row's continuations; each different prompt of a row is read once."""
    return [each.nats for each in grouped(lm, pairs, on_row)]


def grouped(lm: LanguageModel, pairs: Sequence[Sequence[Pair]], on_row: Callable[[int], None]) -> list[choices.Read]:
    """As `choices.read`, of pairs whose prompts may differ within a row."""
    prompts: dict[tuple[int, ...], int] = {}
    continuations: list[list[list[int]]] = []
    places: list[list[tuple[int, int]]] = []
    for row in pairs:
        places.append([])
        for prompt, continuation in row:
            number = prompts.setdefault(tuple(prompt), len(prompts))
            if number == len(continuations):
                continuations.append([])
            places[-1].append((number, len(continuations[number])))
            continuations[number].append(continuation)
    share = len(pairs) / max(1, len(prompts))
    found = choices.read(lm.net, list(prompts), continuations, on_row=lambda done: on_row(int(done * share)))
    return [
        choices.Read(
            np.array([found[number].nats[at] for number, at in row]),
            np.array([found[number].right[at] for number, at in row]),
        )
        for row in places
    ]
