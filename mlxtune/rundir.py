"""The names of everything in a run folder, and writes that are whole or not there. Knows no content.

A stage writes to a scratch folder beside its target, which is synced and renamed when it is whole:
a stage's folder exists if and only if the stage finished.
"""

import contextlib
import errno
import fcntl
import glob
import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxtune.errors import InputError, OutputError, StorageError

WRITER_FAILED = ("[write] ", "[save_safetensors] Failed to open")  # how MLX reports a failed write, without its number


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

    def predictions(self, name: str) -> Path:
        """Every answer of that evaluation, one a line."""
        return self.root / "eval" / f"{name}.jsonl"

    @property
    def compare(self) -> Path:
        return self.root / "compare"

    def report(self, suffix: str) -> Path:
        return self.root / f"report.{suffix}"

    @property
    def loss_picture(self) -> Path:
        return self.root / "loss.svg"

    def clean(self) -> None:
        """Removes what a killed process left half-written. Only for the holder of the lock."""
        for folder in (self.root, self.checkpoints, self.root / "eval"):
            for scratch in folder.glob(".*.partial-*"):
                _delete(scratch)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Holds the folder for one process and cleans it; the lock goes with the process, however it ends.

        Raises OutputError where another process holds it.
        """
        make_folder(self.root)
        handle = self._locked()
        try:
            self.clean()
            yield
        finally:
            with contextlib.suppress(OSError):  # nothing was written to it
                os.close(handle)

    def _locked(self) -> int:
        """A handle of the lock file that holds its lock."""
        path = self.root / ".lock"
        try:
            while True:
                handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    # a process that ended meanwhile may have removed the file that this lock is on
                    if path.exists() and os.path.samestat(os.fstat(handle), path.stat()):
                        return handle
                except OSError:
                    os.close(handle)
                    raise
                os.close(handle)
        except BlockingIOError:
            raise OutputError("another run is at work in this folder", where=self.root, hint="wait for it") from None
        except OSError as error:  # a network disk without locks, among others
            raise storage_error(error, self.root) from None


def storage_error(error: OSError, path: Path) -> InputError | StorageError:
    """The deliberate error for a failed file operation."""
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageError("no space left on the disk", where=path, hint="free some space and run again")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return StorageError(f"may not be written: {reason}", where=path, hint="choose a folder you may write to")
    if error.errno == errno.ELOOP:
        return OutputError("is a symbolic link in the way, or lies below a loop of them", where=path, hint="remove it")
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        return OutputError("is a file, or lies below one", where=path, hint="choose another folder")
    return StorageError(f"cannot be written: {reason}", where=path)


def make_folder(path: Path) -> None:
    """Makes a folder and its parents, which survive a loss of power. Raises OutputError or StorageError."""
    try:
        made = [each for each in (path, *path.parents) if not each.exists()]
        path.mkdir(parents=True, exist_ok=True)
        for each in made:
            sync(each.parent)
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
    _delete_abandoned(target)
    scratch = _scratch(target)
    try:
        scratch.mkdir()
        with _held(scratch):
            yield scratch
            sync_tree(scratch)
            refuse_existing(target, "folder")
            scratch.rename(target)
            sync(target.parent)
    except OSError as error:
        raise storage_error(error, target) from error
    except RuntimeError as error:
        if not str(error).startswith(WRITER_FAILED):
            raise
        raise StorageError(f"cannot be written: {error}", where=target, hint="is the disk full?") from error
    finally:
        _delete(scratch)
        if not os.path.lexists(target):
            for parent in made:  # innermost first; one that holds something else stays
                with contextlib.suppress(OSError):
                    parent.rmdir()


def _scratch(target: Path) -> Path:
    return target.with_name(f".{target.name}.partial-{os.getpid()}")


@contextlib.contextmanager
def _held(scratch: Path) -> Iterator[None]:
    """Locks a scratch folder, where the disk has locks, as a sign that its process is alive."""
    handle = os.open(scratch, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def _delete_abandoned(target: Path) -> None:
    """Removes the scratch folders for `target` that dead processes left: nobody holds their locks."""
    for scratch in target.parent.glob(f".{glob.escape(target.name)}.partial-*"):
        with contextlib.suppress(OSError):
            handle = os.open(scratch, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _delete(scratch)
            finally:
                os.close(handle)
    _delete(_scratch(target))  # of this process's number, whatever it is


def discard(path: Path) -> None:
    """Removes a file, a link or a folder, which vanishes at once: no death leaves half of it under its name.

    Raises StorageError where the disk doesn't let it.
    """
    scratch = _scratch(path)
    _delete(scratch)
    try:
        path.rename(scratch)
    except OSError as error:
        raise storage_error(error, path) from error
    _delete(scratch)  # what stays of it is hidden, and `clean` tries again


def _delete(path: Path) -> None:
    """Removes what is at `path`, as far as the disk lets it; never what a link points to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def sync_tree(folder: Path) -> None:
    """Brings every file below `folder`, and the folders, to the disk."""
    for root, _, names in os.walk(folder, topdown=False):
        for name in names:
            sync(Path(root, name))
        sync(Path(root))


def sync(path: Path) -> None:
    """Brings one file or folder to the disk, on macOS past the drive's own cache; a folder where the disk can do it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        if sys.platform == "darwin":
            with contextlib.suppress(OSError):  # network and FAT disks do not have it
                fcntl.fcntl(handle, fcntl.F_FULLFSYNC)
                return
        try:
            os.fsync(handle)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
                raise
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Writes a whole file or nothing; an older file stays until the new one is complete."""
    make_folder(path.parent)
    scratch = _scratch(path)
    try:
        scratch.write_text(text, encoding="utf-8")
        sync(scratch)
        scratch.replace(path)
        sync(path.parent)
    except OSError as error:
        raise storage_error(error, path) from error
    finally:
        _delete(scratch)


def append_line(path: Path, line: str) -> int:
    """Adds a line to a log and returns its size in bytes. A line that a death or a full disk cut off goes first.

    The line is in the file when this returns, and on the disk after `sync_log`. Raises OutputError or StorageError.
    """
    make_folder(path.parent)
    try:
        with _opened(path) as handle:
            full = os.fstat(handle).st_size
            size = _whole_lines(handle, full)
            if size < full:
                os.ftruncate(handle, size)
            content = memoryview(f"{line}\n".encode())
            try:
                while content:
                    content = content[os.write(handle, content) :]
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(handle, size)
                raise
            return os.fstat(handle).st_size
    except OSError as error:
        raise storage_error(error, path) from error


def cut_log(path: Path, size: int) -> None:
    """Shortens a log to `size` bytes, or to its whole lines where it is shorter. Raises OutputError or StorageError."""
    if not os.path.lexists(path):
        return
    try:
        with _opened(path) as handle:
            os.ftruncate(handle, _whole_lines(handle, min(size, os.fstat(handle).st_size)))
    except OSError as error:
        raise storage_error(error, path) from error


def sync_log(path: Path) -> None:
    """Brings a log to the disk, where there is one. Raises StorageError."""
    try:
        if path.exists():
            sync(path)
    except OSError as error:
        raise storage_error(error, path) from error


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    """A handle for reading and appending; a link to another file is not followed."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    try:
        yield handle
    finally:
        os.close(handle)


def _whole_lines(handle: int, size: int) -> int:
    """The bytes of the whole lines within the first `size` bytes of a file."""
    while size > 0:
        start = max(0, size - 4096)
        end = os.pread(handle, size - start, start).rfind(b"\n")
        if end >= 0:
            return start + end + 1
        size = start
    return 0


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
