import json
import socket
from typing import Any

import jsonschema
import pytest

from mlxtune.data import matching
from mlxtune.errors import DataError, InputError
from mlxtune.metrics.intervals import share
from mlxtune.metrics.json_schema import conformer, json_schema

TICKET = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "type": "object",
    "properties": {
        "queue": {"enum": ["billing", "access"]},
        "id": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]+$"},
        "parts": {"type": "array", "items": {"$ref": "#/$defs/part"}},
    },
    "patternProperties": {"^x-": {"type": "string"}},
    "required": ["queue"],
    "additionalProperties": False,
    "$defs": {"part": {"type": "integer", "minimum": 0}},
}


@pytest.mark.parametrize(
    ("answer", "conforms"),
    [
        ('{"queue": "billing"}', True),
        (' {"queue": "access", "id": "AB-12", "parts": [0, 3], "x-note": "late"}\n', True),
        ('{"id": "AB-12"}', False),
        ('{"queue": "outage"}', False),
        ('{"queue": "billing", "id": "ab-12"}', False),
        ('{"queue": "billing", "parts": [1, -1]}', False),
        ('{"queue": "billing", "x-note": 1}', False),
        ('{"queue": "billing", "other": 1}', False),
        ('{"queue": "billing"', False),
        ("null", False),
    ],
)
def test_an_answer_conforms_or_not(answer: str, conforms: bool) -> None:
    assert conformer(TICKET)(answer) == conforms


def test_the_score_is_a_share() -> None:
    before = repr(TICKET)
    assert json_schema(['{"queue": "billing"}', "{}", "{", "1"], TICKET) == share("json_schema", 1, 4)
    assert repr(TICKET) == before
    with pytest.raises(DataError, match="there are no rows to score"):
        json_schema([], TICKET)


@pytest.mark.parametrize(
    ("draft", "conforms"),
    [
        # before draft 6, exclusiveMinimum is a boolean beside minimum
        ("http://json-schema.org/draft-04/schema#", {"minimum": 1, "exclusiveMinimum": True}),
        ("http://json-schema.org/draft-07/schema#", {"exclusiveMinimum": 1}),
        ("https://json-schema.org/draft/2019-09/schema", {"exclusiveMinimum": 1}),
    ],
)
def test_the_draft_is_the_schemas_own(draft: str, conforms: dict[str, Any]) -> None:
    check = conformer({"$schema": draft, **conforms})
    assert (check("1"), check("2")) == (False, True)
    if "07" in draft:
        with pytest.raises(InputError, match=r"no JSON schema, at \$.exclusiveMinimum"):
            conformer({"$schema": draft, "exclusiveMinimum": True})


@pytest.mark.parametrize(
    ("schema", "line"),
    [
        (5, "evaluate.schema: no JSON schema, at $: 5 is not of type 'object', 'boolean'"),
        (
            {"type": "objekt"},
            "evaluate.schema: no JSON schema, at $.type: 'objekt' is not valid under any of the given schemas",
        ),
        (
            {"properties": {"a": {"pattern": "("}}},
            "evaluate.schema: no JSON schema, at $.properties.a.pattern: '(' is not a 'regex'",
        ),
        (
            {"$schema": "urn:mine"},
            "evaluate.schema: its $schema 'urn:mine' is no known draft; "
            "e.g. 'https://json-schema.org/draft/2020-12/schema'",
        ),
        ({"$ref": "#/$defs/a"}, "evaluate.schema: '#/$defs/a' is not in the schema, and nothing is fetched"),
        (
            {"$ref": "#/mine", "mine": {"pattern": ["a"]}},
            "evaluate.schema: no JSON schema, at $.pattern: ['a'] is not of type 'string'",
        ),
        ({"$ref": "#"}, "evaluate.schema: the schema refers to itself without end"),
        ({"$ref": "#/a/b", "a": True}, "evaluate.schema: '#/a/b' is not in the schema, and nothing is fetched"),
        ({"$ref": "#/a/b", "a": [{}]}, "evaluate.schema: '#/a/b' is not in the schema, and nothing is fetched"),
        (
            {"patternProperties": {"a": {}}, "allOf": [{"unevaluatedProperties": False}]},
            "evaluate.schema: patternProperties and unevaluatedProperties in one schema are not supported; "
            "use additionalProperties",
        ),
    ],
)
def test_a_bad_schema_is_refused_before_any_answer(schema: object, line: str) -> None:
    with pytest.raises(InputError) as caught:
        conformer(schema)
    assert str(caught.value) == line


def test_nothing_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "socket", lambda *args, **kwargs: pytest.fail("a connection"))
    for place in ("https://example.com/a.json", "file:///etc/passwd", "other.json"):
        schema = {"properties": {"a": {"items": {"$ref": place}}}}
        with pytest.raises(InputError, match=f"{place!r} is not in the schema"):
            conformer(schema)


