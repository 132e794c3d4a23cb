"""A row's columns -> a prompt and an answer, as the recipe's `data.prompt` and `data.completion` say. Knows Jinja."""

import functools

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mlxtune.data.files import Row
from mlxtune.data.messages import checked_text, shown
from mlxtune.errors import DataError, RecipeError
from mlxtune.recipe import DataRecipe

MANY = 12  # columns that an error names


def named(row: Row) -> str:
    """The columns of a row, for an error."""
    names = [f"`{name}`" for name in row.value]
    more = f" and {len(names) - MANY} more" if len(names) > MANY else ""
    return (", ".join(names[:MANY]) + more) or "none"


def wanted(data: DataRecipe) -> tuple[str, str] | None:
    """The recipe's texts of prompt and answer, or None without. Raises RecipeError for one without the other."""
    if data.prompt is None and data.completion is None:
        return None
    if data.prompt is None or data.completion is None:
        missing, given = ("prompt", "completion") if data.prompt is None else ("completion", "prompt")
        what = f"is not set, but data.{given} is"
        raise RecipeError(what, where=f"data.{missing}", hint="set both, each to a column or a Jinja text")
    for key, text in (("prompt", data.prompt), ("completion", data.completion)):
        if "{" in text and "{{" not in text and "{%" not in text:
            hint = "write {{ column }}, or the name of a column alone"
            raise RecipeError(f"{text!r} names no column", where=f"data.{key}", hint=hint)
    return data.prompt, data.completion


def is_column(text: str) -> bool:
    """Whether a text of the recipe is the name of a column rather than a Jinja text."""
    return "{" not in text


def filled(text: str, row: Row) -> str:
    """A column of a row, or a Jinja text with the columns filled in.

    Raises DataError for a column that is missing or no text, RecipeError for a malformed text.
    """
    if is_column(text) and text not in row.value:
        raise DataError(f"has no column `{text}`", where=row.where, hint=f"it has {named(row)}")
    try:
        found = str(_written(row.value[text])) if is_column(text) else _compiled(text).render(row.value)
    except jinja2.UndefinedError as error:
        raise DataError(f"{text!r} does not fit: {error}", where=row.where, hint=f"it has {named(row)}") from None
    except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError) as error:
        raise RecipeError(f"{text!r} is no valid template: {error}", where="data.prompt, data.completion") from None
    if not found.strip():
        what = f"`{text}` is empty" if is_column(text) else f"{text!r} gives an empty text"
        raise DataError(what, where=row.where, hint="fill the row in or delete it")
    return checked_text(row.where, f"{text!r}", found)


def _written(value: object) -> object:
    """What a template writes for a value; `None` or a Python list would be learned letter by letter."""
    if value is None or isinstance(value, list | dict):
        raise jinja2.UndefinedError(f"it would write {shown(value)}")
    return value


_TEMPLATES = ImmutableSandboxedEnvironment(
    undefined=jinja2.StrictUndefined, keep_trailing_newline=True, finalize=_written
)


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> jinja2.Template:
    return _TEMPLATES.from_string(template)
