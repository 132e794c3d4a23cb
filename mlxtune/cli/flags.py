"""Flags made from the recipe's fields, so that no default, range or help is written twice; and `--config`, `--set`."""

import re
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from mlxtune import recipe as recipes
from mlxtune.errors import RecipeError

Command = Callable[..., Any]
SECTION_HELP = "set any field of the recipe, such as --set lora.rank=8; may be repeated"


def recipe_flags(*wanted: str) -> Callable[[Command], Command]:
    """Adds the flag of every setting whose dotted key, or section, is in `wanted`; and --set."""

    def add(command: Command) -> Command:
        command = click.option("--set", "sets", metavar="KEY=VALUE", multiple=True, help=SECTION_HELP)(command)
        for key, (each, hint) in reversed(recipes.all_settings().items()):
            flag = each.metadata["flag"]
            if flag and (key in wanted or key.split(".")[0] in wanted):
                command = _option(key, flag, each, hint)(command)
        return command

    return add


def _option(key: str, flag: str, each: Any, hint: Any) -> Callable[[Command], Command]:
    name = _parameter(key)
    text = each.metadata["help"]
    if typing.get_origin(hint) is list:
        return click.option(flag, name, multiple=True, default=None, metavar="NAME", help=text)
    kinds = [kind for kind in typing.get_args(hint) or (hint,) if kind is not type(None)]
    if each.default is not None:
        text += f"  [{str(each.default).lower() if kinds[0] is bool else each.default}]"
    if kinds[0] is bool:
        return click.option(f"{flag}/--no-{flag[2:]}", name, default=None, help=text)
    metavar = "|".join(each.metadata["choices"] or ()) or {int: "N", float: "X"}.get(kinds[0], "TEXT")
    kind = _OrAuto(kinds[0]) if each.metadata["auto"] else kinds[0]
    return click.option(
        flag, name, type=kind, default=None, metavar=metavar + "|auto" * (kind is not kinds[0]), help=text
    )


class _OrAuto(click.ParamType):  # type: ignore[type-arg]
    """A value of a plain type, or `auto`."""

    def __init__(self, kind: Any):
        self.kind = click.types.convert_type(kind)
        self.name = self.kind.name

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return value if value == "auto" else self.kind.convert(value, param, ctx)


def _parameter(key: str) -> str:
    return "recipe_" + key.replace(".", "__")


def config_flag(command: Command) -> Command:
    """Adds -c/--config."""
    return click.option(
        "-c", "--config", type=click.Path(path_type=Path), metavar="FILE", help="a recipe, or an mlx-lm LoRA YAML"
    )(command)


def build_recipe(config: Path | None, values: dict[str, Any], sets: tuple[str, ...] = ()) -> recipes.Recipe:
    """The recipe of a command: the file, then the flags, then --set. Raises RecipeError."""
    settings: dict[str, Any] = {}
    for key in recipes.all_settings():
        value = values.get(_parameter(key))
        if value is not None and value != ():
            settings[key] = list(value) if isinstance(value, tuple) else value
    for text in sets:
        key, equals, value = text.partition("=")
        if not equals:
            raise RecipeError("has no `=`", where=f"--set {text}", hint="write --set section.key=value")
        settings[key.strip()] = _value(key.strip(), value)
    base = recipes.read_yaml(config) if config is not None else {}
    where = str(config) if config is not None else "command line"
    return recipes.build(base, where=where, settings=settings)


def _value(key: str, text: str) -> Any:
    """What `--set` gives a setting: YAML; but a text stands as it is typed, so that `Ticket: {text}` is no mapping."""
    _, hint = recipes.all_settings().get(key, (None, None))
    quoted = re.fullmatch(r"""\s*("[^"]*"|'[^']*')\s*""", text) is not None
    if hint in (str, str | None) and not quoted and text.strip() not in ("", "null", "~"):
        return text
    return recipes.parse_yaml(text, where=f"--set {key}")
