"""What is known of a fused model or an adapter, read from the files that made it. Knows no Markdown.

A file that is not there or cannot be read adds nothing: a card says less then, and nothing fails for it. Of paths only
their last part is kept, of a recipe only settings that are numbers, switches and names.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any, Literal

from mlxtune import hub
from mlxtune.errors import MlxtuneError
from mlxtune.export.licence import Licence, licence_of
from mlxtune.recipe import read_yaml
from mlxtune.report.score import Score
from mlxtune.rundir import RunDir, read_json

COLUMNS = ("base", "tuned", "fused")
SECTIONS = ("quantize", "lora", "train", "fuse")
PRIVATE = {"anchor", "report_to", "optimizer_options"}  # paths, accounts, free values
_SETTING = re.compile(r"[A-Za-z0-9_*.-]{1,64}")
_FUSED = re.compile(r"fused\Z|\.fused\.partial-")
_CACHED = re.compile(r"models--([A-Za-z0-9_.-]+?)--([A-Za-z0-9_.-]+)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """All that a card says. `base` is a hub id where `revision` is known, else the last part of a path.

    `scores` by column (base, tuned, fused) on the `test` rows; `data` and `base_hashes`: file name -> sha256;
    `findings`: kind -> rows of the audit; `forgetting` and `decision` of a comparison. What is not known is empty.
    """

    kind: Literal["fused", "adapter"]
    base: str
    revision: str | None = None
    licence: Licence = field(default_factory=Licence)
    parts: int = 1
    adapter: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    fuse: dict[str, Any] = field(default_factory=dict)
    scores: dict[str, list[Score]] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
    data: dict[str, str] = field(default_factory=dict)
    base_hashes: dict[str, str] = field(default_factory=dict)
    findings: dict[str, int] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    device: str | None = None
    forgetting: dict[str, Any] = field(default_factory=dict)
    decision: str | None = None

    @property
    def name(self) -> str:
        """A name that a repository could have."""
        stem = re.sub(r"[^A-Za-z0-9._-]+", "-", self.base.rpartition("/")[2]).strip("-.") or "model"
        return f"{stem[:80]}-{'tuned' if self.kind == 'fused' else 'adapter'}"

    @property
    def relation(self) -> str:
        """What the hub calls the relation to the base."""
        if self.kind == "adapter":
            return "adapter"
        return "merge" if self.parts > 1 else "finetune"


def of_fused(folder: Path, run: RunDir | None) -> Facts:
    """What is known of a fused folder; `run` is the run that its adapter comes from, None: the one beside the adapter.

    Its own scores count where the folder is the run's own (or a scratch folder that will be).
    """
    fuse = _object(folder / "fuse.json")
    adapters = [(folder / each).resolve() for each in fuse.get("adapters") or {} if isinstance(each, str)]
    if run is None and len(adapters) == 1:
        run = RunDir(adapters[0].parent)
    own = run is not None and folder.parent.resolve() == run.root.resolve() and _FUSED.match(folder.name) is not None
    adapter = adapters[0] if adapters else (run.adapter if run is not None else folder)
    columns = ("base", "tuned", "fused") if own else ("base", "tuned")
    return _facts("fused", adapter, run if len(adapters) <= 1 else None, fuse, max(1, len(adapters)), columns)


def of_adapter(run: RunDir) -> Facts:
    """What is known of a run's adapter."""
    return _facts("adapter", run.adapter, run, {}, 1, ("base", "tuned"))


def _facts(
    kind: Literal["fused", "adapter"],
    adapter: Path,
    run: RunDir | None,
    fuse: dict[str, Any],
    parts: int,
    columns: tuple[str, ...],
) -> Facts:
    config, training = _object(adapter / "adapter_config.json"), _object(adapter / "training.json")
    origin = _object(run.origin) if run is not None else {}
    model, data, machine = (_part(origin, name) for name in ("model", "data", "machine"))
    at = model.get("path") or config.get("model")
    folder = Path(at) if isinstance(at, str) and at else None
    base, revision = _named(model.get("name"), folder)
    comparison = _object(run.compare / "compare.json") if run is not None else {}
    return Facts(
        kind=kind,
        base=base,
        revision=model.get("revision") or revision,
        licence=licence_of(folder),
        parts=parts,
        adapter=config,
        training=training if parts == 1 else {},
        fuse=fuse,
        scores={name: _scores(run.evaluation(name)) for name in columns} if run is not None else {},
        rows={name: count for name in ("train", "valid", "test") if run is not None and (count := _rows(run, name))},
        data={PurePath(str(name)).name: str(digest) for name, digest in _part(data, "sha256").items()},
        base_hashes={PurePath(str(name)).name: str(digest) for name, digest in _part(model, "sha256").items()},
        findings=_findings(run.data / "audit.json") if run is not None else {},
        settings=_settings(run.recipe) if run is not None else {},
        versions={str(name): str(version) for name, version in _part(origin, "versions").items()},
        device=str(machine["device_name"]) if "device_name" in machine else None,
        forgetting=_part(comparison, "forgetting"),
        decision=str(_part(comparison, "verdict").get("decision") or "") or None,
    )


def _named(name: Any, folder: Path | None) -> tuple[str, str | None]:
    """The base's name and revision: a hub id where the folder is one of the hub's cache, else the path's last part."""
    revision = hub.revision_of(folder) if folder is not None else None
    if revision is not None and folder is not None:
        cached = _CACHED.fullmatch(folder.parent.parent.name)
        if isinstance(name, str) and hub.is_hub_id(name):
            return name, revision
        if cached is not None:
            return f"{cached[1]}/{cached[2]}", revision
    text = name if isinstance(name, str) and name else str(folder or "")
    return PurePath(text.rstrip("/")).name or "unknown", revision


def _object(path: Path) -> dict[str, Any]:
    try:
        value = read_json(path)
    except MlxtuneError:
        return {}
    return value if isinstance(value, dict) else {}


def _part(value: dict[str, Any], name: str) -> dict[str, Any]:
    found = value.get(name)
    return found if isinstance(found, dict) else {}


def _scores(path: Path) -> list[Score]:
    found = _object(path).get("scores")
    try:
        return [Score(**each) for each in found] if isinstance(found, list) else []
    except TypeError:
        return []


def _rows(run: RunDir, name: str) -> int:
    try:
        with (run.data / f"{name}.jsonl").open("rb") as lines:
            return sum(bool(line.strip()) for line in lines)
    except OSError:
        return 0


def _findings(path: Path) -> dict[str, int]:
    counts: dict[str, int] = {}
    found = _object(path).get("findings")
    for each in found if isinstance(found, list) else []:
        if isinstance(each, dict) and isinstance(each.get("count"), int):
            kind = str(each.get("kind"))
            counts[kind] = counts.get(kind, 0) + each["count"]
    return counts


def _settings(path: Path) -> dict[str, Any]:
    """The recipe's seed, and what of the sections that make a model is a number, a switch or a name."""
    try:
        recipe = read_yaml(path)
    except MlxtuneError:
        return {}
    kept: dict[str, Any] = {"seed": recipe["seed"]} if isinstance(recipe.get("seed"), int) else {}
    for section in SECTIONS:
        values = _part(recipe, section)
        shown = {key: value for key, value in values.items() if key not in PRIVATE and _is_plain(value)}
        if shown:
            kept[section] = shown
    return kept


def _is_plain(value: Any) -> bool:
    if isinstance(value, list):
        return all(_is_plain(each) for each in value) and len(value) <= 64
    return isinstance(value, int | float) or (isinstance(value, str) and _SETTING.fullmatch(value) is not None)
