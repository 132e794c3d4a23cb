"""Checkpoints: whole or passed over, the newest kept, whatever lies in the way."""

import dataclasses
import hashlib
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxtune import checkpoint
from mlxtune.checkpoint import Checkpoint
from mlxtune.errors import OutputError, StorageError
from mlxtune.rundir import discard

FILES = ("adapter_config.json", "adapters.safetensors", "manifest.json", "optimizer.safetensors", "state.json")
STATE = {"step": 0, "seen": 0, "loss": 0.5, "best": None}


def write(folder: Path, step: int) -> Path:
    arrays = {
        "adapters": {"w": mx.array([float(step)] * 300), "half": mx.array([1.5, step], mx.bfloat16)},
        "optimizer": {"step": mx.array(step, mx.uint64), "turned": mx.arange(6.0).reshape(2, 3).T},
    }
    state = STATE | {"step": step, "seen": 3 * step}
    return checkpoint.save(folder, Checkpoint(step, state, arrays), {"num_layers": 1})


def usable(found: Checkpoint) -> bool:
    """What a trainer asks of its own state."""
    return found.state.keys() == STATE.keys() and all(type(found.state[name]) is int for name in ("step", "seen"))


def steps(folder: Path) -> list[str]:
    return sorted(each.name for each in folder.iterdir())


# --- save and find


def test_round_trip_and_exact_file_set(tmp_path: Path) -> None:
    folder = write(tmp_path, 3)
    assert folder.name == "step-0000003"
    assert tuple(sorted(file.name for file in folder.iterdir())) == FILES
    found, damaged = checkpoint.newest(tmp_path)
    assert damaged == []
    assert found is not None
    assert (found.step, found.state) == (3, STATE | {"step": 3, "seen": 9})
    assert found.arrays["adapters"]["w"].tolist() == [3.0] * 300
    assert found.arrays["adapters"]["half"].dtype == mx.bfloat16
    assert found.arrays["optimizer"]["step"].item() == 3
    assert found.arrays["optimizer"]["turned"].tolist() == [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]


def test_the_manifest_has_the_hash_of_every_other_file(tmp_path: Path) -> None:
    folder = write(tmp_path, 3)
    hashes = json.loads((folder / "manifest.json").read_text())["sha256"]
    assert hashes == {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in FILES if name != "manifest.json"
    }


def test_the_tensors_are_as_mlx_writes_them(tmp_path: Path) -> None:
    tensors = {f"{number}": mx.array(np.full((number, 7), number, np.float32)) for number in range(1, 9)}
    folder = checkpoint.save(tmp_path, Checkpoint(1, {}, {"adapters": tensors}), {})
    mx.save_safetensors(str(tmp_path / "plain"), tensors, metadata={"format": "mlx"})
    assert (folder / "adapters.safetensors").read_bytes() == (tmp_path / "plain.safetensors").read_bytes()


def test_only_the_newest_two_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 10):
        write(tmp_path, step)
    assert steps(tmp_path) == ["step-0000002", "step-0000010"]


def test_steps_beyond_seven_digits_are_in_order(tmp_path: Path) -> None:
    for step in (9_999_998, 9_999_999, 10_000_000):
        write(tmp_path, step)
    assert steps(tmp_path) == ["step-10000000", "step-9999999"]
    found, _ = checkpoint.newest(tmp_path)
    assert found is not None
    assert found.step == 10_000_000


def test_no_clock_decides_which_is_newest(tmp_path: Path) -> None:
    for step, time in ((1, 2_000_000_000), (2, 0)):
        folder = write(tmp_path, step)
        for each in (*folder.iterdir(), folder):
            os.utime(each, (time, time))
    found, _ = checkpoint.newest(tmp_path)
    assert found is not None
    assert found.step == 2


