from typing import Any

import pytest

from mlxtune.data.files import Row
from mlxtune.data.formats import (
    Chat,
    Completion,
    Example,
    Text,
    answer_text,
    kept,
    last_learned,
    prompt_text,
    reader,
    to_example,
    to_value,
)
from mlxtune.errors import DataError, RecipeError
from mlxtune.recipe import DataRecipe

USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello"}
RESULT = {"role": "tool", "content": "sunny", "tool_call_id": "c1", "name": "weather"}
HUMAN = {"from": "human", "value": "Hi"}
GPT = {"from": "gpt", "value": "Hello"}


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
        (
            {"question": "x"},
            "has the columns `question`; expected `messages`, or `conversations`, or `prompt` + `completion`, or "
            "`instruction` + `output`, or `text`; "
            "rename its columns, or set data.prompt and data.completion in the recipe",
        ),
        ({"question": "x", "answer": "y"}, "set data.prompt to question and data.completion to answer in the recipe"),
        ({"text ": "x"}, "rename `text ` to `text`, or set data.prompt"),
        ({"Prompt": "x", "Completion": "y"}, "rename `Prompt` to `prompt`"),
        ({str(n): n for n in range(99)}, "`10`, `11` and 87 more; expected"),
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
        ({"messages": [{**ANSWER, "tool_calls": [{}]}]}, "message 1, tool call 1, has the name None; write"),
        ({"messages": [USER, {**ANSWER, "content": ["x"] * 999}]}, "message 2 has a part of the type 'x'"),
        ({"prompt": "x", "completion": ["x"] * 999}, "'x',…, not a text"),
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


def call(arguments: Any = None, **keys: Any) -> dict[str, Any]:
    """A tool call as OpenAI writes it."""
    return {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": arguments}, **keys}


def calling(*calls: Any, **keys: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": None, "tool_calls": list(calls), **keys}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ('{"city": "Oslo"}', {"city": "Oslo"}),
        ({"city": "Oslo"}, {"city": "Oslo"}),
        ("", {}),
        (None, {}),
        ("{}", {}),
    ],
)
def test_arguments_of_tool_calls_become_objects(given: Any, expected: dict[str, Any]) -> None:
    found = example({"messages": [USER, calling(call(given)), RESULT, ANSWER], "tools": [{"type": "function"}]})
    assert found == Chat([USER, calling(call(expected)) | {"content": ""}, RESULT, ANSWER], [{"type": "function"}])
    assert example(to_value(found)) == found


@pytest.mark.parametrize("given", ["[1]", "3", "{", "Oslo", [], 0, False])
def test_other_arguments_are_refused(given: Any) -> None:
    with pytest.raises(DataError, match="^a.jsonl:3: message 2, tool call 1, has the arguments .*, no JSON object; "):
        example({"messages": [USER, calling(call(given))]})


def test_an_answer_may_call_tools_and_nothing_else() -> None:
    calls = [call({"b": 1, "a": "ä"}), {"name": "time", "arguments": "{}"}]
    found = example({"messages": [USER, calling(*calls)]})
    assert isinstance(found, Chat) and last_learned(found) == 1
    assert answer_text(found) == ('{"arguments":{"a":"ä","b":1},"name":"weather"}\n{"arguments":{},"name":"time"}')
    assert prompt_text(found) == "Hi"
    spoken = example({"messages": [USER, calling(calls[1], content="One moment.", weight=1)]})
    assert answer_text(spoken) == 'One moment.\n{"arguments":{},"name":"time"}'
    with pytest.raises(DataError, match="message 2, an answer, is empty"):
        example({"messages": [USER, calling(content="")]})


def test_what_a_message_may_have_besides() -> None:
    thoughtful = {**ANSWER, "reasoning_content": "A greeting.", "name": "Ada"}
    found = example({"messages": [USER, thoughtful | {"refusal": None, "tool_calls": None, "time": "12:00"}]})
    assert found == Chat([USER, thoughtful])


def test_text_in_parts_is_joined() -> None:
    parts = [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]
    assert example({"messages": [{"role": "user", "content": parts}, ANSWER]}) == Chat([USER, ANSWER])


def test_tools_may_be_given_as_json() -> None:
    assert example({"messages": [USER, ANSWER], "tools": '[{"name": "f"}]'}) == Chat([USER, ANSWER], [{"name": "f"}])
    assert example({"messages": [USER, ANSWER], "tools": ""}) == Chat([USER, ANSWER])


@pytest.mark.parametrize(
    ("value", "prompt"),
    [
        ({"instruction": "Sum up.", "input": "A long text.", "output": "Short."}, "Sum up.\n\nA long text."),
        ({"instruction": "Sum up.", "input": "", "output": "Short."}, "Sum up."),
        ({"instruction": "Sum up.", "input": None, "output": "Short."}, "Sum up."),
        ({"instruction": "Sum up.", "output": "Short.", "text": "a whole prompt"}, "Sum up."),
    ],
)
def test_alpaca(value: dict[str, Any], prompt: str) -> None:
    assert example(value) == Completion(prompt, "Short.")


