"""Multiple choice: rows as other harnesses write them, and the likelier answer by float64 softmax."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxtune import generate, model
from mlxtune.data.files import Row
from mlxtune.errors import DataError
from mlxtune.evaluation import multiple_choice
from mlxtune.evaluation.multiple_choice import Question, pair, question
from mlxtune.model import LanguageModel

ARC = {"question": "Why?", "choices": {"text": ["so", "not"], "label": ["A", "B"]}, "answerKey": "B"}


@pytest.fixture(scope="module")
def story(stories: Path) -> LanguageModel:
    return model.load(stories)


def by_hand(lm: LanguageModel, prompt: str, choice: str) -> float:
    """-log P(" " + choice | prompt) of the whole text's tokens, in float64."""
    start, tokens = len(generate.text_tokens(lm, prompt)), generate.text_tokens(lm, f"{prompt} {choice}")
    logits = np.array(lm.net(mx.array([tokens]))[0], dtype=np.float64)
    rates = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return -float(sum(rates[place - 1, tokens[place]] for place in range(start, len(tokens))))


@pytest.mark.parametrize(
    ("value", "prompt", "choices", "right"),
    [
        (ARC, "Question: Why?\nAnswer:", ("so", "not"), 1),
        ({**ARC, "choices": {"text": ["so", "not"], "label": ["1", "2"]}, "answerKey": "2"}, None, None, 1),
        ({"query": "A cat", "choices": ["sat", "ran"], "gold": 0}, "A cat", ("sat", "ran"), 0),
        ({"ctx": "A cat", "endings": ["sat", "ran", "hid"], "label": "2"}, "A cat", ("sat", "ran", "hid"), 2),
        ({"question": "Why?", "choices": ["so", "not"], "answer": "A"}, None, None, 0),
        ({"question": "Why?", "choices": ["so", "not"], "answer": 1, "label": 0}, None, None, 1),
    ],
)
def test_shapes_of_rows(value: dict[str, Any], prompt: str | None, choices: tuple[str, ...] | None, right: int) -> None:
    found = question(Row("q.jsonl", 3, value))
    assert (found.where, found.right) == ("q.jsonl:3", right)
    assert found.prompt == (prompt or "Question: Why?\nAnswer:")
    assert found.choices == (choices or ("so", "not"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question": None}, "asks no `question`, `query` or `ctx`"),
        ({"question": ["x"]}, "asks no `question`"),
        ({"choices": ["so"]}, "has no `choices`: two texts or more"),
        ({"choices": ["so", ""]}, "has no `choices`"),
        ({"choices": ["so", 3]}, "has no `choices`"),
        ({"choices": "so"}, "has no `choices`"),
        ({"choices": {"text": ["so", "not"], "label": ["A"]}}, "has other labels than choices"),
        ({"choices": {"text": ["so", "not"], "label": ["A", "A"]}}, "has other labels than choices"),
        ({"answerKey": "C"}, "has no right answer among its 2 choices"),
        ({"answerKey": 2}, "has no right answer"),
        ({"answerKey": -1}, "has no right answer"),
        ({"answerKey": True}, "has no right answer"),
        ({"answerKey": None}, "has no right answer"),
    ],
)
def test_rows_that_ask_nothing(change: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        question(Row("q.jsonl", 3, ARC | change))
    assert caught.value.where == "q.jsonl:3"


def test_a_file(tmp_path: Path) -> None:
    file = tmp_path / "q.jsonl"
    file.write_text(f"{json.dumps(ARC)}\n{json.dumps(ARC)}\n")
    assert [each.where for each in multiple_choice.read(file)] == [f"{file}:1", f"{file}:2"]
    file.write_text(f"{json.dumps(ARC)}\n{{}}\n{{}}\n")
    with pytest.raises(DataError, match="asks no `question`.*1 more"):
        multiple_choice.read(file)


def test_the_likeliest_answer_and_the_likeliest_by_its_length(story: LanguageModel) -> None:
    prompt, choices = "Once upon a time, there was a little", ("girl named Lily", "cement mixer", "girl")
    nats = [by_hand(story, prompt, choice) for choice in choices]
    assert int(np.argmin(nats)) == 2 and int(np.argmin(np.array(nats) / [15, 12, 4])) == 0
    heard: list[tuple[int, int]] = []
    rows = [Question(where=f"q:{right}", prompt=prompt, choices=choices, right=right) for right in (0, 2, 1, 2)]
    done = multiple_choice.measure(story, rows, lambda *told: heard.append(told))
    assert done.chosen == [(2, 0)] * 4
    assert [(score.metric, score.value, score.n) for score in done.scores] == [("acc", 0.5, 4), ("acc_norm", 0.25, 4)]
    assert heard[-1] == (4, 4)
    pairs = [pair(story, prompt, f" {choice}") for choice in choices]
    (found,) = multiple_choice.grouped(story, [pairs], lambda done: None)
    assert found.nats.tolist() == pytest.approx(nats, abs=1e-4)


def test_no_questions(story: LanguageModel) -> None:
    with pytest.raises(DataError, match="there are no questions"):
        multiple_choice.measure(story, [])


def test_pairs_are_the_tokens_of_the_whole_text(story: LanguageModel) -> None:
    whole = generate.text_tokens(story, "Once upon a time")
    for prompt, continuation in (("Once upon", " a time"), ("Once upon ", "a time")):
        read, scored = pair(story, prompt, continuation)
        assert read == generate.text_tokens(story, "Once upon") and read + scored == whole


def test_an_empty_prompt_is_the_beginning_of_a_text(story: LanguageModel, tiny: Path) -> None:
    read, scored = pair(story, "", "Once upon")
    assert read == [1] and [1, *scored] == generate.text_tokens(story, "Once upon")
    lm = model.load(tiny)  # its tokenizer does not add the beginning-of-text token by itself
    assert pair(lm, "", "card") == ([lm.tokenizer.bos_token_id], lm.tokenizer.encode("card"))


def test_a_long_prompt_loses_its_left(story: LanguageModel) -> None:
    read, scored = pair(story, "cat " * 699 + "cat", " dog")
    whole = generate.text_tokens(story, "cat " * 700 + "dog")
    assert len(read) + len(scored) - 1 == 512 and read + scored == whole[-513:]
    read, scored = pair(story, "cat", " dog" * 700)
    assert len(read) == 1 and len(scored) == 512
