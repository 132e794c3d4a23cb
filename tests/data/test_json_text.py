import json

import pytest

from mlxtune.data.json_text import DEEPEST, has_half_character, loads, reason


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "Expecting property name enclosed in double quotes at column 2"),
        ("[NaN]", "NaN is not a JSON number"),
        ("-Infinity", "-Infinity is not a JSON number"),
        ("1e999", "the number 1e999 is too large"),
        ("9" * 5000, "a number of thousands of digits"),
        ('{"a": {"b": 1, "b": 2}}', "the key 'b' comes twice in one object"),
        ("[" * (DEEPEST + 1) + "]" * (DEEPEST + 1), "lists and objects more than 100 deep"),
        ("[" * 100_000, "lists and objects more than 100 deep"),
    ],
)
def test_what_is_refused_and_why(text: str, why: str) -> None:
    with pytest.raises((ValueError, RecursionError)) as caught:
        loads(text)
    assert reason(caught.value) == why


@pytest.mark.parametrize("text", ["null", " [1, -0.5e3] ", '{"a": {"a": []}}', "[" * DEEPEST + "]" * DEEPEST])
def test_the_rest_is_read_as_python_reads_it(text: str) -> None:
    assert loads(text) == json.loads(text)


def test_half_characters_are_found_at_any_depth() -> None:
    assert has_half_character({"a": ["fine", "\ud83d"]}) and has_half_character({"\udc00": 1})
    assert not has_half_character(loads(r'"\ud83d\ude00"'))
