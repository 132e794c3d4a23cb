"""The names of everything in a run folder, and writes that are whole or not there. Knows no content.

A stage writes to a scratch folder beside its target, which is synced and renamed when it is whole:
a stage's folder exists if and only if the stage finished.
"""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxtune.errors import InputError, OutputError, StorageError


@dataclass(frozen=True)
class RunDir:
    """The paths inside one run folder."""

    root: Path

    @property
    def recipe(self) -> Path:
        return self.root / "recipe.yaml"

    @property
    def origin(self) -> Path:
        return self.root / "origin.json"

    @property
    def data(self) -> Path:
        return self.root / "data"

    @property
    def base(self) -> Path:
        return self.root / "base"

    @property
    def adapter(self) -> Path:
        return self.root / "adapter"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def log(self) -> Path:
        return self.root / "log.jsonl"

    @property
    def fused(self) -> Path:
        return self.root / "fused"

    def evaluation(self, name: str) -> Path:
        """The file of one evaluation: `base`, `tuned` or `fused`."""
        return self.root / "eval" / f"{name}.json"

    def report(self, suffix: str) -> Path:
        return self.root / f"report.{suffix}"

    def clean(self) -> None:
        """Removes what a killed process left half-written. Only for the holder of the lock."""
        for folder in (self.root, self.checkpoints, self.root / "eval"):
            for scratch in folder.glob(".*.partial-*"):
                if scratch.is_dir():
                    shutil.rmtree(scratch, ignore_errors=True)
                else:
                    scratch.unlink(missing_ok=True)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Holds the folder for one process; the lock goes with the process, however it ends. Raises OutputError."""
        make_folder(self.root)
        try:
            handle = os.open(self.root / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise storage_error(error, self.root) from None
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise OutputError(
                    "another run is at work in this folder", where=self.root, hint="wait for it"
                ) from None
            except OSError as error:  # a network disk without locks
                raise storage_error(error, self.root) from None
            yield
        finally:
            os.close(handle)


def storage_error(error: OSError, path: Path) -> InputError | StorageError:
    """The deliberate error for a failed file operation."""
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageError("no space left on the disk", where=path, hint="free some space and run again")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return StorageError(f"may not be written: {reason}", where=path, hint="choose a folder you may write to")
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        return OutputError("is a file, or lies below one", where=path, hint="choose another folder")
    return StorageError(f"cannot be written: {reason}", where=path)


def make_folder(path: Path) -> None:
    """Makes a folder and its parents. Raises OutputError or StorageError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error(error, path) from None


def refuse_existing(path: Path, flag: str) -> None:
    """Raises OutputError where `path` is taken, as mlxtune writes over nothing; StorageError where it can't be made."""
    if os.path.lexists(path):
        raise OutputError("exists already", where=path, hint=f"choose another {flag} or remove it")
    parent = next(each for each in path.absolute().parents if each.exists())
    if not parent.is_dir():
        raise OutputError("lies below a file", where=path, hint=f"choose another {flag}")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise StorageError("may not be written", where=path, hint="choose a folder you may write to")


@contextlib.contextmanager
def staged(target: Path) -> Iterator[Path]:
    """A scratch folder that becomes `target` when the block ends well, and disappears when it does not.

    Raises OutputError if `target` exists, StorageError if the disk fails.
    """
    refuse_existing(target, "folder")
    made = [parent for parent in target.parents if not parent.exists()]
    make_folder(target.parent)
    scratch = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        yield scratch
        sync_tree(scratch)
        refuse_existing(target, "folder")
        scratch.rename(target)
        sync(target.parent)
    except OSError as error:
        raise storage_error(error, target) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        if not target.exists():
            for parent in made:  # innermost first; one that holds something else stays
                with contextlib.suppress(OSError):
                    parent.rmdir()


def sync_tree(folder: Path) -> None:
    """Brings every file below `folder`, and the folders, to the disk."""
    for root, _, names in os.walk(folder, topdown=False):
        for name in names:
            sync(Path(root, name))
        sync(Path(root))


def sync(path: Path) -> None:
    """Brings one file or folder to the disk; on macOS past the drive's own cache."""
    handle = os.open(path, os.O_RDONLY)
    try:
        if sys.platform == "darwin":
            with contextlib.suppress(OSError):  # network and FAT disks do not have it
                fcntl.fcntl(handle, fcntl.F_FULLFSYNC)
                return
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Writes a whole file or nothing; an older file stays until the new one is complete."""
    make_folder(path.parent)
    scratch = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        scratch.write_text(text, encoding="utf-8")
        sync(scratch)
        scratch.replace(path)
        sync(path.parent)
    except OSError as error:
        raise storage_error(error, path) from error
    finally:
        scratch.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Writes one JSON value, indented, as `write_text` does. NaN is an error: it is not JSON."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """The value of a JSON file. Raises InputError, with the line of a mistake in it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError("no such file", where=path) from None
    except json.JSONDecodeError as error:
        raise InputError(f"not valid JSON: {error.msg}", where=f"{path}:{error.lineno}") from None
    except UnicodeDecodeError:
        raise InputError("is not UTF-8", where=path) from None
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror or error}", where=path) from None
    except (ValueError, RecursionError) as error:  # numbers too long for Python, lists too deep
        raise InputError(f"cannot be read: {error}", where=path) from None


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files below a folder."""
    if path.is_file():
        return path.stat().st_size
    return sum(each.stat().st_size for each in path.rglob("*") if each.is_file())
