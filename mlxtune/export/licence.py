"""The licence and the languages that a model folder states, for what is made of it. Knows no law."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxtune.errors import RecipeError
from mlxtune.recipe import parse_yaml

LONGEST = 65_536  # characters of a file that are read
LICENCE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "LICENCE.txt", "COPYING")
WORDINGS = {  # licence ids of the hub: what their texts begin with, in small letters
    "apache-2.0": "apache license version 2.0",
    "mit": "mit license",
    "gpl-3.0": "gnu general public license version 3",
    "agpl-3.0": "gnu affero general public license version 3",
    "mpl-2.0": "mozilla public license version 2.0",
}
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}")
_LINK = re.compile(r"https://[A-Za-z0-9.-]+/[\w./%-]{0,300}", re.ASCII)


@dataclass(frozen=True, kw_only=True, slots=True)
class Licence:
    """A licence by the hub's `id` for it; `name` and `link` where that is `other`. All None: none is stated."""

    id: str | None = None
    name: str | None = None
    link: str | None = None
    languages: tuple[str, ...] = ()


def licence_of(folder: Path | None) -> Licence:
    """What the folder's card says, else what its licence file looks like. Nothing where there is no such folder."""
    if folder is None:
        return Licence()
    found = front_matter(_start_of(folder / "README.md"))
    languages = found.get("language")
    spoken = tuple(_texts([languages] if isinstance(languages, str) else languages, _ID))[:20]
    for each in _texts([found.get("license")], _ID):
        name, link = (
            next(_texts([found.get(key)], kind), None) for key, kind in (("license_name", _ID), ("license_link", _LINK))
        )
        return Licence(id=each, name=name, link=link, languages=spoken)
    for file in LICENCE_FILES:
        text = " ".join(re.sub(r"[^a-z0-9.]+", " ", _start_of(folder / file)[:400].lower()).split())
        if text:
            known = next((each for each, wording in WORDINGS.items() if text.startswith(wording)), None)
            return Licence(id=known or "other", name=None if known else "see-the-base-model", languages=spoken)
    return Licence(languages=spoken)


def front_matter(text: str) -> dict[str, Any]:
    """The YAML mapping between the first two `---` lines of a card; empty where there is none that can be read."""
    found = re.match(r"\ufeff?---\r?\n(.*?)\r?\n---\s*(\n|\Z)", text, re.DOTALL)
    if found is None:
        return {}
    try:
        value = parse_yaml(found[1], where="README.md")
    except RecipeError:
        return {}
    return value if isinstance(value, dict) else {}


def _start_of(file: Path) -> str:
    try:
        if not file.is_file():
            return ""
        with file.open(encoding="utf-8", errors="replace") as opened:
            return opened.read(LONGEST)
    except OSError:
        return ""


def _texts(values: Any, form: re.Pattern[str]) -> Any:
    """The values that are texts of this form; others are left out."""
    for each in values if isinstance(values, list) else []:
        if isinstance(each, str) and form.fullmatch(each):
            yield each
