"""Recipes as YAML: reads a recipe or an mlx-lm LoRA YAML, writes one out, and writes the reference."""

import dataclasses
import re
import typing
from dataclasses import MISSING
from pathlib import Path
from typing import Any

import yaml

from mlxtune.errors import RecipeError
from mlxtune.recipe.build import build
from mlxtune.recipe.mlx_lm import from_mlx_lm, is_mlx_lm
from mlxtune.recipe.settings import Recipe, fields_of, section_type


class _Loader(yaml.SafeLoader):
    """YAML 1.1, but `1e-5` is a float and a key given twice is an error."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.composer.ComposerError(None, None, f"key `{key.value}` twice", key.start_mark)
            if isinstance(key, yaml.ScalarNode):
                seen.add(key.value)
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes what `_Loader` would not read as a text."""


for _each in (_Loader, _Dumper):
    _each.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?([0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)[eE][-+]?[0-9]+$"),
        list("-+.0123456789"),
    )


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    """Line breaks of Unicode as escapes: between single quotes PyYAML writes them so that others are read."""
    style = '"' if any(each in text for each in "\x85\u2028\u2029") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)


def load(path: Path) -> Recipe:
    """Reads a recipe file, or an mlx-lm LoRA YAML. Raises RecipeError with the file and key."""
    return build(read_yaml(path), where=str(path))


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, in this module's names. Raises RecipeError."""
    try:
        value = parse_yaml(path.read_text(encoding="utf-8"), where=str(path))
    except FileNotFoundError:
        raise RecipeError("no such recipe", where=path, hint="give the path of a YAML file") from None
    except UnicodeDecodeError:
        raise RecipeError("is not UTF-8", where=path, hint="save the file as UTF-8") from None
    except OSError as error:
        raise RecipeError(f"cannot be read: {error.strerror}", where=path) from None
    value = {} if value is None else value
    if not isinstance(value, dict):
        kind = "list" if isinstance(value, list) else "single value"
        raise RecipeError(f"is a {kind}, not a mapping", where=path, hint="write `key: value` lines")
    return from_mlx_lm(value, str(path)) if is_mlx_lm(value) else value


def parse_yaml(text: str, *, where: str) -> Any:
    """The value of one YAML text. Raises RecipeError with the line."""
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 (a SafeLoader)
    except (ValueError, RecursionError) as error:  # such as the date 2024-13-45, and a hundred thousand brackets
        raise RecipeError(f"not valid YAML: {error}", where=where) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        raise RecipeError(f"not valid YAML: {problem}", where=f"{where}{line}") from None


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """Plain nested values of a recipe, every default written out."""
    return dataclasses.asdict(recipe)


def dump(recipe: Recipe) -> str:
    """The recipe as YAML; `load` of it gives the same recipe."""
    return yaml.dump(to_dict(recipe), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def reference() -> str:
    """Every setting with its default and a comment: the text of `configs/reference.yaml`."""
    lines = ["# Every setting of a recipe with its default. `mlxtune run FILE` needs only those that differ."]
    for each, hint in fields_of(Recipe):
        inner = section_type(hint)
        if inner is None:
            lines.append(_reference_line(each, ""))
            continue
        optional = each.default is None
        lines += ["", f"{each.name}:  # {each.metadata['help']}"]
        if optional:
            lines[-1] = f"{each.name}: null  # {each.metadata['help']}; with keys:"
        lines += [_reference_line(sub, "#   " if optional else "  ") for sub, _ in fields_of(inner)]
    return "\n".join(lines) + "\n"


def _reference_line(each: dataclasses.Field[Any], indent: str) -> str:
    default = each.default if each.default is not MISSING else typing.cast(Any, each.default_factory)()
    value = yaml.dump(default, Dumper=_Dumper, default_flow_style=True, width=1000).replace("\n...", "").strip()
    choices = each.metadata.get("choices")
    note = f" ({', '.join(choices)})" if choices else ""
    return f"{indent}{each.name}: {value}  # {each.metadata['help']}{note}"
