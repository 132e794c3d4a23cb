"""Run folders: names, writes that are whole or not there, and the lock."""

import contextlib
import errno
import fcntl
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mlxtune import rundir
from mlxtune.errors import InputError, MlxtuneError, OutputError, StorageError
from mlxtune.rundir import RunDir


def tree(folder: Path) -> dict[str, bytes | None]:
    """Every path below a folder, hidden ones too, with the content of files."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def test_the_names_in_a_run_folder() -> None:
    run = RunDir(Path("runs/a"))
    properties = sorted(name for name, value in vars(RunDir).items() if isinstance(value, property))
    assert {name: str(getattr(run, name)) for name in properties} == {
        "adapter": "runs/a/adapter",
        "base": "runs/a/base",
        "checkpoints": "runs/a/checkpoints",
        "compare": "runs/a/compare",
        "data": "runs/a/data",
        "fused": "runs/a/fused",
        "log": "runs/a/log.jsonl",
        "loss_picture": "runs/a/loss.svg",
        "origin": "runs/a/origin.json",
        "recipe": "runs/a/recipe.yaml",
    }
    assert str(run.evaluation("tuned")) == "runs/a/eval/tuned.json"
    assert str(run.predictions("tuned")) == "runs/a/eval/tuned.jsonl"
    assert str(run.report("html")) == "runs/a/report.html"


# --- staged folders


def test_a_finished_stage_is_exactly_what_was_written(tmp_path: Path) -> None:
    target = tmp_path / "runs" / "adapter"
    with rundir.staged(target) as scratch:
        assert not target.exists()
        assert scratch.parent == target.parent  # a rename must stay on one disk
        (scratch / "a.json").write_text("1")
        (scratch / "inner").mkdir()
        (scratch / "inner" / "b").write_text("2")
    assert tree(tmp_path) == {
        "runs": None,
        "runs/adapter": None,
        "runs/adapter/a.json": b"1",
        "runs/adapter/inner": None,
        "runs/adapter/inner/b": b"2",
    }


@pytest.mark.parametrize("failure", [ValueError("bug"), KeyboardInterrupt(), SystemExit(3), OutputError("no")])
def test_a_failed_stage_leaves_nothing(tmp_path: Path, failure: BaseException) -> None:
    (tmp_path / "old").write_bytes(b"old")
    with pytest.raises(type(failure)) as caught, rundir.staged(tmp_path / "adapter") as scratch:
        (scratch / "a").write_text("1")
        raise failure
    assert caught.value is failure
    assert tree(tmp_path) == {"old": b"old"}


def test_a_failed_disk_is_a_storage_error_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(StorageError) as caught, rundir.staged(tmp_path / "adapter") as scratch:
        (scratch / "a").write_text("1")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert str(caught.value) == f"{tmp_path}/adapter: no space left on the disk; free some space and run again"
    assert tree(tmp_path) == {}


@pytest.mark.parametrize("kind", ["folder", "empty folder", "file", "broken link"])
def test_an_existing_target_is_refused_untouched(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "adapter"
    if kind == "file":
        target.write_bytes(b"old")
    elif kind == "broken link":
        target.symlink_to("nowhere")
    else:
        target.mkdir()
        if kind == "folder":
            (target / "a").write_bytes(b"old")
    before = tree(tmp_path)
    with pytest.raises(OutputError) as caught, rundir.staged(target):
        pytest.fail("the block must not run")
    assert str(caught.value) == f"{target}: exists already; choose another folder or remove it"
    assert tree(tmp_path) == before


def test_a_target_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    target = tmp_path / "adapter"
    with pytest.raises(OutputError, match="exists already"), rundir.staged(target) as scratch:
        (scratch / "a").write_text("mine")
        target.mkdir()  # an empty folder, which a rename would replace
    assert tree(tmp_path) == {"adapter": None}


def test_what_a_killed_process_left_under_this_number_is_replaced(tmp_path: Path) -> None:
    left = tmp_path / f".adapter.partial-{os.getpid()}"
    left.mkdir()
    (left / "stale").write_text("1")
    with rundir.staged(tmp_path / "adapter") as scratch:
        (scratch / "a").write_text("2")
    assert tree(tmp_path) == {"adapter": None, "adapter/a": b"2"}


def test_a_target_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(OutputError) as caught, rundir.staged(tmp_path / "file" / "adapter"):
        pytest.fail("the block must not run")
    assert str(caught.value) == f"{tmp_path}/file/adapter: lies below a file; choose another folder"
    assert tree(tmp_path) == {"file": b"old"}


def test_refuse_existing_names_the_flag(tmp_path: Path) -> None:
    rundir.refuse_existing(tmp_path / "new", "--mlx-path")
    with pytest.raises(OutputError) as caught:
        rundir.refuse_existing(tmp_path, "--mlx-path")
    assert str(caught.value) == f"{tmp_path}: exists already; choose another --mlx-path or remove it"


# --- errors of the disk


@pytest.mark.parametrize(
    ("number", "kind", "line"),
    [
        (errno.ENOSPC, StorageError, "x: no space left on the disk; free some space and run again"),
        (errno.EDQUOT, StorageError, "x: no space left on the disk; free some space and run again"),
        (errno.EACCES, StorageError, "x: may not be written: Permission denied; choose a folder you may write to"),
        (errno.EROFS, StorageError, "x: may not be written: Read-only file system; choose a folder you may write to"),
        (errno.ENOTDIR, OutputError, "x: is a file, or lies below one; choose another folder"),
        (errno.EEXIST, OutputError, "x: is a file, or lies below one; choose another folder"),
        (errno.EIO, StorageError, "x: cannot be written: Input/output error"),
    ],
)
def test_storage_error(number: int, kind: type[MlxtuneError], line: str) -> None:
    error = rundir.storage_error(OSError(number, os.strerror(number)), Path("x"))
    assert type(error) is kind
    assert str(error) == line


def test_storage_error_without_a_number() -> None:
    assert str(rundir.storage_error(OSError("strange"), Path("x"))) == "x: cannot be written: strange"


def test_a_disk_that_syncs_only_in_the_plain_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # F_FULLFSYNC of macOS is a call that this file's disk does not know either
    monkeypatch.setattr(rundir.sys, "platform", "darwin")
    monkeypatch.setattr(rundir.fcntl, "F_FULLFSYNC", 999, raising=False)
    synced: list[int] = []
    monkeypatch.setattr(rundir.os, "fsync", synced.append)
    (tmp_path / "a").write_text("1")
    rundir.sync(tmp_path / "a")
    assert len(synced) == 1


# --- whole files


def test_content_reaches_the_disk_before_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, bool]] = []

    def sync(path: Path) -> None:
        seen.append((path.name.partition(".partial-")[0], target.exists()))

    monkeypatch.setattr(rundir, "sync", sync)
    target = tmp_path / "a.txt"
    rundir.write_text(target, "text")
    assert seen == [(".a.txt", False), (tmp_path.name, True)]
    seen.clear()
    target = tmp_path / "adapter"
    with rundir.staged(target) as scratch:
        (scratch / "inner").mkdir()
        (scratch / "inner" / "b").write_text("2")
    assert seen == [("b", False), ("inner", False), (".adapter", False), (tmp_path.name, True)]


def test_write_text_replaces_the_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    rundir.write_text(path, "a long first text, ä\n")
    assert path.read_bytes() == "a long first text, ä\n".encode()
    rundir.write_text(path, "second")
    assert tree(tmp_path) == {"new": None, "new/a.txt": b"second"}


def test_a_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    script = """
import resource, sys
from pathlib import Path
from mlxtune import rundir
from mlxtune.errors import StorageError
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    rundir.write_text(Path(sys.argv[1]), "x" * 100_000)
except StorageError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == (f"{path}: cannot be written: File too large\n", "")
    assert tree(tmp_path) == {"a.txt": b"old"}


