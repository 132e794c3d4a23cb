"""Checkpoints of a training run: arrays and a state, whole or not there. Knows files, not what the arrays mean."""

import hashlib
import json
import re
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxtune import headers
from mlxtune.errors import InputError
from mlxtune.rundir import discard, read_json, staged, storage_error, sync

KEEP = 2  # the newest, and the one before in case it is damaged
STATE, MANIFEST = "state.json", "manifest.json"
NEEDED = {STATE, "adapter_config.json", "adapters.safetensors"}
TENSORS = ".safetensors"
WORKERS = 4
LARGE_BYTES = 1_000_000  # below it another thread takes longer to start than the hash


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """`state` is JSON; `arrays` maps a file's stem to its tensors."""

    step: int
    state: dict[str, Any]
    arrays: dict[str, dict[str, mx.array]]


def save(folder: Path, checkpoint: Checkpoint, adapter_config: dict[str, Any]) -> Path:
    """Writes `step-N/` below `folder` and then removes all that are older but the newest `KEEP` - 1.

    Its adapters.safetensors and adapter_config.json make it an adapter folder that any command can load. The manifest,
    which has each file's sha256, is written last. Raises OutputError or StorageError.
    """
    target = folder / _name(checkpoint.step)
    if _read(target) is None:
        if target.exists() or target.is_symlink():
            discard(target)
        _write(target, checkpoint, adapter_config)
    for old in [each for number, each in _numbered(folder) if number < checkpoint.step][: 1 - KEEP]:
        discard(old)
    return target


def _write(target: Path, checkpoint: Checkpoint, adapter_config: dict[str, Any]) -> None:
    hashes: dict[str, str] = {}
    hashing: dict[str, Future[str]] = {}
    syncing: list[Future[None]] = []
    with staged(target) as scratch, ThreadPoolExecutor(WORKERS) as pool:
        for stem, tensors in sorted(checkpoint.arrays.items(), key=_bytes, reverse=True):
            file = scratch / f"{stem}{TENSORS}"
            with file.open("xb") as opened:  # a file of Python's: MLX's own loses the number of an error
                mx.save_safetensors(opened, tensors, metadata={"format": "mlx"})
            if file.stat().st_size < LARGE_BYTES:
                hashes[file.name] = _sha256(file)
            else:  # while the next one, which is smaller, is written
                hashing[file.name] = pool.submit(_sha256, file)
                syncing.append(pool.submit(sync, file))
        state = {"step": checkpoint.step, "state": checkpoint.state}
        for name, value in (("adapter_config.json", adapter_config), (STATE, state)):
            (scratch / name).write_bytes(_json(value))
            hashes[name] = _sha256(scratch / name)
        for work in syncing:
            work.result()  # a disk tells of a failure once
        hashes |= {name: work.result() for name, work in hashing.items()}
        (scratch / MANIFEST).write_bytes(_json({"sha256": dict(sorted(hashes.items()))}))


def _bytes(part: tuple[str, dict[str, mx.array]]) -> int:
    return sum(tensor.nbytes for tensor in part[1].values())


def newest(
    folder: Path, usable: Callable[[Checkpoint], bool] = lambda found: True
) -> tuple[Checkpoint | None, list[Path]]:
    """The newest whole checkpoint below `folder`, or None; and the damaged ones that were passed over.

    `usable` says whether one that is whole has what its reader needs. Raises StorageError if `folder` can't be read.
    """
    damaged: list[Path] = []
    try:
        folders = _numbered(folder)
    except OSError as error:
        raise storage_error(error, folder) from None
    for _, each in reversed(folders):
        found = _read(each)
        if found is not None and usable(found):
            return found, damaged
        damaged.append(each)
    return None, damaged


def _name(step: int) -> str:
    return f"step-{step:07d}"


def _numbered(folder: Path) -> list[tuple[int, Path]]:
    """The checkpoints by number, which neither a clock nor the length of a name decides."""
    if not folder.is_dir():
        return []
    numbers = {each: re.fullmatch(r"step-(\d{7,18})", each.name, re.ASCII) for each in folder.iterdir()}
    found = [(int(match[1]), each) for each, match in numbers.items() if match]
    return sorted((step, each) for step, each in found if each.name == _name(step))


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def _read(folder: Path) -> Checkpoint | None:
    """A checkpoint whose files are all as they were written and hold what they should, or None."""
    try:
        hashes = _manifest(folder)
        if any(_sha256(folder / name) != digest for name, digest in hashes.items()):
            return None
        value = read_json(folder / STATE)
        step, state = value["step"], value["state"]
        if type(step) is not int or folder.name != _name(step) or not isinstance(state, dict):
            return None
        if not isinstance(read_json(folder / "adapter_config.json"), dict):
            return None
        arrays = {Path(name).stem: _load(folder / name) for name in hashes if name.endswith(TENSORS)}
    except (OSError, LookupError, TypeError, AttributeError, ValueError, RuntimeError, InputError):
        return None
    return Checkpoint(step, state, arrays) if all(map(_finite, arrays.values())) else None


def _manifest(folder: Path) -> dict[str, str]:
    """The sha256 by file. Raises ValueError where it lacks a file or names one outside the folder."""
    hashes: dict[str, str] = read_json(_file(folder / MANIFEST))["sha256"]
    if not hashes.keys() >= NEEDED or any(Path(name).name != name for name in hashes):
        raise ValueError("not the files of a checkpoint")
    return hashes


def _load(file: Path) -> dict[str, mx.array]:
    """The tensors of a file that is well-formed; MLX takes others too, or crashes."""
    headers.read(file)
    tensors = mx.load(str(file))
    assert isinstance(tensors, dict)
    return tensors


def _finite(tensors: dict[str, mx.array]) -> bool:
    floats = [value for value in tensors.values() if mx.issubdtype(value.dtype, mx.floating)]
    return all(mx.all(mx.isfinite(value)).item() for value in floats)


def _file(path: Path) -> Path:
    """`path`, if it is a file: a pipe would be waited for. Raises ValueError."""
    if not path.is_file():
        raise ValueError("is no file")
    return path


def _sha256(file: Path) -> str:
    with _file(file).open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
