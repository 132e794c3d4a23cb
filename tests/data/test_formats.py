from typing import Any

import pytest

from mlxtune.data.files import Row
from mlxtune.data.formats import Chat, Completion, Example, Text, answer_text, kept, prompt_text, to_example, to_value
from mlxtune.errors import DataError, RecipeError
from mlxtune.recipe import DataRecipe

USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello"}


def example(value: dict[str, Any], **data: Any) -> Example:
    return to_example(Row("a.jsonl", 3, value), DataRecipe(**data))


@pytest.mark.parametrize(
    ("value", "expected", "asked", "answered"),
    [
        ({"messages": [USER, ANSWER]}, Chat([USER, ANSWER]), "Hi", "Hello"),
        ({"messages": [USER, ANSWER], "tools": [{"name": "f"}]}, Chat([USER, ANSWER], [{"name": "f"}]), "Hi", "Hello"),
        ({"messages": [USER, ANSWER, USER, ANSWER]}, Chat([USER, ANSWER, USER, ANSWER]), "Hi\nHi", "Hello"),
        ({"messages": [ANSWER]}, Chat([ANSWER]), "", "Hello"),
        ({"prompt": "Hi", "completion": "Hello"}, Completion("Hi", "Hello"), "Hi", "Hello"),
        ({"text": "Once upon a time"}, Text("Once upon a time"), "Once upon a time", None),
    ],
)
def test_formats(value: dict[str, Any], expected: Example, asked: str, answered: str | None) -> None:
    found = example({**value, "other": 1})
    assert found == expected
    assert (prompt_text(found), answer_text(found)) == (asked, answered)
    assert to_value(found) == value
    assert example(to_value(found)) == found


def test_templates_of_columns() -> None:
    data = {"prompt": "Ticket {{ id }}: {{ text }}\n", "completion": "{% if good %}yes{% else %}no{% endif %}"}
    value = {"id": 7, "text": "It {{ broke }}", "good": None}
    assert example(value, **data) == Completion("Ticket 7: It {{ broke }}\n", "no")


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (
            "{{ label }}",
            r"a.jsonl:3: '\{\{ label \}\}' does not fit: 'label' is undefined; it has `text`, `n`, `l`, `e`",
        ),
        ("{{ n }}", "a.jsonl:3: .* does not fit: it would write None"),
        ("{{ l }}", r"a.jsonl:3: .* does not fit: it would write \[1\]"),
        ("{{ e }}", "a.jsonl:3: .* gives an empty text"),
    ],
)
def test_a_template_that_does_not_fit_a_row_names_the_row(template: str, said: str) -> None:
    with pytest.raises(DataError, match=said):
        example({"text": "x", "n": None, "l": [1], "e": " "}, prompt="{{ text }}", completion=template)


@pytest.mark.parametrize("template", ["{{ text", "{% for %}", "{{ text | nothing }}", "{{ 1 / 0 }}"])
def test_a_malformed_template_names_the_recipe(template: str) -> None:
    with pytest.raises(RecipeError, match="^data.prompt, data.completion: .* is no valid template"):
        example({"text": "x"}, prompt=template, completion="{{ text }}")


def test_templates_may_not_reach_into_python() -> None:
    with pytest.raises((DataError, RecipeError)):
        example({"text": "x"}, prompt="{{ text.__class__.__mro__ }}", completion="y")


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"question": "x"}, "has the columns `question`; expected `messages`, or `prompt` + `completion`, or `text`"),
        ({}, "has the columns none"),
        ({"prompt": "x", "completion": 3}, "`completion` is 3, not a text"),
        ({"prompt": " ", "completion": "x"}, "`prompt` is empty"),
        ({"text": ""}, "`text` is empty"),
        ({"messages": []}, "`messages` is no list of messages"),
        ({"messages": "Hi"}, "`messages` is no list of messages"),
        ({"messages": ["Hi"]}, "message 1 has the role 'Hi'"),
        ({"messages": [{"role": "human", "content": "Hi"}]}, "message 1 has the role 'human'; use one of system, user"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "message 2 has the content None, not a text"),
        ({"messages": [USER, {"role": "assistant", "content": " "}]}, "message 2, an answer, is empty"),
        ({"messages": [USER, ANSWER, USER]}, "ends with the user; end it with an assistant's answer"),
        ({"messages": [{**ANSWER, "tool_calls": [{}]}]}, "message 1 calls a tool, which is not supported"),
        ({"messages": [USER, ANSWER], "tools": [1]}, "`tools` is no list of objects"),
    ],
)
def test_bad_rows_name_their_place(value: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError) as caught:
        example(value)
    assert caught.value.where == "a.jsonl:3"
    assert said in str(caught.value)


def test_keep_compares_as_text() -> None:
    row = Row("a.jsonl", 1, {"label": 3, "split": "train"})
    assert kept(row, DataRecipe())
    assert kept(row, DataRecipe(keep={"label": ["3", "4"], "split": ["train"]}))
    assert not kept(row, DataRecipe(keep={"label": ["3"], "split": ["test"]}))
    with pytest.raises(DataError, match="a.jsonl:1: has no column `lang`, which data.keep names"):
        kept(row, DataRecipe(keep={"lang": ["en"]}))


def test_weights_stay_on_answers() -> None:
    unlearned = {**ANSWER, "weight": 0}
    later = [{"role": "user", "content": "Bye"}, {"role": "assistant", "content": "See you", "weight": 0}]
    found = example({"messages": [{**USER, "weight": 0}, unlearned, USER, {**ANSWER, "weight": 1}, *later]})
    assert found == Chat([USER, unlearned, USER, {**ANSWER, "weight": 1}, *later])
    assert example(to_value(found)) == found
    # what is asked and answered is what is learned
    assert (prompt_text(found), answer_text(found)) == ("Hi\nHi", "Hello")
    assert example({"messages": [{**USER, "weight": None}, {**ANSWER, "weight": None}]}) == Chat([USER, ANSWER])


@pytest.mark.parametrize("weight", [2, -1, 0.5, "0", True, [0]])
def test_other_weights_are_refused(weight: Any) -> None:
    with pytest.raises(DataError) as caught:
        example({"messages": [USER, {**ANSWER, "weight": weight}]})
    assert str(caught.value) == f"a.jsonl:3: message 2 has the weight {weight!r}; use 0 or 1"


def test_a_row_without_an_answer_to_learn_is_refused() -> None:
    unlearned = {**ANSWER, "weight": 0}
    with pytest.raises(DataError, match="^a.jsonl:3: has no token to learn: every answer has the weight 0"):
        example({"messages": [USER, unlearned, USER, unlearned]})