def test_text_that_cannot_be_encoded_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError):
        rundir.write_text(path, "half a pair: \ud83d")
    assert tree(tmp_path) == {"a.txt": b"old"}


def test_write_text_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    with pytest.raises(OutputError):
        rundir.write_text(tmp_path / "file" / "a.txt", "new")
    assert tree(tmp_path) == {"file": b"old"}


def test_write_text_onto_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(StorageError, match="cannot be written: Is a directory"):
        rundir.write_text(tmp_path / "a", "new")
    assert tree(tmp_path) == {"a": None}


def test_json_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    value = {"name": "ä", "list": [1, 2.5, None, True]}
    rundir.write_json(path, value)
    assert path.read_text(encoding="utf-8") == (
        '{\n  "name": "ä",\n  "list": [\n    1,\n    2.5,\n    null,\n    true\n  ]\n}\n'
    )
    assert rundir.read_json(path) == value


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_json_is_not_written(tmp_path: Path, value: float) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(ValueError, match="Out of range float values are not JSON compliant"):
        rundir.write_json(path, {"loss": value})
    assert tree(tmp_path) == {"a.json": b"old"}


@pytest.mark.parametrize(
    ("content", "place", "what"),
    [
        (None, "", "no such file"),
        (b'{"a": 1,\n "b": }', ":2", "not valid JSON: Expecting value"),
        (b"", ":1", "not valid JSON: Expecting value"),
        (b"\xff\xfe", "", "is not UTF-8"),
        (b"[" * 100_000, "", "cannot be read: maximum recursion depth exceeded"),
        (b"9" * 5000, "", "cannot be read: Exceeds the limit"),
    ],
)
def test_read_json_of_a_malformed_file(tmp_path: Path, content: bytes | None, place: str, what: str) -> None:
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        rundir.read_json(path)
    assert caught.value.where == f"{path}{place}"
    assert caught.value.what.startswith(what)
    assert caught.value.exit_code == 2


