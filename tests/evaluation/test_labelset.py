"""Sets of labels: found in answers, and with the tokens that training shows them with."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from mlxtune.data import load
from mlxtune.data.files import EMBEDDED, Row
from mlxtune.data.formats import Chat, Completion, Example, Text
from mlxtune.data.render import Limit, Sample, render
from mlxtune.evaluation import labelset
from mlxtune.recipe import DataRecipe, EvaluateRecipe
from mlxtune.tokenizer import inner, load_for_rows

PACKAGE = Path(__file__).parents[2] / "mlxtune"
DATA, WORD = DataRecipe(), r"\A\s*(\w+)"
LABELS = ("card", "card_arrival", "lost_card", "refund")
REAL = ("qwen2.5-0.5b-instruct", "smollm2-135m-instruct", "mistral-v3", "ort-phi-3-mini")


@pytest.fixture(scope="module", params=("tiny", *REAL))
def tokenizer(request: pytest.FixtureRequest) -> Any:
    if request.param == "tiny":
        return AutoTokenizer.from_pretrained(PACKAGE / "assets" / "tiny")
    return AutoTokenizer.from_pretrained(request.getfixturevalue("shared_assets") / "tokenizers" / request.param)


@pytest.fixture(scope="module")
def tiny_tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(PACKAGE / "assets" / "tiny")


def rows(*examples: Example) -> list[tuple[Row, Example]]:
    return [(Row("a.jsonl", line, {}), example) for line, example in enumerate(examples, start=1)]


def labelled(form: str = "{}", times: int = 15) -> list[tuple[Row, Example]]:
    """`times` questions of each label, answered with it in a form."""
    return rows(
        *(Completion(f"Question {at} of {label}?", form.format(label)) for at in range(times) for label in LABELS)
    )


def ends(tokenizer: Any) -> set[int]:
    return {tokenizer.eos_token_id}


def find(some: list[tuple[Row, Example]], tokenizer: Any, **settings: Any) -> labelset.LabelSet | None:
    return labelset.find(some, EvaluateRecipe(**settings), tokenizer, ends(tokenizer), DATA)


def rendered(some: list[tuple[Row, Example]], tokenizer: Any) -> list[Sample]:
    return render(some, tokenizer, ends(tokenizer), DATA, Limit(10_000)).samples


def test_answers_that_are_labels_have_their_tokens_and_the_end(tokenizer: Any) -> None:
    some = labelled()
    found = find(some, tokenizer)
    assert found is not None and found.pattern is None and found.labels == LABELS
    for sample in rendered(some, tokenizer):
        last = max(place for place, trained in enumerate(sample.trained) if trained)
        learned = sample.tokens[sample.prompt_length : last + 1]
        assert list(found.tokens[LABELS.index(sample.answer or "")]) == learned


@pytest.mark.parametrize(
    "form", ["{}\nThank you for asking.", "Intent: {}. We see to it.", '{{"label": "{}", "sure": true}}']
)
def test_answers_that_go_on_begin_with_the_tokens_of_the_label(tokenizer: Any, form: str) -> None:
    some = labelled(form, times=2)
    found = find(some, tokenizer, label=r"(card_arrival|lost_card|card|refund)")
    assert found is not None and found.labels == LABELS
    for sample, (_, example) in zip(rendered(some, tokenizer), some, strict=True):
        assert isinstance(example, Completion)
        label = next(label for label in LABELS if form.format(label) == example.completion)
        tokens = list(found.tokens[LABELS.index(label)])
        text = tokenizer.decode(tokens)
        assert text.strip() == form.format("|").split("|")[0] + label
        # the text behind the label may draw its last character into a token of its own, as in `"}`
        assert sample.tokens[sample.prompt_length :][: len(tokens) - 1] == tokens[:-1]


def test_labels_that_the_recipe_names(tiny_tokenizer: Any) -> None:
    found = find(labelled(times=1), tiny_tokenizer, labels=["refund", "card", "late", "card"])
    assert found is not None and found.labels == ("card", "late", "refund")
    assert find(labelled(times=1), tiny_tokenizer, labels=["refund"]) is None  # nothing to choose


def test_the_last_answer_of_a_conversation_is_the_one_replaced(tiny_tokenizer: Any) -> None:
    def chat(label: str) -> Chat:
        talk = [("user", "hi"), ("assistant", "hello"), ("user", f"my {label}"), ("assistant", label), ("user", "bye")]
        return Chat([{"role": role, "content": content} for role, content in talk])

    plain = find(rows(*(Completion("q", label) for label in LABELS * 15)), tiny_tokenizer)
    found = find(rows(*map(chat, LABELS * 15)), tiny_tokenizer)
    assert found is not None and plain is not None and found.tokens == plain.tokens


def test_a_recipe_that_learns_prompts_too_scores_the_same(tiny_tokenizer: Any) -> None:
    some = labelled()
    settings = EvaluateRecipe()
    made = [
        labelset.find(some, settings, tiny_tokenizer, ends(tiny_tokenizer), replace(DATA, mask_prompt=mask))
        for mask in (True, False)
    ]
    assert made[0] == made[1] and made[0] is not None


@pytest.mark.parametrize(
    "some",
    [
        [],
        rows(*[Text("a plain text")] * 30),
        labelled(times=1),  # as many labels as a third of the rows: no labels, but answers
        labelled("{}\nThank you.", times=20),  # no pattern, and answers of two lines
        rows(*[Completion("q", f"answer {at}") for at in range(300)]),
        rows(*[Completion("q", "yes") for _ in range(30)]),
        rows(*[Completion("q", label) for label in ("a", "<|im_end|>") * 20]),  # a text that is a control token
    ],
)
def test_answers_that_are_no_labels(some: list[tuple[Row, Example]], tiny_tokenizer: Any) -> None:
    assert find(some, tiny_tokenizer) is None


def test_labels_behind_texts_of_their_own_are_not_scored(tiny_tokenizer: Any) -> None:
    some = rows(*(Completion("q", f"{why}, so it is: {label}") for why in ("late", "broken") for label in LABELS))
    assert find(some, tiny_tokenizer, label=r": (\w+)") is None
    more = rows(*(Completion("q", f"word{at}") for at in range(201)))
    assert find(more, tiny_tokenizer, label=WORD) is None  # more than 200


def test_the_embedded_tickets(tiny: Path) -> None:
    tokenizer, _ = load_for_rows(tiny, {}, None)
    found = labelset.find(
        load.read_examples(EMBEDDED, DATA), EvaluateRecipe(label=WORD), inner(tokenizer), tokenizer.eos_token_ids, DATA
    )
    assert found is not None and len(found.labels) == 9
    assert [tokenizer.decode(list(tokens)) for tokens in found.tokens] == list(found.labels)


@pytest.mark.parametrize(
    ("answer", "pattern", "label"),
    [(" refund \n", None, "refund"), ("refund now", WORD, "refund"), ("!", WORD, None), (None, None, None)],
)
def test_the_label_of_an_answer(answer: str | None, pattern: str | None, label: str | None) -> None:
    assert labelset.label_of(answer, pattern) == label
