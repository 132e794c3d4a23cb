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

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} twice", key_node.start_mark)
            seen.add(key if isinstance(key, str) else id(key_node))
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def load(path: Path) -> Recipe:
    """Reads a recipe file, or an mlx-lm LoRA YAML. Raises RecipeError with the file and key."""
    return build(read_yaml(path), where=str(path))


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, in this module's names. Raises RecipeError."""
    try:
        value = parse_yaml(path.read_text(encoding="utf-8"), where=str(path))
    except FileNotFoundError:
        raise RecipeError("no such recipe", where=path, hint="give the path of a YAML file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot be read: {error}", where=path) from None
    value = {} if value is None else value
    if not isinstance(value, dict):
        raise RecipeError(f"is a {type(value).__name__}, not a mapping", where=path, hint="write `key: value` lines")
    return from_mlx_lm(value) if is_mlx_lm(value) else value


def parse_yaml(text: str, *, where: str) -> Any:
    """The value of one YAML text. Raises RecipeError with the line."""
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 (a SafeLoader)
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
    return yaml.safe_dump(to_dict(recipe), sort_keys=False, allow_unicode=True)


def reference() -> str:
    """Every setting with its default and a comment: the text of `configs/reference.yaml`."""
    lines = ["# Every setting of a recipe with its default. `mlxtune run FILE` needs only those that differ."]
    for each, hint in fields_of(Recipe):
        inner = section_type(hint)
        if inner is None:
            lines.append(_reference_line(each, ""))
            continue
        optional = type(None) in typing.get_args(hint)
        lines += ["", f"{each.name}:  # {each.metadata['help']}"]
        if optional:
            lines[-1] = f"{each.name}: null  # {each.metadata['help']}; with keys:"
        lines += [_reference_line(sub, "#   " if optional else "  ") for sub, _ in fields_of(inner)]
    return "\n".join(lines) + "\n"


def _reference_line(each: dataclasses.Field[Any], indent: str) -> str:
    default = each.default if each.default is not MISSING else typing.cast(Any, each.default_factory)()
    value = yaml.safe_dump(default, default_flow_style=True, width=1000).replace("\n...", "").strip()
    choices = each.metadata.get("choices")
    note = f" ({', '.join(choices)})" if choices else ""
    return f"{indent}{each.name}: {value}  # {each.metadata['help']}{note}"
