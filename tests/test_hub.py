"""Names of models, errors of the hub in words, and facts about it: all that needs no hub."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mlxtune import hub
from mlxtune.errors import HubError, InputError, ModelError, StorageError

OLD = "1" * 40

# --- names that need no network


def test_the_embedded_model(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert hub.fetch("tiny") == tiny


def test_a_local_folder_named_tiny_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tiny").mkdir()
    assert hub.fetch("tiny") == Path("tiny")


def test_a_local_folder_is_itself(tmp_path: Path) -> None:
    assert hub.fetch(str(tmp_path)) == tmp_path


def test_a_local_folder_comes_before_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("acme/small").mkdir(parents=True)
    assert hub.fetch("acme/small") == Path("acme/small")


@pytest.mark.parametrize("name", ["tiny", "."])
def test_a_local_folder_has_no_revision(name: str) -> None:
    with pytest.raises(InputError, match="revision 'main' is given for a local folder") as caught:
        hub.fetch(name, "main")
    assert caught.value.exit_code == 2


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(ModelError) as caught:
        hub.fetch(str(file))
    assert str(caught.value) == f"{file}: is a file, not a model folder; give the folder that it lies in"


@pytest.mark.parametrize(
    "name",
    ["./x", "../x", "/x/y", "~/nothing-here", "a/b/c", "llama", "", "a/", "/a", "a b/c", "a/..", "a/b--c", "a/b.git"]
    + ["owner/" + "x" * 97, "a/b\n", "ä/b"],
)
def test_what_is_neither_folder_nor_hub_id(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match="no such folder") as caught:
        hub.fetch(name)
    assert caught.value.exit_code == 2
    assert caught.value.hint == "give a model folder, a hub id `owner/name`, or `tiny`"


@pytest.mark.parametrize("name", ["a/b", "mlx-community/Qwen3-0.6B-4bit", "Some_One/x.y_z-1", "_a/b_"])
def test_hub_ids(name: str) -> None:
    from huggingface_hub.utils import validate_repo_id

    assert hub.is_hub_id(name)
    validate_repo_id(name)


# --- errors that are hard to cause


def test_a_full_disk_is_a_storage_error() -> None:
    error = hub.explain(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "a/b", None)
    assert type(error) is StorageError
    assert error.what == "no space left on the disk"
    by_xet = hub.explain(RuntimeError("Task error: No space left on device (os error 28)"), "a/b", None)
    assert str(by_xet) == str(error)


def test_a_file_of_the_wrong_size() -> None:
    error = hub.explain(OSError("file should be of size 9 but has size 8.\nRetry with force_download."), "a/b", None)
    assert type(error) is HubError
    assert str(error) == "a/b: the download failed: file should be of size 9 but has size 8.; run again"


def test_a_bug_stays_a_bug() -> None:
    with pytest.raises(KeyError):
        hub.explain(KeyError("bug"), "a/b", None)


# --- facts


def test_revision_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / OLD
    snapshot.mkdir(parents=True)
    assert hub.revision_of(snapshot) == OLD
    monkeypatch.chdir(snapshot)
    assert hub.revision_of(Path()) == OLD
    assert hub.revision_of(tmp_path) is None
    assert hub.revision_of(tmp_path / OLD) is None
    assert hub.revision_of(snapshot.parent / "main") is None


def state(home: Path, url: str, **more: str) -> dict[str, Any]:
    script = "import json; from mlxtune import hub; print(json.dumps(hub.state()))"
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**kept, **more, "HF_HOME": str(home), "HF_ENDPOINT": url},
        capture_output=True,
        text=True,
        check=True,
    )
    value: dict[str, Any] = json.loads(done.stdout)
    return value


def test_state_of_an_empty_cache(tmp_path: Path) -> None:
    assert state(tmp_path / "none", "http://user:secret@hub.example:80/mirror/", HF_HUB_OFFLINE="1") == {
        "cache": str(tmp_path / "none/hub"),
        "cache_bytes": 0,
        "endpoint": "http://hub.example:80/mirror",
        "offline": True,
        "token": False,
    }
    assert list(tmp_path.iterdir()) == []


def test_state_tells_of_a_token_and_never_tells_it(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("hf_secret")
    assert state(tmp_path, "https://huggingface.co")["token"] is True
    by_variable = state(tmp_path / "none", "https://huggingface.co", HF_TOKEN="hf_secret")
    assert by_variable["token"] is True
    assert "secret" not in json.dumps(by_variable)
    assert state(tmp_path / "none", "https://huggingface.co", HF_TOKEN=" ")["token"] is False


def test_counting_gives_up_in_time(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"1234")
    assert hub._bytes_below(tmp_path, seconds=10) == 4
    assert hub._bytes_below(tmp_path, seconds=-1) is None
