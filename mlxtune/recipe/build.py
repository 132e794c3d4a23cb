"""Nested values -> a checked Recipe; every mistake is a RecipeError that names the key and the value."""

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Mapping
from typing import Any

from mlxtune.errors import RecipeError
from mlxtune.recipe.settings import (
    CALIBRATED,
    TRACKERS,
    LoraRecipe,
    Recipe,
    all_settings,
    fields_of,
    section_type,
)

AFFINE_BITS, AFFINE_GROUPS = (2, 3, 4, 5, 6, 8), (32, 64, 128)
FIXED_MODES = {"mxfp4": (4, 32), "nvfp4": (4, 16), "mxfp8": (8, 32)}
# what a mode has methods for, beginning with the one that is used unless another is asked for
MODE_METHODS = {
    "affine": ("search", "rtn", *CALIBRATED),
    "mxfp4": ("search", "rtn", "imatrix"),
    "nvfp4": ("search", "rtn", "imatrix"),
    "mxfp8": ("rtn",),
}
EXCLUSIVE = (("train.iters", "train.epochs"), ("fuse.bits", "fuse.dequantize"), ("lora.alpha", "lora.scale"))
COMMAND_LINE = "command line"
# what others call a setting; the flags' own spellings are known without this table
OTHER_NAMES = {
    "lr": "train.learning_rate", "lr_schedule": "train.schedule", "lr_scheduler": "train.schedule",
    "max_steps": "train.iters", "steps": "train.iters", "lora_parameters": "lora", "lora_rank": "lora.rank",
    "lora_alpha": "lora.alpha", "keys": "lora.targets", "target_modules": "lora.targets", "dataset": "data.path",
}  # fmt: skip


def check_quantization(bits: int, group_size: int, mode: str, where: str = "quantize") -> None:
    """Refuses combinations that MLX has no number format for."""
    if mode == "affine":
        if bits not in AFFINE_BITS:
            raise RecipeError(f"no {bits}-bit format", where=f"{where}.bits", hint=f"use {_listed(AFFINE_BITS)}")
        if group_size not in AFFINE_GROUPS:
            raise RecipeError(
                f"no groups of {group_size}", where=f"{where}.group_size", hint=f"use {_listed(AFFINE_GROUPS)}"
            )
    elif (bits, group_size) != FIXED_MODES[mode]:
        want = FIXED_MODES[mode]
        raise RecipeError(
            f"{mode} has {want[0]} bits in groups of {want[1]}, not {bits} in {group_size}",
            where=f"{where}.mode",
            hint="leave bits and group_size out",
        )


def check_method(method: str, mode: str, where: str = "quantize") -> None:
    """Refuses a method that a mode gives nothing to choose, so that it would do as another does."""
    known = MODE_METHODS[mode]
    if method not in known:
        raise RecipeError(
            f"{method} does not go with {mode}", where=f"{where}.method", hint=f"use {_listed(known)}, or leave it out"
        )


def _listed(values: tuple[int, ...] | tuple[str, ...]) -> str:
    *others, last = map(str, values)
    return f"{', '.join(others)} or {last}" if others else last


def build(values: Mapping[str, Any], *, where: str = "recipe", settings: Mapping[str, Any] | None = None) -> Recipe:
    """A checked recipe from nested values; `settings`, from the command line, maps dotted keys to values that win.

    `data: FILE` stands for `data: {path: FILE}`, `lora.alpha` becomes `scale = alpha / rank`, and a quantization mode
    with one format brings its bits, group size and method. Raises RecipeError for an unknown key (with the nearest
    known one), a wrong type or a value out of range.
    """
    merged = {key: dict(value) if isinstance(value, Mapping) else value for key, value in values.items()}
    wanted = {key: _setting(key, value) for key, value in _without_auto(settings or {}).items()}
    for key, value in wanted.items():
        if "." not in key:
            merged[key] = dict(value) if isinstance(value, Mapping) else value
    if isinstance(merged.get("data"), str):
        merged["data"] = {"path": merged["data"]}
    _switch_auto(merged)
    for one, other in EXCLUSIVE:
        _make_way(merged, wanted, one, other)
        _make_way(merged, wanted, other, one)
    for key, value in wanted.items():
        if "." in key:
            _put(merged, key, value, where)
    if isinstance(merged.get("lora"), dict) and "alpha" in merged["lora"]:
        merged["lora"] = _scaled(merged["lora"], where)
    if isinstance(merged.get("quantize"), dict):
        mode = merged["quantize"].get("mode")
        bits, group_size = FIXED_MODES.get(mode if isinstance(mode, str) else "", (None, None))
        if bits is not None:
            own = {"bits": bits, "group_size": group_size, "method": MODE_METHODS[str(mode)][0]}
            merged["quantize"] = own | merged["quantize"]
    recipe = typing.cast(Recipe, _section(Recipe, merged, "", where))
    _check_together(recipe, where)
    return recipe


