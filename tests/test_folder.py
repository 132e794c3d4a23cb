"""Model folders: what belongs to a model is read, and nothing that lies beside it."""

import json
import os
import shutil
from pathlib import Path

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlxtune import folder as folders
from mlxtune import headers, model, shards
from mlxtune.cli import main
from mlxtune.errors import ModelError
from tests.spoil import set_json, write

TOKENS = mx.array([[1, 323, 201, 67, 2, 201, 1, 324]])


@pytest.fixture
def sharded(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The embedded model in four files with an index."""
    folder = tmp_path / "sharded"
    folder.mkdir()
    lm = model.load(tiny)
    with monkeypatch.context() as patched:
        patched.setattr(shards, "SHARD_BYTES", 1_500_000)
        model.save(folder, lm.net, lm.config, tiny)
    return folder


def same_weights(a: Path, b: Path) -> bool:
    left, right = (dict(tree_flatten(model.load(each).net.parameters())) for each in (a, b))
    return left.keys() == right.keys() and all(mx.array_equal(left[name], right[name]).item() for name in left)


def test_no_folder_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="gone: is not a model folder; give a folder with config.json and weights"):
        folders.check(tmp_path / "gone")


def test_every_tensor_is_found_once(sharded: Path, tiny: Path) -> None:
    found, whole = folders.tensors(sharded), headers.read(tiny / "model.safetensors")
    assert {name: (each.dtype, each.shape) for name, each in found.items()} == {
        name: (each.dtype, each.shape) for name, each in whole.items()
    }


def test_what_the_index_does_not_name_is_not_read(sharded: Path, tiny: Path, tmp_path: Path) -> None:
    """A stale shard of another download would have won: mlx-lm reads all that is called model*.safetensors."""
    stale = sharded / "model-99999-of-99999.safetensors"
    mx.save_safetensors(str(stale), {"model.norm.weight": mx.full((192,), 7.0)})
    write("model-old.safetensors", b"\xff" * 64)(sharded)
    assert folders.stale(sharded) == [stale, sharded / "model-old.safetensors"]
    assert same_weights(sharded, tiny)
    with pytest.raises(SystemExit) as caught:
        main(["convert", str(sharded), "--mlx-path", str(tmp_path / "out")])
    assert caught.value.code == 0
    assert same_weights(tmp_path / "out", tiny)
    stale.unlink()
    (sharded / "model-old.safetensors").unlink()
    assert folders.stale(sharded) == []
    assert folders.stale(tmp_path / "gone") == []


def test_weights_may_be_called_otherwise(sharded: Path, tiny: Path) -> None:
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    for name in set(index["weight_map"].values()):
        (sharded / name).rename(sharded / f"weights{name[5:]}")
    renamed = {name: f"weights{home[5:]}" for name, home in index["weight_map"].items()}
    set_json("model.safetensors.index.json", weight_map=renamed)(sharded)
    assert same_weights(sharded, tiny)


def test_links_into_a_cache_are_followed(tiny: Path, tmp_path: Path) -> None:
    """As the hub's cache has them: a snapshot of links to files that are named by their hashes."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(tiny.iterdir())):
        shutil.copyfile(file, blobs / f"{number}")
        (snapshot / file.name).symlink_to(Path("../../blobs") / f"{number}")
    assert same_weights(snapshot, tiny)


def test_a_relative_path_is_loaded(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(tiny, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    assert same_weights(Path("model"), tiny)


def test_weights_are_read_when_the_links_have_gone(tiny: Path) -> None:
    config = folders.check(tiny)
    with folders.only_what_is_named(tiny, config) as named:
        files = sorted(each.name for each in named.iterdir())
        net, _ = mlx_lm.utils.load_model(named, lazy=True)
    assert files == ["config.json", "model-00000.safetensors"]
    assert not named.exists()
    np.testing.assert_array_equal(np.array(net(TOKENS)), np.array(model.load(tiny).net(TOKENS)))


def test_the_fingerprint_is_that_of_the_named_files(sharded: Path) -> None:
    before = model.fingerprint(sharded)
    write("model-old.safetensors", b"\xff" * 64)(sharded)
    assert model.fingerprint(sharded) == before
    file = model.weight_files(sharded)[2]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert model.fingerprint(sharded) != before


def test_an_index_of_a_gigabyte_is_not_parsed(sharded: Path) -> None:
    os.truncate(sharded / "model.safetensors.index.json", 2**30)
    with pytest.raises(ModelError, match=r"index\.json: has 1073741824 bytes, too many for settings"):
        folders.check(sharded)


def test_code_is_not_copied(tiny: Path, tmp_path: Path) -> None:
    source, target = Path(shutil.copytree(tiny, tmp_path / "source")), tmp_path / "target"
    (source / "modeling_own.py").write_text("")
    target.mkdir()
    lm = model.load(source)
    model.save(target, lm.net, lm.config, source)
    assert not list(target.glob("*.py"))


def test_what_was_checked_is_told_to_whoever_watches(tiny: Path) -> None:
    seen: dict[str, mx.array] = {}
    config = folders.check(tiny)
    net, _ = model.network(tiny, config, seen.update)
    assert seen.keys() == folders.tensors(tiny).keys()
    held = {id(each) for _, each in tree_flatten(net.parameters())}
    assert all(id(each) in held for each in seen.values())
    assert type(net).__module__ == "mlx_lm.models.llama"
