"""The share of answers that are JSON of a given schema. Knows texts and a schema, not files; fetches nothing.

The schema is its user's; answers are hostile. So the expressions of a schema are matched in bounded time, which the
package `jsonschema`, whose rules are used for all else, doesn't do.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from mlxtune.data import json_text
from mlxtune.errors import DataError, InputError
from mlxtune.metrics.intervals import mean_share
from mlxtune.metrics.pattern import compiled, occurs
from mlxtune.report.score import Score

WHERE = "evaluate.schema"
DEFAULT_DRAFT = "https://json-schema.org/draft/2020-12/schema"
REFERENCES = ("$ref", "$dynamicRef", "$recursiveRef")
SAME_VALUE = ("not", "if", "then", "else")  # keywords whose schemas are asked about the value itself, not its parts
SAME_VALUE_LISTS = ("allOf", "anyOf", "oneOf")
SAME_VALUE_TABLES = ("dependentSchemas", "dependencies")
REFERENCE_ALONE = ("draft-03", "draft-04", "draft-06", "draft-07")  # drafts in which nothing counts beside a `$ref`


def json_schema(answers: Sequence[str], schema: object, groups: Sequence[object] | None = None) -> Score:
    """The share of answers (N,) in [0, 1] that are JSON and conform to `schema`, with an interval as of `mean_share`.

    Raises DataError for no rows, InputError as `conformer`.
    """
    if not answers:
        raise DataError("there are no rows to score")
    conforms = conformer(schema)
    return mean_share("json_schema", list(map(conforms, answers)), groups=groups)


def conformer(schema: object) -> Callable[[str], bool]:
    """Tells of an answer whether it is JSON and conforms to a JSON schema, as read from its file.

    The draft is that of `$schema`, or 2020-12. `format` is a note and not checked, as the drafts have it. An answer
    nested too deep to be checked does not conform. Raises InputError for what is no schema, an unknown draft, a
    reference that leads out of the schema or nowhere, and a schema that refers to itself without end: one that says of
    a value, at the root or below, that it must be what it must be.
    """
    import jsonschema_specifications  # these take a while
    from jsonschema.validators import extend, validator_for

    given = schema.get("$schema", DEFAULT_DRAFT) if isinstance(schema, dict) else DEFAULT_DRAFT
    draft: Any = validator_for({"$schema": given}, default=None) if isinstance(given, str) else None
    if draft is None:
        raise InputError(f"its $schema {given!r} is no known draft", where=WHERE, hint=f"e.g. {DEFAULT_DRAFT!r}")
    _check(schema, draft)
    own = copy.deepcopy(schema)
    _prepare(own, draft, given, jsonschema_specifications.REGISTRY)
    guarded = {
        "pattern": _pattern,
        "patternProperties": _pattern_properties,
        "additionalProperties": _additional_properties,
    }
    validator = extend(draft, guarded)(own, registry=jsonschema_specifications.REGISTRY)  # no way to fetch others

    def conforms(answer: str) -> bool:
        try:
            return bool(validator.is_valid(json_text.loads(answer.strip())))
        except (ValueError, RecursionError):
            return False

    return conforms


def _check(schema: object, draft: Any) -> None:
    from jsonschema.exceptions import SchemaError

    try:
        draft.check_schema(schema)
    except SchemaError as error:
        raise InputError(f"no JSON schema, at {error.json_path}: {error.message[:200]}", where=WHERE) from None


def _prepare(schema: object, draft: Any, name: str, registry: Any) -> None:
    """Checks what `_check` does not: expressions, references and what they lead to; takes each part's `$schema` away.

    A part that names its draft would be checked by jsonschema's own classes, whose expressions nothing stops.
    """
    from referencing.exceptions import CannotDetermineSpecification, Unresolvable
    from referencing.jsonschema import specification_with

    specification: Any = specification_with(name)
    seen: set[int] = set()
    keywords: set[str] = set()
    own = set(_ids(schema))
    follows: dict[int, list[int]] = {}  # of each part those that are asked about the same value

    def visit(resource: Any, resolver: Any) -> None:
        part = resource.contents
        if not isinstance(part, dict) or id(part) in seen or id(part) not in own:
            return
        seen.add(id(part))
        part.pop("$schema", None)
        keywords.update(part)
        for expression in (part.get("pattern"), *part.get("patternProperties", ())):
            if expression is not None:
                compiled(expression, WHERE)
        alone = "$ref" in part and any(draft in name for draft in REFERENCE_ALONE)
        follows[id(part)] = [] if alone else [id(each) for each in _of_same_value(part)]
        for reference in (part[name] for name in REFERENCES if name in part):
            try:
                found = resolver.lookup(reference)
            except (Unresolvable, TypeError, ValueError):  # the last two: a way through what is no object or list
                raise InputError(f"{reference!r} is not in the schema, and nothing is fetched", where=WHERE) from None
            _check(found.contents, draft)  # it may lie where no schema is expected
            follows[id(part)].append(id(found.contents))
            visit(specification.create_resource(found.contents), found.resolver)
        for each in resource.subresources():
            visit(each, resolver.in_subresource(each))

    root = specification.create_resource(schema)
    try:
        visit(root, registry.resolver_with_root(root))
    except CannotDetermineSpecification:
        raise InputError("a part of the schema is of a draft that is not known", where=WHERE) from None
    if _endless(follows):
        raise InputError("the schema refers to itself without end", where=WHERE)
    if {"patternProperties", "unevaluatedProperties"} <= keywords:
        raise InputError(
            "patternProperties and unevaluatedProperties in one schema are not supported",
            where=WHERE,
            hint="use additionalProperties",
        )


def _of_same_value(part: Mapping[str, Any]) -> Iterator[Any]:
    """The schemas within a schema that are asked about the very value that it is asked about."""
    yield from (part[name] for name in SAME_VALUE if name in part)
    for name in SAME_VALUE_LISTS:
        yield from part.get(name, ())
    for name in SAME_VALUE_TABLES:
        yield from part.get(name, {}).values()


def _endless(follows: Mapping[int, Sequence[int]]) -> bool:
    """Whether a part leads back to itself by way of parts that are asked about the same value."""
    left = {part: set(others) & follows.keys() for part, others in follows.items()}
    while ended := [part for part, others in left.items() if not others]:
        for part in ended:
            del left[part]
        for others in left.values():
            others.difference_update(ended)
    return bool(left)


def _ids(value: object) -> Iterator[int]:
    """The identity of each object in a JSON value."""
    if isinstance(value, dict | list):
        yield id(value)
        for each in value.values() if isinstance(value, dict) else value:
            yield from _ids(each)


def _error(what: str) -> Any:
    from jsonschema.exceptions import ValidationError

    return ValidationError(what)


def _pattern(validator: Any, expression: str, value: object, schema: Mapping[str, Any]) -> Iterator[Any]:
    if isinstance(value, str) and not occurs(expression, value):
        yield _error("does not match")


def _pattern_properties(
    validator: Any, properties: Mapping[str, Any], value: object, schema: Mapping[str, Any]
) -> Iterator[Any]:
    if isinstance(value, dict):
        for expression, part in properties.items():
            for key, inner in value.items():
                if occurs(expression, key):
                    yield from validator.descend(inner, part, path=key, schema_path=expression)


def _additional_properties(validator: Any, part: Any, value: object, schema: Mapping[str, Any]) -> Iterator[Any]:
    if isinstance(value, dict):
        expressions = schema.get("patternProperties", ())
        for key, inner in value.items():
            if key not in schema.get("properties", ()) and not any(occurs(each, key) for each in expressions):
                yield from validator.descend(inner, part, path=key)