def test_read_json_of_a_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        rundir.read_json(tmp_path)
    assert str(caught.value) == f"{tmp_path}: cannot be read: Is a directory"


def test_size_of(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"123")
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / ".b").write_bytes(b"4567")
    (tmp_path / "inner" / "gone").symlink_to("nowhere")
    assert rundir.size_of(tmp_path / "a") == 3
    assert rundir.size_of(tmp_path) == 7
    assert rundir.size_of(tmp_path / "none") == 0


# --- the lock

HOLD = """
import sys, time
from pathlib import Path
from mlxtune.rundir import RunDir
with RunDir(Path(sys.argv[1])).lock():
    print("held", flush=True)
    time.sleep(60)
"""


@contextlib.contextmanager
def held_elsewhere(folder: Path) -> Any:
    """Another process holds the folder's lock; it is killed at the end."""
    with subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def test_a_second_process_is_refused_until_the_first_is_killed(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    with held_elsewhere(run.root) as process:
        with pytest.raises(OutputError) as caught, run.lock():
            pytest.fail("the block must not run")
        assert str(caught.value) == f"{run.root}: another run is at work in this folder; wait for it"
        process.kill()
        process.wait()
        with run.lock():
            pass


def test_the_lock_is_free_again_afterwards(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    with contextlib.suppress(ValueError), run.lock():
        raise ValueError
    with run.lock(), pytest.raises(OutputError), run.lock():
        pytest.fail("the block must not run")
    assert tree(tmp_path) == {"run": None, "run/.lock": b""}


def test_a_child_process_does_not_keep_the_lock(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    with run.lock():
        script = "import time; print('up', flush=True); time.sleep(60)"
        child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, close_fds=False)
    with child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == b"up\n"
            with run.lock():
                pass
        finally:
            child.kill()


def test_a_run_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("old")
    with pytest.raises(OutputError, match="is a file, or lies below one"), RunDir(tmp_path / "run").lock():
        pytest.fail("the block must not run")
    assert tree(tmp_path) == {"run": b"old"}


def test_clean_removes_what_a_killed_process_left(tmp_path: Path) -> None:
    run = rundir.RunDir(tmp_path / "run")
    keep = [run.root / "recipe.yaml", run.evaluation("base"), run.adapter / "adapters.safetensors"]
    left = [
        run.root / ".fused.partial-12" / "w",
        run.root / "eval" / ".base.json.partial-9",
        run.checkpoints / ".a.partial-1" / "x",
    ]
    for file in keep + left:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("x")
    run.clean()
    files = {file for file in run.root.rglob("*") if file.is_file()}
    assert files == set(keep)
    assert not any(".partial-" in folder.name for folder in run.root.rglob("*"))


def test_a_failed_stage_takes_back_the_folders_it_made(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    with pytest.raises(KeyError), rundir.staged(tmp_path / "kept" / "new" / "deep" / "target"):
        raise KeyError
    assert [each.name for each in tmp_path.rglob("*")] == ["kept"]


# --- what is in the way, and what the dead left


def test_a_writer_of_mlx_that_fails_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError) as caught, rundir.staged(tmp_path / "adapter"):
        raise RuntimeError("[write] Unable to write 8 bytes to file.")
    assert str(caught.value).endswith(
        "adapter: cannot be written: [write] Unable to write 8 bytes to file.; is the disk full?"
    )
    with pytest.raises(RuntimeError, match="shapes"), rundir.staged(tmp_path / "adapter"):
        raise RuntimeError("[matmul] shapes")
    assert tree(tmp_path) == {}


def test_a_stage_removes_what_dead_processes_left_and_nothing_else(tmp_path: Path) -> None:
    for name in (".adapter.partial-1", ".adapter.partial-2", ".other.partial-1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "w").write_text("x")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / ".adapter.partial-3").symlink_to("elsewhere")
    alive = os.open(tmp_path / ".adapter.partial-2", os.O_RDONLY)
    fcntl.flock(alive, fcntl.LOCK_EX)
    with rundir.staged(tmp_path / "adapter") as scratch:
        (scratch / "a").write_text("1")
        with rundir.staged(tmp_path / "adapter-2"):
            assert scratch.exists()
    os.close(alive)
    assert sorted(each.name for each in tmp_path.iterdir() if each.name.startswith(".")) == [
        ".adapter.partial-2",
        ".adapter.partial-3",
        ".other.partial-1",
    ]


def test_a_scratch_name_taken_by_a_link_is_freed_and_the_link_not_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "mine").write_text("mine")
    (tmp_path / f".adapter.partial-{os.getpid()}").symlink_to("elsewhere")
    with rundir.staged(tmp_path / "adapter"):
        pass
    assert tree(tmp_path) == {"adapter": None, "elsewhere": None, "elsewhere/mine": b"mine"}


def test_a_loop_of_links_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OutputError) as caught, rundir.staged(tmp_path / "loop" / "adapter"):
        pytest.fail("the block must not run")
    assert str(caught.value) == f"{tmp_path}/loop: is a file, or lies below one; choose another folder"


def test_a_link_as_lock_or_log_is_refused_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine\n")
    for name in (".lock", "log.jsonl"):
        (tmp_path / name).symlink_to("mine")
    with pytest.raises(OutputError, match="symbolic link"), RunDir(tmp_path).lock():
        pytest.fail("the block must not run")
    with pytest.raises(OutputError, match="symbolic link"):
        rundir.append_line(tmp_path / "log.jsonl", "{}")
    with pytest.raises(OutputError, match="symbolic link"):
        rundir.cut_log(tmp_path / "log.jsonl", 0)
    assert (tmp_path / "mine").read_text() == "mine\n"


def test_the_holder_of_the_lock_finds_a_clean_folder(tmp_path: Path) -> None:
    left = tmp_path / "checkpoints" / ".step-0000001.partial-1"
    left.mkdir(parents=True)
    (left.parent / ".step-0000002.partial-1").symlink_to(left)
    with RunDir(tmp_path).lock():
        assert list(left.parent.iterdir()) == []


def test_a_lock_file_that_another_process_removes_is_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between opening it and locking it, the file goes: the lock must be on the file that others will see."""
    real, calls = fcntl.flock, 0

    def flock(handle: int, how: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            (tmp_path / ".lock").unlink()
        real(handle, how)

    monkeypatch.setattr(rundir.fcntl, "flock", flock)
    with RunDir(tmp_path).lock():
        assert calls == 2
        with pytest.raises(OutputError, match="another run"), RunDir(tmp_path).lock():
            pytest.fail("the block must not run")


def test_a_discarded_thing_is_gone_and_links_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    (tmp_path / "folder" / "inner" / "a").write_text("1")
    (tmp_path / "file").write_text("1")
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "mine").write_text("mine")
    (tmp_path / "link").symlink_to("kept")
    for name in ("folder", "file", "link"):
        rundir.discard(tmp_path / name)
    assert tree(tmp_path) == {"kept": None, "kept/mine": b"mine"}
    with pytest.raises(StorageError, match="No such file"):
        rundir.discard(tmp_path / "file")


def test_a_disk_that_cannot_sync_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(handle: int) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(rundir.os, "fsync", fsync)
    rundir.sync(tmp_path)
    (tmp_path / "a").write_text("1")
    with pytest.raises(OSError, match="Invalid argument"):
        rundir.sync(tmp_path / "a")


def test_new_folders_survive_a_loss_of_power(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(rundir, "sync", synced.append)
    rundir.make_folder(tmp_path / "a" / "b")
    assert synced == [tmp_path / "a", tmp_path]


# --- logs


def test_lines_are_appended_and_their_size_told(tmp_path: Path) -> None:
    log = tmp_path / "new" / "log.jsonl"
    assert rundir.append_line(log, "ä") == 3
    assert rundir.append_line(log, "b") == 5
    assert log.read_text() == "ä\nb\n"


@pytest.mark.parametrize("torn", ["x", "x" * 10_000, "\0\0\0"])
def test_a_torn_line_goes_before_the_next(tmp_path: Path, torn: str) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text("a\n" + torn)
    assert rundir.append_line(log, "b") == 4
    assert log.read_text() == "a\nb\n"
    log.write_text(torn)
    rundir.append_line(log, "b")
    assert log.read_text() == "b\n"


@pytest.mark.parametrize(
    ("size", "left"), [(0, ""), (1, ""), (2, "a\n"), (3, "a\n"), (4, "a\nb\n"), (5, "a\nb\n"), (900, "a\nb\n")]
)
def test_a_log_is_cut_to_whole_lines_and_never_grows(tmp_path: Path, size: int, left: str) -> None:
    log = tmp_path / "log.jsonl"
    rundir.cut_log(log, size)
    assert not log.exists()
    log.write_text("a\nb\nc")
    rundir.cut_log(log, size)
    assert log.read_text() == left


def test_a_log_is_synced_where_there_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rundir.sync_log(tmp_path / "log.jsonl")
    rundir.append_line(tmp_path / "log.jsonl", "a")

    def fsync(handle: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(rundir.os, "fsync", fsync)
    with pytest.raises(StorageError, match="cannot be written: Input/output error"):
        rundir.sync_log(tmp_path / "log.jsonl")


def test_a_log_that_is_a_folder(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="Is a directory"):
        rundir.append_line(tmp_path, "a")
    with pytest.raises(StorageError, match="Is a directory"):
        rundir.cut_log(tmp_path, 0)