def _without_auto(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the command line with the switch on in place of a value `auto`, and off beside another value."""
    made = dict(settings)
    for key, switch in _automatic():
        if key in settings:
            made.setdefault(switch, settings[key] == "auto")
            if settings[key] == "auto":
                del made[key]
    return made


def _switch_auto(merged: dict[str, Any]) -> None:
    """Turns on the switch of each value `auto` in `merged`, in place of it."""
    for key, switch in _automatic():
        section, _, name = key.partition(".")
        inner = merged.get(section)
        if isinstance(inner, dict) and inner.get(name) == "auto":
            del inner[name]
            inner[switch.partition(".")[2]] = True


def _automatic() -> list[tuple[str, str]]:
    """Each setting that may be `auto`, with its switch, by their dotted keys."""
    return [(key, each.metadata["auto"]) for key, (each, _) in all_settings().items() if each.metadata["auto"]]


def _make_way(merged: dict[str, Any], wanted: Mapping[str, Any], new: str, old: str) -> None:
    """Of two settings that exclude each other, the `new` one on the command line removes the `old` one in the file."""
    section, _, name = old.partition(".")
    if wanted.get(new) not in (None, False) and old not in wanted and isinstance(merged.get(section), dict):
        merged[section].pop(name, None)


def _put(merged: dict[str, Any], key: str, value: Any, where: str) -> None:
    section, _, name = key.partition(".")
    inner = merged.setdefault(section, {})
    if inner is None:
        inner = merged[section] = {}
    if not isinstance(inner, dict):
        raise RecipeError(f"is {_shown(inner)}, not a section", where=f"{where}: {section}")
    inner[name] = value


def _setting(key: str, value: Any) -> Any:
    """The checked value of a dotted key on the command line, so that a mistake there is not blamed on the file."""
    known = all_settings()
    if key in known:
        return _value(value, *known[key], f"{COMMAND_LINE}: {key}")
    section, _, name = key.partition(".")
    sections = {each.name: section_type(hint) for each, hint in fields_of(Recipe)}
    inner = sections.get(section)
    if inner is None or (name and key != "lora.alpha"):
        fields = {each.name: each for each, _ in fields_of(inner or Recipe)}
        raise _misplaced_key(name if inner else key, fields, f"{section}." if inner else "", COMMAND_LINE)
    return value


def _scaled(lora: dict[str, Any], where: str) -> dict[str, Any]:
    """The keys of `lora` with the `scale` that belongs to `alpha`."""
    if lora.get("scale") is not None:
        raise RecipeError("alpha and scale are both set", where=f"{where}: lora", hint="keep one of them")
    fields = {each.name: (each, hint) for each, hint in fields_of(LoraRecipe)}
    alpha = _value(lora["alpha"], *fields["scale"], f"{where}: lora.alpha")
    rank = _value(lora.get("rank", LoraRecipe().rank), *fields["rank"], f"{where}: lora.rank")
    return {name: value for name, value in lora.items() if name != "alpha"} | {"scale": alpha / rank}


def _check_together(recipe: Recipe, where: str) -> None:
    if recipe.train.iters is not None and recipe.train.epochs is not None:
        raise RecipeError("iters and epochs are both set", where=f"{where}: train", hint="keep one of them")
    if recipe.data.test + recipe.data.valid >= 1:
        raise RecipeError(
            f"test {recipe.data.test} + valid {recipe.data.valid} leave no rows to train on", where=f"{where}: data"
        )
    if (recipe.data.prompt is None) != (recipe.data.completion is None):
        raise RecipeError("prompt and completion belong together", where=f"{where}: data", hint="set both or none")
    if recipe.lora.method == "full" and recipe.quantize is not None:
        raise RecipeError(
            "full tuning cannot change quantized weights",
            where=f"{where}: lora.method",
            hint="use lora or dora, or leave quantize out and quantize the result",
        )
    unknown = [name for name in recipe.train.report_to if name not in TRACKERS]
    if unknown:
        raise RecipeError(f"is {unknown[0]!r}", where=f"{where}: train.report_to", hint=f"use {', '.join(TRACKERS)}")
    if recipe.lora.num_layers == 0:
        raise RecipeError("is 0", where=f"{where}: lora.num_layers", hint="give at least 1, or -1 for all")
    if not recipe.lora.targets:
        raise RecipeError("is empty", where=f"{where}: lora.targets", hint="leave it out to adapt all linear layers")
    if recipe.quantize is not None:
        check_quantization(recipe.quantize.bits, recipe.quantize.group_size, recipe.quantize.mode, f"{where}: quantize")
        check_method(recipe.quantize.method, recipe.quantize.mode, f"{where}: quantize")
    if recipe.fuse.bits is not None:
        check_quantization(recipe.fuse.bits, 64, "affine", f"{where}: fuse")
        if recipe.fuse.dequantize:
            raise RecipeError("bits and dequantize exclude each other", where=f"{where}: fuse", hint="keep one of them")
    for bits in recipe.compare.widths if recipe.compare is not None else ():
        check_quantization(bits, 64, "affine", f"{where}: compare.widths")
    for name, pattern, least in (
        ("label", recipe.evaluate.label, 1),
        ("pattern", recipe.evaluate.pattern, 0),
    ):
        if pattern is None:
            continue
        try:
            groups = re.compile(pattern).groups
        except re.error as error:
            raise RecipeError(f"is no regular expression: {error}", where=f"{where}: evaluate.{name}") from None
        if groups < least:
            raise RecipeError("has no group in parentheses", where=f"{where}: evaluate.{name}", hint=r"e.g. '^(\w+)'")


def _section(cls: type, values: Any, prefix: str, where: str) -> Any:
    at = f"{where}: {prefix.rstrip('.')}" if prefix else where
    if not isinstance(values, Mapping):
        raise RecipeError(f"is {_shown(values)}, not a section", where=at, hint="write its keys indented below it")
    known = {each.name: (each, hint) for each, hint in fields_of(cls)}
    for key in values:
        if key not in known:
            raise _misplaced_key(str(key), known, prefix, where)
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
    """The error for a key that is not among `known`, with the nearest one there is."""
    near = difflib.get_close_matches(key, list(known), n=1, cutoff=0.6)
    return _unknown(key, prefix, where, known, prefix + near[0] if near else None)


def _misplaced_key(key: str, known: Mapping[str, Any], prefix: str, where: str) -> RecipeError:
    """As `unknown_key`, with the nearest setting of any section and by any of its names."""
    names: dict[str, str] = dict(OTHER_NAMES)
    for name, (each, _) in all_settings().items():
        flag = each.metadata["flag"] or f"--{name}"
        names |= {spelling: name for spelling in (name, name.rsplit(".", 1)[-1], flag[2:].replace("-", "_"))}
    names |= {name: prefix + name for name in known}
    near = difflib.get_close_matches(key, list(names), n=1, cutoff=0.6)
    return _unknown(key, prefix, where, known, names[near[0]] if near else None)


def _unknown(key: str, prefix: str, where: str, known: Mapping[str, Any], near: str | None) -> RecipeError:
    hint = f"did you mean `{near}`?" if near else f"known here: {', '.join(known)}"
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
    raise RecipeError(f"is {_shown(value)}, not {_type_name(options)}", where=place, hint=_quotes(value, options))


def _convert(value: Any, option: Any) -> Any:
    """`value` as the plain type `option`, or None where it is not one. A whole float, as in `1e3`, is an integer."""
    origin = typing.get_origin(option)
    if option is bool or isinstance(value, bool):
        return value if option is bool and isinstance(value, bool) else None
    if option is float and isinstance(value, int | float):
        fits = isinstance(value, float) or abs(value) < 2**1000
        return float(value) if fits else math.inf if value > 0 else -math.inf
    if option is int and isinstance(value, float):
        return int(value) if value.is_integer() else None
    if option in (int, str) and isinstance(value, option):
        return value
    if origin is list:
        kind = typing.get_args(option)[0]
        items = [_convert(item, kind) for item in (value if isinstance(value, list) else [value])]
        return None if None in items else items
    if origin is dict and isinstance(value, dict) and typing.get_args(option)[1] is Any:
        return {str(key): each for key, each in value.items()}
    if origin is dict and isinstance(value, dict):
        converted = {str(key): _texts(items) for key, items in value.items()}
        return None if None in converted.values() else converted
    return None


def _texts(items: Any) -> list[str] | None:
    """One value or a list of them as the texts that columns are compared with; None for anything else."""
    listed = items if isinstance(items, list) else [items]
    return [str(item) for item in listed] if all(isinstance(item, str | int) for item in listed) else None


def _quotes(value: Any, options: tuple[Any, ...]) -> str | None:
    """What to do about a text that YAML reads as something else, or the other way round."""
    if str in options and not isinstance(value, list | dict):
        return "put it in quotes"
    if isinstance(value, str) and re.fullmatch(r"\s*[-+]?[0-9._]+([eE][-+]?[0-9]+)?\s*", value):
        return "write it without quotes"
    return None


def _shown(value: Any) -> str:
    """A value as it may stand in one line."""
    text = str(value) if type(value).__module__ == "datetime" else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


def _type_name(options: tuple[Any, ...]) -> str:
    names = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", type(None): "null"}
    kinds = {list[str]: "a list of texts", list[int]: "a list of whole numbers", dict[str, Any]: "a mapping"}
    spelt = [names.get(option) or kinds.get(option, "a mapping of lists") for option in options]
    return " or ".join(spelt)


def _check_range(value: Any, metadata: Mapping[str, Any], place: str) -> None:
    choices, low, high, above = (metadata.get(name) for name in ("choices", "low", "high", "above"))
    if choices is not None and value not in choices:
        near = difflib.get_close_matches(value, choices, n=1)
        suffix = f" (did you mean {near[0]}?)" if near else ""
        use = f"use one of {', '.join(choices)}{suffix}" if len(choices) > 1 else f"only {choices[0]} is supported"
        raise RecipeError(f"is {_shown(value)}", where=place, hint=use)
    if isinstance(value, int | float) and not isinstance(value, bool):
        if isinstance(value, float) and not math.isfinite(value):
            raise RecipeError(f"is {value}", where=place, hint="give a finite number")
        if (low is not None and value < low) or (above is not None and value <= above):
            bound = f"at least {low}" if low is not None else f"more than {above}"
            raise RecipeError(f"is {value}", where=place, hint=f"give {bound}")
        if high is not None and value > high:
            raise RecipeError(f"is {value}", where=place, hint=f"give at most {high}")


def differences(one: Recipe, other: Recipe) -> list[str]:
    """What differs between two recipes, such as `train.iters: 3 there, 5 here`."""
    first, second = _flat(dataclasses.asdict(one)), _flat(dataclasses.asdict(other))
    keys = [key for key in first | second if first.get(key) != second.get(key)]
    return [f"{key}: {first.get(key)!r} there, {second.get(key)!r} here" for key in keys]


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and key not in ("keep", "optimizer_options"):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
