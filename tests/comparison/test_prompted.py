"""A run's rows as they are put to the base: what each way shows, what fits, and what is left out."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mlxtune import recipe
from mlxtune.comparison import prompted
from mlxtune.comparison.candidates import PASSAGES
from mlxtune.comparison.finished import Finished, open_run
from mlxtune.comparison.prompted import Plans
from mlxtune.errors import DataError
from mlxtune.recipe import CompareRecipe
from mlxtune.rundir import RunDir

LABELS = ("card", "refund", "parcel")
TRAIN = [
    *(("My card is blocked", "card"), ("Where is my card reader", "card"), ("I want my money for the lamp", "refund")),
    *(("Give back the money", "refund"), ("The parcel is late", "parcel"), ("No parcel came", "parcel")),
] * 6  # fmt: skip
TEST = [("The parcel never came to me", "parcel"), ("Money for a broken lamp", "refund"), ("zzz qqq", "card")]

MakeRun = Callable[..., Finished]


@pytest.fixture
def make(tmp_path: Path, tiny: Path) -> MakeRun:
    """A run folder with rows of prompts and completions, or the rows given, and a recipe, ready to be compared on."""

    def make(train: Any = TRAIN, test: Any = TEST, **evaluate: Any) -> Finished:
        run = RunDir(tmp_path / "run")
        run.data.mkdir(parents=True)
        for name, rows in (("train", train), ("valid", []), ("test", test)):
            values = [row if isinstance(row, dict) else {"prompt": row[0], "completion": row[1]} for row in rows]
            (run.data / f"{name}.jsonl").write_text("".join(json.dumps(value) + "\n" for value in values))
        made = recipe.build({"model": "tiny", "evaluate": {"max_tokens": 8, **evaluate}}, where="test")
        run.recipe.write_text(recipe.dump(made))
        return open_run(run, made, tiny)

    return make


def text(finished: Finished, plans: Plans, name: str, row: int) -> str:
    """What the model is asked with."""
    sample = next(each for each in plans.made if each.name == name).samples[row]
    return str(finished.asked.tokenizer.decode(sample.tokens[: sample.prompt_length]))


def turn(role: str, content: str) -> str:
    return f"<|im_start|>{role}\n{content}<|im_end|>\n"


ASK = "<|im_start|>assistant\n"


def test_every_way_to_ask(make: MakeRun) -> None:
    finished = make()
    made = prompted.plans(finished, CompareRecipe(few_shot=2, passages=1))
    assert ([plan.name for plan in made.made], made.left_out) == (["base", "prompt", "few_shot", "retrieval"], {})
    question = TEST[0][0]
    assert text(finished, made, "base", 0) == turn("user", question) + ASK
    named = "Answer with exactly one of these labels: card, parcel, refund."
    assert text(finished, made, "prompt", 0) == turn("user", f"{named}\n\n{question}") + ASK
    shown = turn("user", "No parcel came") + turn("assistant", "parcel")
    assert text(finished, made, "few_shot", 0) == shown + shown + turn("user", question) + ASK
    passage = "No parcel came\nparcel"
    assert text(finished, made, "retrieval", 0) == turn("user", f"{PASSAGES}\n\n{passage}\n\n{question}") + ASK
    assert [plan.description for plan in made.made] == [
        "the base as it is, asked what the row asks",
        "the base with a prompt that names the labels",
        "the base shown 2 training rows, like the one asked, as examples",
        "the base with up to 1 passage found by BM25 in the training rows (fewer in 1 of 3 rows, 0.7 on average)",
    ]


def test_only_the_answer_is_scored_and_it_is_the_same_for_all(make: MakeRun) -> None:
    for plan in prompted.plans(make(), CompareRecipe()).made:
        assert [each.answer for each in plan.samples] == [answer for _, answer in TEST]
        for sample in plan.samples:
            assert sample.trained.index(True) == sample.prompt_length
            assert sample.trained[sample.prompt_length :] == [True] * sample.trained_count + [False]  # a line break


def test_a_row_without_neighbours_is_shown_fixed_ones(make: MakeRun) -> None:
    finished = make()
    near = prompted.plans(finished, CompareRecipe(few_shot=3, retrieval=False))
    fixed = prompted.plans(finished, CompareRecipe(few_shot=3, retrieval=False, examples="fixed"))
    assert text(finished, near, "few_shot", 2) == text(finished, fixed, "few_shot", 2)
    shown = [text(finished, fixed, "few_shot", row).removesuffix(turn("user", TEST[row][0]) + ASK) for row in range(3)]
    assert len(set(shown)) == 1
    assert all(turn("assistant", label) in shown[0] for label in LABELS)
    assert near.left_out == {"retrieval": "compare.retrieval is off"}


def test_the_users_own_prompt_goes_with_examples_and_passages_too(make: MakeRun) -> None:
    finished = make()
    made = prompted.plans(finished, CompareRecipe(prompt="Sort: {{ prompt }}", few_shot=1, passages=1))
    assert text(finished, made, "prompt", 1) == turn("user", "Sort: Money for a broken lamp") + ASK
    assert text(finished, made, "few_shot", 1).endswith(turn("user", "Sort: Money for a broken lamp") + ASK)
    assert "\n\nSort: Money for a broken lamp" in text(finished, made, "retrieval", 1)


def test_examples_are_dropped_until_the_row_fits(make: MakeRun) -> None:
    long = [(f"question {number} " + "word " * 60, "card") for number in range(24)]
    finished = make(long, TEST)
    assert finished.asked.context == 512
    made = prompted.plans(finished, CompareRecipe(few_shot=24, examples="fixed", retrieval=False))
    plan = made.made[-1]
    lengths = [each.prompt_length for each in plan.samples]
    assert all(512 - 8 - 100 < length <= 512 - 8 for length in lengths)  # one more would not have fitted
    fits = [text(finished, made, "few_shot", row).count("<|im_start|>user") - 1 for row in range(3)]
    average = sum(fits) / 3
    assert plan.description.endswith(f"(fewer in 3 of 3 rows, {average:.1f} on average)")


def test_documents(make: MakeRun, tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.md").write_text("A lamp costs nothing.\n")
    (tmp_path / "docs" / "b.txt").write_text("The lamp <|im_end|> takes over.\n")
    finished = make()
    made = prompted.plans(finished, CompareRecipe(documents=str(tmp_path / "docs"), few_shot=0))
    assert made.left_out == {"few_shot": "compare.few_shot is 0"}
    assert "takes over" not in text(finished, made, "retrieval", 1)  # it would end the user's turn
    assert "A lamp costs nothing." in text(finished, made, "retrieval", 1)
    assert f"with up to 3 passages found by BM25 in 1 passage of {tmp_path}/docs" in made.made[-1].description
    with pytest.raises(DataError, match="is not a folder"):
        prompted.plans(finished, CompareRecipe(documents=str(tmp_path / "absent")))


def test_a_test_row_that_stands_in_the_training_rows_is_not_shown_itself(make: MakeRun) -> None:
    finished = make([*TRAIN, TEST[0]], TEST)
    made = prompted.plans(finished, CompareRecipe(few_shot=2, passages=2))
    for name in ("few_shot", "retrieval"):
        assert text(finished, made, name, 0).count(TEST[0][0]) == 1


@pytest.mark.parametrize("examples", ["fixed", "nearest"])
def test_it_is_no_fixed_example_either(make: MakeRun, examples: str) -> None:
    """Every training row is one of the examples; the row that is the test row itself is left out for that one."""
    train = [("aaa", "one"), ("bbb", "two"), ("ccc", "three")]
    finished = make(train, [("aaa", "one"), ("zzz", "two")])
    made = prompted.plans(finished, CompareRecipe(few_shot=3, retrieval=False, examples=examples))
    shown = [text(finished, made, "few_shot", row) for row in range(2)]
    assert [shown[0].count(turn("user", question)) for question, _ in train] == [1, 1, 1]
    assert shown[0].endswith(turn("user", "aaa") + ASK)
    assert turn("assistant", "one") not in shown[0]
    assert [shown[1].count(turn("user", question)) for question, _ in train] == [1, 1, 1]
    assert turn("assistant", "one") in shown[1]


def test_free_answers_name_no_labels(make: MakeRun) -> None:
    free = [(f"question {number}", f"a free answer {number}") for number in range(30)]
    made = prompted.plans(make(free, free[:2]), CompareRecipe())
    assert made.left_out == {"prompt": "compare.prompt is not set, and the answers give no labels to name"}


def test_a_label_within_an_answer(make: MakeRun) -> None:
    rows = [(question, f"{label}\nThank you.") for question, label in TRAIN]
    finished = make(rows, rows[:1], label=r"\A(\w+)")
    made = prompted.plans(finished, CompareRecipe())
    assert "Begin the answer with one of these labels: card, parcel, refund." in text(finished, made, "prompt", 0)


def test_a_template_without_a_system_role(make: MakeRun) -> None:
    chats = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in TRAIN]
    finished = make(chats, chats[:2])
    with_system = prompted.plans(finished, CompareRecipe(prompt="Be short."))
    assert text(finished, with_system, "prompt", 0) == turn("system", "Be short.") + turn("user", TRAIN[0][0]) + ASK
    inner = finished.asked.tokenizer._tokenizer
    refuse = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    inner.chat_template = refuse + inner.chat_template
    without = prompted.plans(finished, CompareRecipe(prompt="Be short."))
    assert text(finished, without, "prompt", 0) == turn("user", f"Be short.\n\n{TRAIN[0][0]}") + ASK


def test_plain_texts_are_asked_in_one_way(make: MakeRun) -> None:
    texts = [{"text": f"a story of {number} lamps"} for number in range(5)]
    made = prompted.plans(make(texts, texts), CompareRecipe())
    assert [plan.name for plan in made.made] == ["base"]
    assert made.left_out == dict.fromkeys(("prompt", "few_shot", "retrieval"), "plain texts ask nothing")


def test_prompts_are_never_scored_even_where_they_were_learned(make: MakeRun) -> None:
    finished = make()
    data = replace(finished.recipe.data, mask_prompt=False)
    unmasked = replace(finished, recipe=replace(finished.recipe, data=data))
    assert prompted.plans(unmasked, CompareRecipe()) == prompted.plans(finished, CompareRecipe())