def test_sharegpt() -> None:
    turns = [{"from": "system", "value": "Be kind."}, HUMAN, GPT | {"weight": 0}, {"from": "user", "value": "And?"}]
    found = example({"conversations": [*turns, {"from": "bing", "value": "Well."}]})
    system = {"role": "system", "content": "Be kind."}
    asked, answered = {"role": "user", "content": "And?"}, {"role": "assistant", "content": "Well."}
    assert found == Chat([system, USER, {**ANSWER, "weight": 0}, asked, answered])
    assert example({"conversations": [HUMAN, GPT], "system": "Be kind."}) == Chat([system, USER, ANSWER])
    assert example({"conversations": [USER, ANSWER], "system": ""}) == Chat([USER, ANSWER])
    with pytest.raises(DataError, match="a.jsonl:3: message 2 has the value .*, not a text"):
        example({"conversations": [HUMAN, GPT | {"value": {"text": "Hello"}}]})


def test_sharegpt_with_tools() -> None:
    value = '{"name": "weather", "arguments": {"city": "Oslo"}}'
    turns = [HUMAN, {"from": "function_call", "value": value}, {"from": "observation", "value": "sunny"}, GPT]
    expected = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"function": {"name": "weather", "arguments": {"city": "Oslo"}}}],
    }
    found = example({"conversations": turns, "tools": '[{"name": "weather"}]'})
    assert found == Chat([USER, expected, {"role": "tool", "content": "sunny"}, ANSWER], [{"name": "weather"}])


def test_the_name_of_a_column_stands_for_it() -> None:
    value = {"text": "Where is it?", "the category": "late", "n": 3, "none": None}
    assert example(value, prompt="text", completion="the category") == Completion("Where is it?", "late")
    assert example(value, prompt="{{ text }}!", completion="n") == Completion("Where is it?!", "3")
    for column, said in (
        ("label", "a.jsonl:3: has no column `label`; it has `text`, `the category`, `n`, `none`"),
        ("none", "a.jsonl:3: 'none' does not fit: it would write None"),
    ):
        with pytest.raises(DataError, match=said):
            example(value, prompt="text", completion=column)
    with pytest.raises(DataError, match="a.jsonl:3: `text` is empty"):
        example({"text": " "}, prompt="text", completion="text")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"prompt": "text"}, "data.completion: is not set, but data.prompt is; set both"),
        ({"completion": "label"}, "data.prompt: is not set, but data.completion is; set both"),
        (
            {"prompt": "Q: {text}", "completion": "label"},
            "data.prompt: 'Q: {text}' names no column; write {{ column }}",
        ),
    ],
)
def test_half_a_recipe_is_refused(data: dict[str, str], said: str) -> None:
    row = Row("a.jsonl", 1, {"text": "x", "label": "y"})
    for read in (lambda: to_example(row, DataRecipe(**data)), lambda: reader([row], DataRecipe(**data))):
        with pytest.raises(RecipeError) as caught:
            read()
        assert str(caught.value).startswith(said)


def rows(*values: dict[str, Any]) -> list[Row]:
    return [Row("a.jsonl", line, value) for line, value in enumerate(values, start=1)]


def test_a_file_is_read_in_the_format_of_most_of_its_rows() -> None:
    pair, text = {"prompt": "Hi", "completion": "Hello"}, {"text": "Once"}
    given = rows(text, pair, pair, {"messages": [USER, ANSWER]}, {**pair, "messages": None}, {"other": 1})
    read = reader(given, DataRecipe())
    assert [read(given[place]) for place in (1, 2, 4)] == [Completion("Hi", "Hello")] * 3
    for place, seen in ((0, "text"), (3, "messages"), (5, "other")):
        with pytest.raises(DataError) as caught:
            read(given[place])
        assert str(caught.value) == (
            f"a.jsonl:{place + 1}: has the columns `{seen}`; the other rows of this file have `prompt` + `completion`; "
            "write all rows of a file in one format"
        )


def test_a_row_that_could_be_read_in_two_ways_is_odd() -> None:
    given = rows(*[{"text": "Once"}] * 2, {"text": "Hi", "messages": [USER, ANSWER]})
    with pytest.raises(DataError, match="a.jsonl:3: has the columns `text`, `messages`; the other rows"):
        reader(given, DataRecipe())(given[2])


def test_a_gap_in_the_format_of_a_file_is_named() -> None:
    given = rows({"text": "Once"}, {"text": None})
    with pytest.raises(DataError, match="a.jsonl:2: `text` is None, not a text"):
        reader(given, DataRecipe())(given[1])


def test_an_unknown_file_says_what_is_understood() -> None:
    given = rows({"question": "x", "answer": "y"})
    with pytest.raises(DataError, match="a.jsonl:1: has the columns `question`, `answer`; expected `messages`, or"):
        reader(given, DataRecipe())(given[0])
    assert reader(given, DataRecipe(prompt="question", completion="answer"))(given[0]) == Completion("x", "y")
    assert reader([], DataRecipe())(rows({"text": "Once"})[0]) == Text("Once")