def test_one_that_is_there_is_not_written_again(tmp_path: Path) -> None:
    folder = write(tmp_path, 1)
    before = (folder / "state.json").stat().st_mtime_ns
    assert write(tmp_path, 1) == folder
    assert (folder / "state.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("kind", ["damaged", "file", "link", "empty"])
def test_a_damaged_one_in_the_way_is_replaced(tmp_path: Path, kind: str) -> None:
    folder = write(tmp_path, 1)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "mine").write_text("mine")
    if kind == "damaged":
        (folder / "state.json").unlink()
    else:
        shutil.rmtree(folder)
        {"file": folder.touch, "link": lambda: folder.symlink_to(elsewhere), "empty": folder.mkdir}[kind]()
    write(tmp_path, 1)
    found, damaged = checkpoint.newest(tmp_path)
    assert found is not None
    assert (found.step, damaged) == (1, [])
    assert (elsewhere / "mine").read_text() == "mine"


def test_the_one_just_saved_is_never_removed_for_later_damaged_ones(tmp_path: Path) -> None:
    write(tmp_path, 2)
    for step in (8, 9):
        (write(tmp_path, step) / "state.json").unlink()
    write(tmp_path, 3)
    found, damaged = checkpoint.newest(tmp_path)
    assert found is not None
    assert (found.step, [each.name for each in damaged]) == (3, ["step-0000009", "step-0000008"])


def test_other_names_are_left_alone(tmp_path: Path) -> None:
    names = ["step-1", "step-0000002 copy", "step-abcdefg", "notes", "step-00000003", "step-000000٣"]
    for name in names:
        (tmp_path / name).mkdir()
    assert checkpoint.newest(tmp_path) == (None, [])
    for step in (5, 6, 7):
        write(tmp_path, step)
    assert steps(tmp_path) == sorted([*names, "step-0000006", "step-0000007"])


def test_no_checkpoints(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path / "none") == (None, [])


# --- damage


def truncated(size: int) -> Callable[[Path], None]:
    return lambda file: os.truncate(file, max(0, file.stat().st_size + size if size < 0 else size))


def flipped(place: float) -> Callable[[Path], None]:
    """One bit of a byte at this share of the file."""

    def damage(file: Path) -> None:
        content = bytearray(file.read_bytes())
        content[int(place * (len(content) - 1))] ^= 1
        file.write_bytes(content)

    return damage


def replaced(content: bytes) -> Callable[[Path], None]:
    return lambda file: void(file.write_bytes(content))


def void(*_: Any) -> None:
    """For a lambda that has something to return and should not."""


def instead(make: Callable[[Path], Any]) -> Callable[[Path], None]:
    """Something else under the file's name."""
    return lambda file: void(file.unlink(), make(file))


def link_to(target: str) -> Callable[[Path], None]:
    return instead(lambda file: file.symlink_to(target))


ON_EACH_FILE: dict[str, Callable[[Path], None]] = {
    "deleted": Path.unlink,
    "emptied": truncated(0),
    "one byte left": truncated(1),
    "cut by 20": truncated(-20),
    "a bit early on": flipped(0.1),
    "a bit in the middle": flipped(0.5),
    "a bit near the end": flipped(0.93),
    "zeros": lambda file: void(file.write_bytes(bytes(file.stat().st_size))),
    "garbage added": lambda file: void(file.write_bytes(file.read_bytes() + b"garbage")),
    "a folder": instead(Path.mkdir),
    "a pipe": instead(os.mkfifo),
    "a dangling link": link_to("nowhere"),
    "a link to itself": instead(lambda file: file.symlink_to(file)),
    "a link to another file": link_to("/dev/null"),
    "not UTF-8": replaced(b"\xff\xfe\x00"),
    "the same of the step before": lambda file: void(
        shutil.copyfile(file.parents[1] / "step-0000001" / file.name, file) if file.name in CHANGING else file.unlink()
    ),
}
CHANGING = ("adapters.safetensors", "manifest.json", "optimizer.safetensors", "state.json")


def changed(name: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    """A JSON file changed, with a manifest whose hashes fit."""

    def damage(folder: Path) -> None:
        file = folder / name
        file.write_text(json.dumps(change(json.loads(file.read_text()))))
        sign(folder)

    return damage


def sign(folder: Path) -> None:
    hashes = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}
    hashes.pop("manifest.json")
    (folder / "manifest.json").write_text(json.dumps({"sha256": hashes}))


def manifest(value: Any) -> Callable[[Path], None]:
    return lambda folder: void((folder / "manifest.json").write_text(json.dumps(value)))