def test_references_within_a_schema_and_to_the_drafts_are_known() -> None:
    inner = {"$defs": {"n": {"$id": "https://example.com/n", "type": "integer"}}, "$ref": "https://example.com/n"}
    assert [conformer(inner)(answer) for answer in ("1", '"a"')] == [True, False]
    schema = conformer({"$ref": "http://json-schema.org/draft-07/schema#"})
    assert (schema('{"type": "string"}'), schema('{"type": 5}')) == (True, False)


def test_a_schema_may_hold_itself() -> None:
    tree = conformer({"type": "object", "additionalProperties": {"$ref": "#"}})
    assert tree('{"a": {"b": {}}}')
    assert not tree('{"a": {"b": 1}}')
    assert tree('{"a":' * 20 + "{}" + "}" * 20)
    assert not tree('{"a":' * 100_000)


LIST = {
    "type": "object",
    "properties": {"v": {"type": "integer"}, "next": {"$ref": "#/$defs/node"}},
    "required": ["v"],
}
LISTS = ['{"a": {"v": 1}}', '{"a": {"v": 1, "next": {"v": 2}}}', '{"a": {"v": 1, "next": {"v": "x"}}}', '{"a": {}}']


@pytest.mark.parametrize(
    ("schema", "answers"),
    [
        ({"$defs": {"node": LIST}, "properties": {"a": {"$ref": "#/$defs/node"}}}, LISTS),
        ({"properties": {"a": {"properties": {"next": {"$ref": "#/properties/a"}}, "required": ["v"]}}}, LISTS),
        ({"properties": {"a": {"type": "object"}, "b": {"$ref": "#/properties/a"}}}, ['{"b": {}}', '{"b": 1}']),
        (
            {"$defs": {"n": {"anyOf": [{"type": "integer"}, {"items": {"$ref": "#/$defs/n"}, "type": "array"}]}}}
            | {"allOf": [{"$ref": "#/$defs/n"}, {"not": {"const": 5}}]},
            ["1", "[1, [2]]", '[1, ["x"]]', "5"],
        ),
        (
            {"$dynamicAnchor": "n", "type": "array", "items": {"$dynamicRef": "#n"}},
            ["[[], [[]]]", "[[1]]"],
        ),
        (  # before 2019-09 nothing counts beside a reference, not even one to the schema itself
            {
                "$schema": "http://json-schema.org/draft-07/schema#",
                "definitions": {"a": {"type": "integer"}},
                "properties": {"a": {"$ref": "#/definitions/a", "allOf": [{"$ref": "#/properties/a"}]}},
            },
            ['{"a": 1}', '{"a": "x"}'],
        ),
    ],
)
def test_what_refers_to_itself_below_the_root_is_as_jsonschema_has_it(schema: Any, answers: list[str]) -> None:
    peer = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)(schema)
    expected = [peer.is_valid(json.loads(answer)) for answer in answers]
    assert list(map(conformer(schema), answers)) == expected
    assert set(expected) == {True, False}


@pytest.mark.parametrize(
    "schema",
    [
        {"$defs": {"a": {"$ref": "#/$defs/a"}}, "properties": {"x": {"$ref": "#/$defs/a"}}},
        {"properties": {"x": {"$ref": "#/properties/x"}}},
        {"properties": {"x": {"allOf": [{"anyOf": [{"$ref": "#/properties/x"}]}]}}},
        {"items": {"$ref": "#/$defs/a"}, "$defs": {"a": {"not": {"$ref": "#/$defs/b"}}, "b": {"$ref": "#/$defs/a"}}},
        {"items": {"if": {"$ref": "#/items"}}},
        {"items": {"dependentSchemas": {"x": {"$ref": "#/items"}}}},
    ],
)
def test_an_endless_reference_below_the_root_is_refused(schema: Any) -> None:
    with pytest.raises(InputError, match="evaluate.schema: the schema refers to itself without end"):
        conformer(schema)


@pytest.mark.parametrize(
    "schema",
    [
        {"additionalProperties": {"pattern": "^(a|aa)+$"}},
        {"properties": {"k": {"$schema": "http://json-schema.org/draft-07/schema#", "pattern": "^(a|aa)+$"}}},
        {"patternProperties": {"^(a|aa)+$": True}, "additionalProperties": False},
        {
            "$ref": "#/mine/x",
            "mine": {
                "x": {
                    "properties": {"k": {"$schema": "http://json-schema.org/draft-07/schema#", "pattern": "^(a|aa)+$"}}
                }
            },
        },
    ],
)
def test_an_answer_cannot_hold_up_an_expression(schema: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matching, "SECONDS", 0.02)
    long = "a" * 60 + "!"  # Python's own matching would take longer than anyone lives
    assert not conformer(schema)(f'{{"k": "{long}", "{long}": "{long}"}}')
