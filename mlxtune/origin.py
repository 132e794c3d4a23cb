"""Where a run comes from: model, data, machine, versions. A folder goes on only with what it began with.

Knows files and their hashes, not what is done with them.
"""

import hashlib
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from platform import python_version
from typing import Any

from mlxtune import hub, machine, model
from mlxtune import recipe as recipes
from mlxtune.errors import InputError, OutputError
from mlxtune.recipe import Recipe
from mlxtune.rundir import RunDir, read_json, size_of


def describe(recipe: Recipe, source: Path, files: dict[str, Path]) -> dict[str, Any]:
    """Where a run comes from: model, data, machine and versions, with sha256 of every file."""
    weights = model.weight_files(source)
    return {
        "model": {
            "name": recipe.model,
            "path": str(source),
            "revision": hub.revision_of(source),
            "bytes": sum(size_of(file) for file in weights),
            "sha256": _model_hashes(source),
        },
        "data": {
            "path": recipe.data.path,
            "sha256": {str(file): _sha256(file) for file in files.values()},
        },
        "machine": asdict(machine.facts()),
        "versions": {
            "python": python_version(),
            **{name.replace("-", "_"): metadata.version(name) for name in ("mlxtune", "mlx", "mlx-lm")},
        },
    }


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def refuse_other(folder: RunDir, recipe: Recipe, files: dict[str, Path]) -> None:
    """A run folder belongs to one recipe and one set of data. Raises OutputError."""
    if folder.root.exists() and not folder.root.is_dir():
        raise OutputError("is a file", where=folder.root, hint="choose another --out")
    if folder.recipe.exists():
        differing = recipes.differences(recipes.load(folder.recipe), recipe)
        if differing:
            raise OutputError(
                f"holds a run of another recipe ({'; '.join(differing[:3])})",
                where=folder.root,
                hint="choose another --out, or remove the folder",
            )
        if folder.origin.exists() and _data_hashes(folder.origin) != sorted(map(_sha256, files.values())):
            raise OutputError(
                f"holds a run of other data: {recipe.data.path} has changed since",
                where=folder.root,
                hint="choose another --out, or remove the folder",
            )
    elif folder.root.exists() and any(
        each.name != ".lock" and ".partial-" not in each.name for each in folder.root.iterdir()
    ):
        raise OutputError("is not empty and holds no run", where=folder.root, hint="choose another --out")


def revision(folder: RunDir) -> str | None:
    """The commit that a started run has of a hub model, so that going on takes the same."""
    if not folder.origin.exists():
        return None
    revision: str | None = _origin_of(folder.origin, "model").get("revision")
    return revision


def refuse_changed_model(folder: RunDir, source: Path) -> None:
    """A run folder belongs to one model. Raises OutputError."""
    if folder.origin.exists() and _origin_of(folder.origin, "model").get("sha256") != _model_hashes(source):
        raise OutputError(
            f"holds a run of another model: {source} has changed since",
            where=folder.root,
            hint="choose another --out, or remove the folder",
        )


def _origin_of(origin: Path, part: str) -> dict[str, Any]:
    value = read_json(origin)
    found = value.get(part) if isinstance(value, dict) else None
    if not isinstance(found, dict):
        raise InputError(f"lacks `{part}`", where=origin, hint="it is damaged; remove the folder")
    return found


def _model_hashes(source: Path) -> dict[str, str]:
    return {file.name: _sha256(file) for file in [source / "config.json", *model.weight_files(source)]}


def _data_hashes(origin: Path) -> list[str]:
    """The sha256 of each data file of a run, as its origin.json has them. Raises InputError."""
    hashes = _origin_of(origin, "data").get("sha256")
    if not isinstance(hashes, dict):
        raise InputError("lacks `data.sha256`", where=origin, hint="it is damaged; remove the folder")
    return sorted(hashes.values())