def signed(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: void((folder / name).write_bytes(content), sign(folder))


def tensors(**values: float) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        mx.save_safetensors(str(folder / "adapters"), {name: mx.array([value]) for name, value in values.items()})
        sign(folder)

    return damage


def without(*names: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda value: {key: each for key, each in value.items() if key not in names}


def swapped(one: str, other: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        first, second = (folder / one).read_bytes(), (folder / other).read_bytes()
        (folder / one).write_bytes(second)
        (folder / other).write_bytes(first)

    return damage


def outside(folder: Path) -> None:
    """A manifest that names a file of another folder, with its true hash."""
    value = json.loads((folder / "manifest.json").read_text())
    other = folder.parent / "step-0000001" / "state.json"
    value["sha256"]["../step-0000001/state.json"] = hashlib.sha256(other.read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(value))


ON_THE_FOLDER: dict[str, Callable[[Path], None]] = {
    "swapped tensors": swapped("adapters.safetensors", "optimizer.safetensors"),
    "swapped JSON": swapped("state.json", "adapter_config.json"),
    "swapped manifest": swapped("manifest.json", "state.json"),
    "no files": lambda folder: void([file.unlink() for file in folder.iterdir()]),
    "a file": lambda folder: void(shutil.rmtree(folder), folder.write_text("x")),
    "an older one under its name": lambda folder: void(
        shutil.rmtree(folder), shutil.copytree(folder.parent / "step-0000001", folder)
    ),
    "a link to an older one": lambda folder: void(shutil.rmtree(folder), folder.symlink_to("step-0000001")),
    "a link to nowhere": lambda folder: void(shutil.rmtree(folder), folder.symlink_to("nowhere")),
    "a link to itself": lambda folder: void(shutil.rmtree(folder), folder.symlink_to(folder)),
    "manifest: a list": manifest([]),
    "manifest: a number": manifest(3),
    "manifest: null": manifest(None),
    "manifest: empty": manifest({}),
    "manifest: hashes null": manifest({"sha256": None}),
    "manifest: hashes a list": manifest({"sha256": ["state.json"]}),
    "manifest: no files": manifest({"sha256": {}}),
    "manifest: other types": manifest({"sha256": dict.fromkeys(FILES, 1)}),
    "manifest: wrong hashes": manifest({"sha256": dict.fromkeys(FILES, "0" * 64)}),
    "manifest: deep": lambda folder: void((folder / "manifest.json").write_bytes(b"[" * 100_000)),
    "manifest: a long number": lambda folder: void((folder / "manifest.json").write_bytes(b"9" * 5000)),
    "manifest: a file elsewhere": outside,
    "state: a list, signed": changed("state.json", lambda value: [value]),
    "state: empty, signed": changed("state.json", lambda value: {}),
    "state: no step, signed": changed("state.json", without("step")),
    "state: no state, signed": changed("state.json", without("state")),
    "state: another step, signed": changed("state.json", lambda value: value | {"step": 7}),
    "state: a text as step, signed": changed("state.json", lambda value: value | {"step": "2"}),
    "state: true as step, signed": changed("state.json", lambda value: value | {"step": True}),
    "state: a list as state, signed": changed("state.json", lambda value: value | {"state": [1]}),
    "state: keys missing, signed": changed("state.json", lambda value: value | {"state": {}}),
    "state: a key too many, signed": changed("state.json", lambda value: value | {"state": STATE | {"more": 1}}),
    "state: another type, signed": changed("state.json", lambda value: value | {"state": STATE | {"seen": "3"}}),
    "state: no JSON, signed": signed("state.json", b"{"),
    "config: a list, signed": signed("adapter_config.json", b"[]"),
    "config: no JSON, signed": signed("adapter_config.json", b"{"),
    "tensors: empty file, signed": signed("adapters.safetensors", b""),
    "tensors: no header, signed": signed("adapters.safetensors", b"x" * 500),
    "tensors: a huge header, signed": signed("adapters.safetensors", struct.pack("<Q", 2**60) + b"{}"),
    "tensors: beyond the file, signed": signed(
        "adapters.safetensors", struct.pack("<Q", 56) + b'{"w":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}} '
    ),
    "tensors: NaN, signed": tensors(w=float("nan")),
    "tensors: infinite, signed": tensors(w=1.0, half=float("-inf")),
    "optimizer: cut, signed": lambda folder: void(truncated(-8)(folder / "optimizer.safetensors"), sign(folder)),
}
WAYS: dict[str, Callable[[Path], None]] = {
    **{f"{file}: {name}": lambda folder, f=file, d=damage: d(folder / f) for file in FILES for name, damage in
       ON_EACH_FILE.items()},
    **ON_THE_FOLDER,
}  # fmt: skip


def test_there_are_enough_ways_to_damage_one() -> None:
    assert len(WAYS) >= 50


@pytest.mark.parametrize("way", WAYS)
def test_a_damaged_newest_one_falls_back_to_the_one_before(tmp_path: Path, way: str) -> None:
    write(tmp_path, 1)
    folder = write(tmp_path, 2)
    WAYS[way](folder)
    found, damaged = checkpoint.newest(tmp_path, usable)
    assert found is not None
    assert (found.step, damaged) == (1, [folder])  # one warning each
    discard(folder)
    assert write(tmp_path, 2) == folder  # the rerun takes its place
    found, damaged = checkpoint.newest(tmp_path, usable)
    assert found is not None
    assert (found.step, found.state["seen"], damaged) == (2, 6, [])


@pytest.mark.parametrize("place", ["", *FILES])
def test_what_may_not_be_read_is_passed_over(tmp_path: Path, place: str) -> None:
    write(tmp_path, 1)
    folder = write(tmp_path, 2)
    (folder / place).chmod(0)
    if os.access(folder / place, os.R_OK):
        pytest.skip("this user may read everything")
    found, damaged = checkpoint.newest(tmp_path)
    (folder / place).chmod(0o755)
    assert found is not None
    assert (found.step, damaged) == (1, [folder])


def test_a_file_more_does_no_harm(tmp_path: Path) -> None:
    (write(tmp_path, 1) / ".DS_Store").write_bytes(b"x")
    found, damaged = checkpoint.newest(tmp_path)
    assert found is not None
    assert damaged == []


def test_all_damaged(tmp_path: Path) -> None:
    folders = [write(tmp_path, step) for step in (1, 2)]
    for folder in folders:
        (folder / "state.json").write_text("{}")
    assert checkpoint.newest(tmp_path) == (None, folders[::-1])


# --- in the way


def test_checkpoints_may_lie_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    folder = tmp_path / "checkpoints"
    folder.symlink_to("disk")
    for step in (1, 2, 3):
        write(folder, step)
    assert steps(tmp_path / "disk") == ["step-0000002", "step-0000003"]
    found, damaged = checkpoint.newest(folder)
    assert found is not None
    assert (found.step, damaged) == (3, [])


@pytest.mark.parametrize("kind", ["loop", "dangling", "file", "below a file"])
def test_a_folder_that_cannot_be(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "checkpoints"
    if kind == "loop":
        folder.symlink_to(folder)
    elif kind == "dangling":
        folder.symlink_to("nowhere")
    else:
        folder.write_text("mine")
    if kind == "below a file":
        folder = folder / "checkpoints"
    assert checkpoint.newest(folder) == (None, [])
    with pytest.raises(OutputError):
        write(folder, 1)
    assert steps(tmp_path) == ["checkpoints"]


def test_a_folder_that_may_not_be_written(tmp_path: Path) -> None:
    write(tmp_path, 1)
    tmp_path.chmod(0o555)
    if os.access(tmp_path, os.W_OK):
        pytest.skip("this user may write everywhere")
    try:
        with pytest.raises(StorageError, match="may not be written; choose a folder you may write to"):
            write(tmp_path, 2)
        found, damaged = checkpoint.newest(tmp_path)
    finally:
        tmp_path.chmod(0o755)
    assert found is not None
    assert (found.step, damaged) == (1, [])


def test_a_checkpoint_is_frozen(tmp_path: Path) -> None:
    found, _ = checkpoint.newest(write(tmp_path, 1).parent)
    assert found is not None
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.step = 2  # type: ignore[misc]
