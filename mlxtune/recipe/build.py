"""Nested values -> a checked Recipe; every mistake is a RecipeError that names the key and the value."""

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Mapping
from typing import Any

from mlxtune.errors import RecipeError
from mlxtune.recipe.settings import Recipe, all_settings, fields_of, section_type

FIXED_MODES = {"mxfp4": (4, 32), "nvfp4": (4, 16), "mxfp8": (8, 32)}


def check_quantization(bits: int, group_size: int, mode: str, where: str = "quantize") -> None:
    """Refuses combinations that MLX has no number format for."""
    if mode == "affine":
        if bits not in (2, 3, 4, 5, 6, 8):
            raise RecipeError(f"no {bits}-bit format", where=f"{where}: bits", hint="use 2, 3, 4, 5, 6 or 8")
        if group_size not in (32, 64, 128):
            raise RecipeError(f"no groups of {group_size}", where=f"{where}: group_size", hint="use 32, 64 or 128")
    elif (bits, group_size) != FIXED_MODES[mode]:
        want = FIXED_MODES[mode]
        raise RecipeError(
            f"{mode} has {want[0]} bits in groups of {want[1]}, not {bits} in {group_size}",
            where=f"{where}: mode",
            hint=f"set bits: {want[0]} and group_size: {want[1]}",
        )


def build(values: Mapping[str, Any], *, where: str = "recipe", settings: Mapping[str, Any] | None = None) -> Recipe:
    """A checked recipe from nested values; `settings` maps dotted keys to values that win over them.

    Raises RecipeError for an unknown key (with the nearest known one), a wrong type or a value out of range.
    """
    merged = {key: dict(value) if isinstance(value, Mapping) else value for key, value in values.items()}
    for key, value in (settings or {}).items():
        section, _, name = key.partition(".")
        if not name:
            merged[section] = value
            continue
        inner = merged.get(section)
        if inner is None:
            inner = merged[section] = {}
        if not isinstance(inner, dict):
            raise RecipeError(f"is {inner!r}, not a section", where=f"{where}: {section}")
        inner[name] = value
    recipe = typing.cast(Recipe, _section(Recipe, merged, "", where))
    _check_together(recipe, where)
    return recipe


def _check_together(recipe: Recipe, where: str) -> None:
    if recipe.train.iters is not None and recipe.train.epochs is not None:
        raise RecipeError("iters and epochs are both set", where=f"{where}: train", hint="keep one of them")
    if recipe.data.test + recipe.data.valid >= 1:
        raise RecipeError(
            f"test {recipe.data.test} + valid {recipe.data.valid} leave no rows to train on", where=f"{where}: data"
        )
    if (recipe.data.prompt is None) != (recipe.data.completion is None):
        raise RecipeError("prompt and completion belong together", where=f"{where}: data", hint="set both or none")
    if recipe.quantize is not None:
        check_quantization(recipe.quantize.bits, recipe.quantize.group_size, recipe.quantize.mode, where)
    if recipe.fuse.bits is not None and recipe.fuse.dequantize:
        raise RecipeError("bits and dequantize exclude each other", where=f"{where}: fuse", hint="keep one of them")
    if recipe.evaluate.label is not None:
        try:
            groups = re.compile(recipe.evaluate.label).groups
        except re.error as error:
            raise RecipeError(f"is no regular expression: {error}", where=f"{where}: evaluate.label") from None
        if groups < 1:
            raise RecipeError("has no group in parentheses", where=f"{where}: evaluate.label", hint=r"e.g. '^(\w+)'")


def _section(cls: type, values: Any, prefix: str, where: str) -> Any:
    at = f"{where}: {prefix.rstrip('.')}" if prefix else where
    if not isinstance(values, Mapping):
        raise RecipeError(f"is {values!r}, not a section", where=at, hint="write its keys indented below it")
    known = {each.name: (each, hint) for each, hint in fields_of(cls)}
    for key in values:
        if key not in known:
            raise unknown_key(str(key), known, prefix, where)
    made = {}
    for name, value in values.items():
        each, hint = known[name]
        inner = section_type(hint)
        place = f"{where}: {prefix}{name}"
        if inner is None:
            made[name] = _value(value, each, hint, place)
        elif value is None:
            if type(None) not in typing.get_args(hint):
                raise RecipeError("is empty", where=place, hint="leave the section out or give it keys")
            made[name] = None
        else:
            made[name] = _section(inner, value, f"{prefix}{name}.", where)
    return cls(**made)


def unknown_key(key: str, known: Mapping[str, Any], prefix: str, where: str) -> RecipeError:
    """The error for a key that is not among `known`, with the nearest known one."""
    everywhere = [prefix + name for name in known] + [name for name in all_settings() if name not in known]
    tails = {name.rsplit(".", 1)[-1]: name for name in reversed(everywhere)}
    near = difflib.get_close_matches(key, list(tails), n=1, cutoff=0.6)
    hint = f"did you mean `{tails[near[0]]}`?" if near else f"known here: {', '.join(known)}"
    return RecipeError(f"unknown key `{prefix}{key}`", where=where, hint=hint)


def _value(value: Any, each: dataclasses.Field[Any], hint: Any, place: str) -> Any:
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None:
        if type(None) in options:
            return None
        raise RecipeError("is null", where=place, hint=f"give {_type_name(options)}")
    for option in options:
        converted = _convert(value, option)
        if converted is not None:
            _check_range(converted, each.metadata, place)
            return converted
    raise RecipeError(f"is {value!r}, not {_type_name(options)}", where=place)


def _convert(value: Any, option: Any) -> Any:
    """`value` as the plain type `option`, or None where it is not one."""
    origin = typing.get_origin(option)
    if option is bool or isinstance(value, bool):
        return value if option is bool and isinstance(value, bool) else None
    if option is float and isinstance(value, int | float):
        return float(value)
    if option in (int, str) and isinstance(value, option):
        return value
    if origin is list:
        items = [value] if isinstance(value, str) else value
        return list(items) if isinstance(items, list) and all(isinstance(item, str) for item in items) else None
    if origin is dict and isinstance(value, dict):
        converted = {str(key): _convert(item, list[str]) for key, item in value.items()}
        return None if None in converted.values() else converted
    return None


def _type_name(options: tuple[Any, ...]) -> str:
    names = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", type(None): "null"}
    spelt = [
        names.get(option) or ("a list of texts" if typing.get_origin(option) is list else "a mapping of lists")
        for option in options
    ]
    return " or ".join(spelt)


def _check_range(value: Any, metadata: Mapping[str, Any], place: str) -> None:
    choices, low, high, above = (metadata.get(name) for name in ("choices", "low", "high", "above"))
    if choices is not None and value not in choices:
        near = difflib.get_close_matches(value, choices, n=1)
        suffix = f" (did you mean {near[0]}?)" if near else ""
        raise RecipeError(f"is {value!r}", where=place, hint=f"use one of {', '.join(choices)}{suffix}")
    if isinstance(value, int | float) and not isinstance(value, bool):
        if value != value or value in (float("inf"), float("-inf")):
            raise RecipeError(f"is {value}", where=place, hint="give a finite number")
        if (low is not None and value < low) or (above is not None and value <= above):
            bound = f"at least {low}" if low is not None else f"more than {above}"
            raise RecipeError(f"is {value}", where=place, hint=f"give {bound}")
        if high is not None and value > high:
            raise RecipeError(f"is {value}", where=place, hint=f"give at most {high}")
