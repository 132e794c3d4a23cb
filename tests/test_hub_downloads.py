"""Downloads, against a small hub on this machine: real HTTP, the real huggingface_hub, a fresh cache each time."""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

OLD, NEW = "1" * 40, "2" * 40  # the commits behind `v1` and `main`
# longer than the pieces of 10 MB that huggingface_hub writes, so that a broken transfer leaves something to resume
WEIGHTS = bytes(12_000_000)
# each with its own content: the cache keeps equal files once
KEPT = {
    name: name.encode()
    for name in (
        "config.json", "chat_template.jinja", "generation_config.json", "merges.txt", "model.safetensors",
        "model.safetensors.index.json", "special_tokens_map.json", "tokenizer.json", "tokenizer.model",
        "tokenizer_config.json", "vocab.json", "vocab.txt", "README.md", "LICENSE",
    )
}  # fmt: skip
LEFT = {
    name: name.encode()
    for name in (
        ".gitattributes", "consolidated.safetensors", "flax_model.msgpack", "model.ckpt", "model.gguf",
        "model.h5", "modeling_llama.py", "onnx/config.json", "original/consolidated.00.pth",
        "original/model.safetensors", "pytorch_model.bin", "pytorch_model.bin.index.json", "requirements.txt",
        "training_args.pt",
    )
}  # fmt: skip
SMALL = {name: name.encode() for name in ("config.json", "model.safetensors", "tokenizer.json")}


