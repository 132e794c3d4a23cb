"""Checkpoints: whole or passed over, the newest kept."""

from pathlib import Path

import mlx.core as mx

from mlxtune import checkpoint
from mlxtune.checkpoint import Checkpoint


def write(folder: Path, step: int) -> Path:
    arrays = {"adapters": {"w": mx.array([float(step)])}, "optimizer": {"step": mx.array(step)}}
    return checkpoint.save(folder, Checkpoint(step, {"seen": step}, arrays), {"num_layers": 1})


def test_round_trip_and_exact_file_set(tmp_path: Path) -> None:
    folder = write(tmp_path, 3)
    assert folder.name == "step-0000003"
    names = {"adapter_config.json", "adapters.safetensors", "optimizer.safetensors", "state.json"}
    assert {file.name for file in folder.iterdir()} == names
    found, damaged = checkpoint.newest(tmp_path)
    assert damaged == []
    assert found is not None
    assert (found.step, found.state) == (3, {"seen": 3})
    assert found.arrays["adapters"]["w"].item() == 3.0


def test_only_the_newest_two_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 10):
        write(tmp_path, step)
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["step-0000002", "step-0000010"]


def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path: Path) -> None:
    write(tmp_path, 1)
    newest = write(tmp_path, 2)
    for file in sorted(newest.iterdir()):
        content = file.read_bytes()
        for broken in (content[:-1], content[:-1] + bytes([content[-1] ^ 1]), b""):
            file.write_bytes(broken)
            if file.name == "state.json" and broken == content[:-1]:
                continue  # only the last line end is gone: still whole
            found, damaged = checkpoint.newest(tmp_path)
            assert found is not None, (file.name, broken[-10:])
            assert (found.step, damaged) == (1, [newest]), file.name
        file.unlink()
        found, damaged = checkpoint.newest(tmp_path)
        assert found is not None
        assert (found.step, damaged) == (1, [newest]), file.name
        file.write_bytes(content)
    found, damaged = checkpoint.newest(tmp_path)
    assert found is not None
    assert (found.step, damaged) == (2, [])


def test_no_checkpoints(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path / "none") == (None, [])
