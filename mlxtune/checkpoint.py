"""Checkpoints of a training run: arrays and a state, whole or not there. Knows files, not what the arrays mean."""

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxtune.errors import InputError
from mlxtune.rundir import read_json, staged

KEEP = 2  # the newest, and the one before in case it is damaged
STATE = "state.json"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """`state` is JSON; `arrays` maps a file's stem to its tensors."""

    step: int
    state: dict[str, Any]
    arrays: dict[str, dict[str, mx.array]]


def save(folder: Path, checkpoint: Checkpoint, adapter_config: dict[str, Any]) -> Path:
    """Writes `step-N/` below `folder` and removes all but the newest `KEEP`.

    Its adapters.safetensors and adapter_config.json make it an adapter folder that any command can load. The state,
    which lists each file's sha256, is written last.
    """
    target = folder / f"step-{checkpoint.step:07d}"
    if target.exists():
        return target
    with staged(target) as scratch:
        for stem, tensors in checkpoint.arrays.items():
            mx.save_safetensors(str(scratch / f"{stem}.safetensors"), tensors, metadata={"format": "mlx"})
        (scratch / "adapter_config.json").write_text(json.dumps(adapter_config, indent=2) + "\n", encoding="utf-8")
        hashes = {file.name: _sha256(file) for file in sorted(scratch.iterdir())}
        state = {"step": checkpoint.step, "state": checkpoint.state, "sha256": hashes}
        (scratch / STATE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
    for old in _folders(folder)[:-KEEP]:
        shutil.rmtree(old)
    return target


def newest(folder: Path) -> tuple[Checkpoint | None, list[Path]]:
    """The newest whole checkpoint below `folder`, or None; and the damaged ones that were passed over."""
    damaged: list[Path] = []
    for each in reversed(_folders(folder)):
        found = _read(each)
        if found is not None:
            return found, damaged
        damaged.append(each)
    return None, damaged


def _folders(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*")) if folder.is_dir() else []


def _read(folder: Path) -> Checkpoint | None:
    try:
        value = read_json(folder / STATE)
        if any(_sha256(folder / name) != digest for name, digest in value["sha256"].items()):
            return None
    except (OSError, KeyError, TypeError, AttributeError, ValueError, InputError):
        return None
    arrays = {Path(name).stem: _load(folder / name) for name in value["sha256"] if name.endswith(".safetensors")}
    return Checkpoint(value["step"], value["state"], arrays)


def _load(file: Path) -> dict[str, mx.array]:
    tensors = mx.load(str(file))
    assert isinstance(tensors, dict)
    return tensors


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