@dataclass
class Hub:
    """What the hub serves, and what it was asked for."""

    url: str = ""
    repositories: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)  # id -> commit -> files
    break_once: set[str] = field(default_factory=set)  # files whose first transfer breaks off near the end
    broken: dict[str, int] = field(default_factory=dict)  # files that answer with this status, after all the others
    xet: bool = False  # weights are kept in Xet storage, which has lost them
    asked: list[str] = field(default_factory=list)
    agents: set[str] = field(default_factory=set)

    def downloads(self) -> list[str]:
        return [line for line in self.asked if line.startswith("GET") and "/resolve/" in line]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def answer(self) -> None:
        path = urlsplit(self.path).path
        wanted = self.headers.get("Range", "")
        self.hub.asked.append(f"{self.command} {path} {wanted}".strip())
        self.hub.agents.add(self.headers.get("User-Agent", ""))
        if self.headers.get("Authorization") == "Bearer hf_expired":
            return self.refuse(401, None, "Invalid credentials in Authorization header")
        if path.startswith("/api/models/portal/"):
            return self.send(200, b"<html>Welcome to the hotel</html>", {"Content-Type": "text/html"})
        if path.startswith("/api/models/down/"):
            return self.refuse(503, None, "down")
        if path.startswith("/api/models/forbidden/"):
            return self.refuse(403, None, "not yours")
        if path.startswith("/api/models/busy/"):
            return self.refuse(429, None, "slow down")
        if path.startswith("/api/models/disabled/"):
            return self.refuse(403, None, "Access to this resource is disabled.")
        if listing := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(revision|tree|xet-read-token)/([^/]+)", path):
            return self.describe(*listing.groups())
        if file := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self.file(*file.groups(), wanted)
        return self.refuse(404, None, "no such page")

    do_HEAD = do_GET = do_POST = answer

    def describe(self, name: str, what: str, revision: str) -> None:
        commits = self.hub.repositories.get(name)
        if commits is None:
            return self.refuse(401, "RepoNotFound", "Repository not found")
        commit = {"main": NEW, "v1": OLD}.get(revision, revision)
        if commit not in commits:
            return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if what == "revision":
            return self.send_json({"id": name, "sha": commit, "siblings": []})
        if what == "xet-read-token":
            access = {"Cas-Url": self.hub.url, "Access-Token": "x", "Token-Expiration": str(int(time.time()) + 600)}
            return self.send(200, b"{}", {f"X-Xet-{key}": value for key, value in access.items()})
        return self.send_json([self.entry(path, content) for path, content in commits[commit].items()])

    def entry(self, path: str, content: bytes) -> dict[str, Any]:
        value = {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
        if self.hub.xet and path.endswith(".safetensors"):
            digest = hashlib.sha256(content).hexdigest()
            value |= {"xetHash": digest, "lfs": {"size": len(content), "oid": digest, "pointerSize": 100}}
        return value

    def file(self, name: str, commit: str, path: str, wanted: str) -> None:
        if name.startswith("gated/"):
            return self.refuse(403, "GatedRepo", f"Access to model {name} is restricted")
        if path in self.hub.broken and self.command == "GET":
            ends = time.monotonic() + 30
            while len(self.hub.downloads()) < len(self.hub.repositories[name][commit]) and time.monotonic() < ends:
                time.sleep(0.01)
            return self.refuse(self.hub.broken[path], None, "broken")
        content = self.hub.repositories[name][commit][path]
        headers = {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted else 0
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        breaks = self.command == "GET" and path in self.hub.break_once
        if breaks:
            self.hub.break_once.discard(path)
            self.close_connection = True
        return self.send(206 if start else 200, content[start:], headers, cut=1_000_000 if breaks else 0)

    def send_json(self, value: Any) -> None:
        self.send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def refuse(self, status: int, code: str | None, message: str) -> None:
        headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
        self.send(status, b"", headers)

    def send(self, status: int, content: bytes, headers: dict[str, str], cut: int = 0) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[: len(content) - cut])


@pytest.fixture
def served() -> Iterator[Hub]:
    state = Hub(repositories={"acme/small": {NEW: SMALL, OLD: {**SMALL, "config.json": b"old"}}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": state}))
    state.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield state
    server.shutdown()
    thread.join()
    server.server_close()


FETCH = """
import json, sys, resource
from mlxtune import hub
from mlxtune.errors import MlxtuneError
limit = json.loads(sys.argv[2])
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
for name, revision in json.loads(sys.argv[1]):
    seen = []
    try:
        path = hub.fetch(name, revision, lambda done, total: seen.append([done, total]))
        answer = {"path": str(path), "progress": seen, "revision": hub.revision_of(path)}
    except MlxtuneError as error:
        answer = {"error": str(error), "kind": type(error).__name__, "code": error.exit_code}
    print(json.dumps(answer))
"""


def environment(home: Path, url: str, **more: str) -> dict[str, str]:
    """The environment of a user whose hub is at `url` and whose cache lies below `home`."""
    others = ("HF_", "HUGGING", "TRANSFORMERS_", "HTTP", "ALL_PROXY")
    kept = {key: value for key, value in os.environ.items() if not key.upper().startswith(others)}
    return {**kept, "HF_HOME": str(home), "HF_ENDPOINT": url, "HF_HUB_DISABLE_XET": "1", **more}


def fetch(
    home: Path, url: str, *calls: tuple[str, str | None], limit: int | None = None, **more: str
) -> list[dict[str, Any]]:
    """What `hub.fetch` answers to each call in one new process. It must write nothing of its own to the terminal."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", FETCH, json.dumps(calls), json.dumps(limit)],
        env=environment(home, url, **more),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stderr == ""
    assert done.returncode == 0
    return [json.loads(line) for line in done.stdout.splitlines()]


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def partial_files(home: Path) -> list[str]:
    return [path.name for path in home.rglob("*.incomplete")]


# --- downloads


def test_only_the_needed_files_are_downloaded(served: Hub, tmp_path: Path) -> None:
    served.repositories["acme/llama"] = {NEW: {**KEPT, **LEFT}}
    (answer,) = fetch(tmp_path, served.url, ("acme/llama", None))
    folder = tmp_path / "hub/models--acme--llama/snapshots" / NEW
    assert answer["path"] == str(folder)
    assert answer["revision"] == NEW
    assert files_of(folder) == KEPT
    downloaded = sorted(line.rsplit("/", 1)[-1] for line in served.downloads())
    assert downloaded == sorted(KEPT)
    total = sum(map(len, KEPT.values()))
    assert answer["progress"][-1] == [total, total]
    assert [done for done, _ in answer["progress"]] == sorted(done for done, _ in answer["progress"])
    assert partial_files(tmp_path) == []


def test_the_hub_learns_nothing_but_the_request(served: Hub, tmp_path: Path) -> None:
    fetch(tmp_path, served.url, ("acme/small", None))
    assert {re.sub(r"/resolve/.*", "/resolve/...", line.split()[1]) for line in served.asked} == {
        "/api/models/acme/small/revision/main",
        f"/api/models/acme/small/tree/{NEW}",
        "/acme/small/resolve/...",
    }
    (agent,) = served.agents
    assert re.fullmatch(r"unknown/None; hf_hub/[\w.]+; python/[\w.]+", agent)


@pytest.mark.parametrize("revision", ["v1", OLD])
def test_a_revision_is_kept_to(served: Hub, tmp_path: Path, revision: str) -> None:
    old, main, newest = fetch(tmp_path, served.url, *(("acme/small", each) for each in (revision, "main", None)))
    assert Path(old["path"]).name == old["revision"] == OLD
    assert files_of(Path(old["path"])) == served.repositories["acme/small"][OLD]
    assert main["path"] == newest["path"] == str(tmp_path / "hub/models--acme--small/snapshots" / NEW)
    assert files_of(Path(main["path"])) == SMALL


def test_a_second_fetch_downloads_nothing(served: Hub, tmp_path: Path) -> None:
    first, second = fetch(tmp_path, served.url, ("acme/small", None), ("acme/small", None))
    assert first["path"] == second["path"]
    assert len(served.downloads()) == len(SMALL)


def test_a_broken_transfer_goes_on_where_it_broke(served: Hub, tmp_path: Path) -> None:
    weights = os.urandom(len(WEIGHTS))
    served.repositories["acme/large"] = {NEW: {**SMALL, "model.safetensors": weights}}
    served.break_once = {"model.safetensors"}
    (answer,) = fetch(tmp_path, served.url, ("acme/large", None))
    assert (Path(answer["path"]) / "model.safetensors").read_bytes() == weights
    first, second = [line for line in served.downloads() if "model.safetensors" in line]
    assert first == f"GET /acme/large/resolve/{NEW}/model.safetensors"
    start = int(second.removeprefix(f"{first} bytes=").removesuffix("-"))
    assert 10_000_000 <= start < len(weights)
    total = len(weights) + len(SMALL["config.json"]) + len(SMALL["tokenizer.json"])
    assert answer["progress"][-1] == [total, total]


def test_files_that_are_whole_survive_a_failed_fetch(served: Hub, tmp_path: Path) -> None:
    served.broken = {"model.safetensors": 500}
    (failed,) = fetch(tmp_path, served.url, ("acme/small", None))
    line = f"acme/small: the hub at {served.url} answers with HTTP status 500; try again later"
    assert failed == {"error": line, "kind": "HubError", "code": 3}
    assert partial_files(tmp_path) == []
    served.broken, served.asked = {}, []
    (answer,) = fetch(tmp_path, served.url, ("acme/small", None))
    assert files_of(Path(answer["path"])) == SMALL
    assert served.downloads() == [f"GET /acme/small/resolve/{NEW}/model.safetensors"]


def test_a_disk_that_takes_no_more(served: Hub, tmp_path: Path) -> None:
    served.repositories["acme/large"] = {NEW: {**SMALL, "model.safetensors": WEIGHTS}}
    (answer,) = fetch(tmp_path, served.url, ("acme/large", None), limit=1_000_000)
    assert answer == {"error": f"{tmp_path}/hub: cannot be written: File too large", "kind": "StorageError", "code": 3}
    assert partial_files(tmp_path) == []


def test_hf_xet_fails_in_one_line_and_reports_nothing(served: Hub, tmp_path: Path) -> None:
    pytest.importorskip("hf_xet", reason="needs hf_xet, which huggingface_hub brings on most platforms")
    served.xet = True
    (answer,) = fetch(tmp_path, served.url, ("acme/small", None), HF_HUB_DISABLE_XET="0")
    assert re.fullmatch(r"acme/small: the download failed: .*404 Not Found.*; run again", answer["error"])
    assert (answer["kind"], answer["code"]) == ("HubError", 3)
    assert any("/reconstructions/" in line for line in served.asked)
    assert [line for line in served.asked if line.startswith("POST") or "telemetry" in line] == []
    assert partial_files(tmp_path) == []


# --- what the hub refuses


def test_each_refusal_is_one_line(served: Hub, tmp_path: Path) -> None:
    served.repositories["gated/model"] = {NEW: SMALL}
    served.repositories["acme/gguf"] = {NEW: {"config.json": b"{}", "model-Q4.gguf": b"x", "pytorch_model.bin": b"x"}}
    expected = {
        ("acme/nothing", None): (
            "acme/nothing: there is no such folder here and no such model on the hub, or it is private; "
            "check the spelling; for a private model run `hf auth login`"
        ),
        ("gated/model", None): (
            "gated/model: is gated, and this account has no access to it; "
            f"accept its licence on {served.url}/gated/model, then run `hf auth login`"
        ),
        ("acme/small", "v9"): (
            "acme/small: has no revision 'v9' on the hub; give a branch, a tag or a full commit, or leave it out"
        ),
        ("acme/small", "9" * 40): (
            f"acme/small: has no revision '{'9' * 40}' on the hub; "
            "give a branch, a tag or a full commit, or leave it out"
        ),
        ("disabled/model", None): "disabled/model: has been disabled on the hub; choose another model",
        ("forbidden/model", None): (
            "forbidden/model: the hub refuses your token; run `hf auth login` again, or unset HF_TOKEN if it is set"
        ),
        ("busy/model", None): (
            "busy/model: the hub has had too many requests from here; wait some minutes, or run `hf auth login`"
        ),
        ("down/model", None): f"down/model: the hub at {served.url} answers with HTTP status 503; try again later",
        ("portal/model", None): (
            f"portal/model: {served.url} does not answer like a model hub; "
            "check HF_ENDPOINT, and whether this network wants you to log in first"
        ),
    }
    answers = fetch(tmp_path, served.url, *expected, ("acme/gguf", None))
    assert [answer["error"] for answer in answers[:-1]] == list(expected.values())
    assert {(answer["kind"], answer["code"]) for answer in answers[:-1]} == {("HubError", 3)}
    assert answers[-1] == {
        "error": (
            "acme/gguf: has no .safetensors weights on the hub; "
            "choose a repository that has them: mlxtune downloads neither pickles nor GGUF"
        ),
        "kind": "ModelError",
        "code": 2,
    }


def test_a_refused_token(served: Hub, tmp_path: Path) -> None:
    (answer,) = fetch(tmp_path, served.url, ("acme/small", None), HF_TOKEN="hf_expired")
    line = "acme/small: the hub refuses your token; run `hf auth login` again, or unset HF_TOKEN if it is set"
    assert answer == {"error": line, "kind": "HubError", "code": 3}


# --- no network


def test_no_network(served: Hub, tmp_path: Path) -> None:
    fetch(tmp_path, served.url, ("acme/small", "v1"))
    nowhere = "http://127.0.0.1:9"
    absent, cached, pinned = fetch(tmp_path, nowhere, ("acme/other", None), ("acme/small", "v1"), ("acme/small", OLD))
    assert absent == {
        "error": (
            f"acme/other: the hub at {nowhere} cannot be reached, or the connection broke; "
            "check the network and run again; files that are whole are kept"
        ),
        "kind": "HubError",
        "code": 3,
    }
    assert cached["path"] == pinned["path"] == str(tmp_path / "hub/models--acme--small/snapshots" / OLD)


def test_offline(served: Hub, tmp_path: Path) -> None:
    served.broken = {"model.safetensors": 500}
    fetch(tmp_path, served.url, ("acme/small", None))
    served.broken = {}
    fetch(tmp_path, served.url, ("acme/small", "v1"))
    served.asked = []
    cached, partly, absent, revision = fetch(
        tmp_path,
        served.url,
        ("acme/small", "v1"),
        ("acme/small", None),
        ("acme/other", None),
        ("acme/small", "v9"),
        HF_HUB_OFFLINE="1",
    )
    assert files_of(Path(cached["path"])) == served.repositories["acme/small"][OLD]
    hint = "unset HF_HUB_OFFLINE to download it"
    assert partly["error"] == f"acme/small: is only partly in the cache, and HF_HUB_OFFLINE is set; {hint}"
    assert absent["error"] == f"acme/other: is not in the cache, and HF_HUB_OFFLINE is set; {hint}"
    assert revision["error"] == f"acme/small: revision 'v9' is not in the cache, and HF_HUB_OFFLINE is set; {hint}"
    assert {answer["code"] for answer in (partly, absent, revision)} == {3}
    assert served.asked == []


def test_state_counts_each_blob_once(served: Hub, tmp_path: Path) -> None:
    fetch(tmp_path, served.url, ("acme/small", None))
    cache = tmp_path / "hub"
    links = [path for path in cache.rglob("*") if path.is_symlink()]
    assert len(links) == len(SMALL)
    counted = sum(path.stat().st_size for path in cache.rglob("*") if path.is_file() and not path.is_symlink())
    script = "from mlxtune import hub; print(hub.state()['cache_bytes'])"
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment(tmp_path, served.url), capture_output=True, text=True
    )
    assert done.stdout == f"{counted}\n"
