"""The model hub and its cache: a model's name -> a local folder. Knows files, not what they mean to a model.

Only weights without code in them, and what a tokenizer needs, are ever downloaded: no Python, no pickles, no GGUF.
"""

import contextlib
import errno
import logging
import os
import re
import stat
import threading
import time
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mlxtune.errors import HubError, InputError, MlxtuneError, ModelError
from mlxtune.rundir import storage_error

# Names in the root of a repository; folders such as original/ or onnx/ hold copies of the same model.
NEEDED_FILES = (
    "config.json", "generation_config.json", "adapter_config.json", "*.safetensors", "*.safetensors.index.json",
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "chat_template.json", "*.jinja",
    "README.md", "LICENSE*", "LICENCE*", "COPYING",
)  # fmt: skip
UNNEEDED_FILES = ("*/*", "consolidated*.safetensors")  # the second: Mistral's own layout of the same weights


def ignore(done_bytes: int, total_bytes: int) -> None:
    """Progress that nobody watches."""


def fetch(name: str, revision: str | None = None, on_progress: Callable[[int, int], None] = ignore) -> Path:
    """The local folder of a model: `tiny` (the embedded one), a folder, or a hub id `owner/name`.

    A hub id is downloaded into the shared Hugging Face cache, at `revision` (a branch, tag or commit) or the newest
    one. Files that the cache holds are not downloaded again, and a broken transfer goes on where it broke. Without a
    network the cache alone answers. `on_progress(done_bytes, total_bytes)` is called from the downloading threads, one
    at a time.

    Raises ModelError if there is no such folder or repository of a usable kind, InputError for a revision of a folder,
    HubError or StorageError if the hub or the disk fails.
    """
    path = Path(name).expanduser()
    if (name and path.is_dir()) or name == "tiny":
        if revision is not None:
            raise InputError(
                f"revision {revision!r} is given for a local folder", where=name, hint="revisions belong to hub ids"
            )
        return path if path.is_dir() else Path(str(resources.files("mlxtune") / "assets" / "tiny"))
    if path.is_file():
        raise ModelError("is a file, not a model folder", where=name, hint="give the folder that it lies in")
    if not is_hub_id(name):
        raise ModelError("no such folder", where=name, hint="give a model folder, a hub id `owner/name`, or `tiny`")
    folder = _download(name, revision, on_progress)
    if not any(folder.glob("*.safetensors")):
        raise ModelError(
            "has no .safetensors weights on the hub",
            where=name,
            hint="choose a repository that has them: mlxtune downloads neither pickles nor GGUF",
        )
    return folder


def is_hub_id(name: str) -> bool:
    """Whether `name` has the form `owner/name`."""
    part = r"[A-Za-z0-9_]([\w.-]*\w)?"
    return (
        re.fullmatch(f"{part}/{part}", name, re.ASCII) is not None
        and not ("--" in name or ".." in name or name.endswith(".git"))
        and max(map(len, name.split("/"))) <= 96
    )


def _download(name: str, revision: str | None, on_progress: Callable[[int, int], None]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HTTPError

    try:
        with _quiet():
            return Path(
                snapshot_download(
                    name,
                    revision=revision,
                    allow_patterns=list(NEEDED_FILES),
                    ignore_patterns=list(UNNEEDED_FILES),
                    tqdm_class=_progress_class(on_progress),
                )
            )
    # ValueError: the answer is no JSON, as from the login page of a hotel's network; RuntimeError: all that hf_xet,
    # which moves the large files, has to say
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        raise explain(error, name, revision) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps huggingface_hub from writing to the terminal, and from telling the hub more than what it asks for."""
    from huggingface_hub import constants
    from huggingface_hub.utils import logging as hub_logging

    # the variable is for hf_xet; huggingface_hub reads it on import, which may lie long behind
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    constants.HF_HUB_DISABLE_TELEMETRY = True
    verbosity = hub_logging.get_verbosity()
    hub_logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        hub_logging.set_verbosity(verbosity)


def _progress_class(on_progress: Callable[[int, int], None]) -> type:
    """A class like tqdm that draws nothing and hands the bytes of the whole download to `on_progress`."""
    from huggingface_hub.utils import tqdm

    lock = threading.Lock()

    class Progress(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, name: str | None = None, **settings: Any):
            # there are bars of several things; this name marks the bytes that reached the disk
            self.reports = name == "huggingface_hub.snapshot_download"
            super().__init__(*args, name=name, **{**settings, "disable": True})

        def update(self, n: float | None = 1) -> None:
            if self.reports:
                with lock:
                    self.n += n or 0
                    on_progress(int(self.n), max(int(self.total or 0), int(self.n)))

    return Progress


def explain(error: Exception, name: str, revision: str | None) -> MlxtuneError:
    """The deliberate error for what huggingface_hub raised while it fetched `name`."""
    from huggingface_hub import constants, errors

    endpoint = _endpoint()
    match error:
        case errors.GatedRepoError():
            return HubError(
                "is gated, and this account has no access to it",
                where=name,
                hint=f"accept its licence on {endpoint}/{name}, then run `hf auth login`",
            )
        case errors.DisabledRepoError():
            return HubError("has been disabled on the hub", where=name, hint="choose another model")
        case errors.RevisionNotFoundError():
            return HubError(
                f"has no revision {revision!r} on the hub",
                where=name,
                hint="give a branch, a tag or a full commit, or leave it out",
            )
        case errors.RepositoryNotFoundError():
            return HubError(
                "there is no such folder here and no such model on the hub, or it is private",
                where=name,
                hint="check the spelling; for a private model run `hf auth login`",
            )
        case errors.LocalEntryNotFoundError() if constants.HF_HUB_OFFLINE:
            partly = isinstance(error, errors.IncompleteSnapshotError)
            which = f"revision {revision!r} " if revision else ""
            return HubError(
                f"{which}is {'only partly' if partly else 'not'} in the cache, and HF_HUB_OFFLINE is set",
                where=name,
                hint="unset HF_HUB_OFFLINE to download it",
            )
        # it says only that the cache cannot stand in for the hub; its cause says what happened to the hub
        case errors.LocalEntryNotFoundError() if isinstance(error.__cause__, Exception):
            return explain(error.__cause__, name, revision)
        case errors.HfHubHTTPError():
            return _explain_status(error.response.status_code, name)
        case errors.FileMetadataError() | ValueError():
            return HubError(
                f"{endpoint} does not answer like a model hub",
                where=name,
                hint="check HF_ENDPOINT, and whether this network wants you to log in first",
            )
        case errors.HTTPError():
            return HubError(
                f"the hub at {endpoint} cannot be reached, or the connection broke",
                where=name,
                hint="check the network and run again; files that are whole are kept",
            )
        case RuntimeError() if f"(os error {errno.ENOSPC})" in str(error):
            return storage_error(OSError(errno.ENOSPC, str(error)), Path(constants.HF_HUB_CACHE))
        case OSError() if error.errno is not None:
            return storage_error(error, Path(constants.HF_HUB_CACHE))
        case OSError() | RuntimeError():  # such as a file of the wrong size
            return HubError(f"the download failed: {str(error).splitlines()[0]}", where=name, hint="run again")
    raise error


def _explain_status(status: int, name: str) -> HubError:
    """The error for an HTTP status that says nothing about the repository itself."""
    if status in (401, 403):
        return HubError(
            "the hub refuses your token", where=name, hint="run `hf auth login` again, or unset HF_TOKEN if it is set"
        )
    if status == 429:
        return HubError(
            "the hub has had too many requests from here", where=name, hint="wait some minutes, or run `hf auth login`"
        )
    return HubError(f"the hub at {_endpoint()} answers with HTTP status {status}", where=name, hint="try again later")


def revision_of(path: Path) -> str | None:
    """The commit of a folder in the hub's cache (`.../snapshots/<commit>`); None for any other folder."""
    folder = path.absolute()
    is_commit = re.fullmatch(r"[0-9a-f]{40}", folder.name) is not None
    return folder.name if is_commit and folder.parent.name == "snapshots" else None


def state() -> dict[str, Any]:
    """How the hub is set up here, without asking it: `cache` (folder), `cache_bytes` (None if counting takes over half
    a second), `endpoint`, `offline`, and whether there is a `token` (never the token).
    """
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    return {
        "cache": str(cache),
        "cache_bytes": _bytes_below(cache, seconds=0.5),
        "endpoint": _endpoint(),
        "offline": bool(constants.HF_HUB_OFFLINE),
        "token": bool(os.environ.get("HF_TOKEN", "").strip()) or _holds_token(Path(constants.HF_TOKEN_PATH)),
    }


def _holds_token(file: Path) -> bool:
    try:
        return file.stat().st_size > 0
    except OSError:
        return False


def _bytes_below(folder: Path, seconds: float) -> int | None:
    """Bytes of the files below a folder, each counted once; None if it takes longer than `seconds`."""
    total, ends = 0, time.monotonic() + seconds
    for root, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                found = os.lstat(Path(root, name))
                # the cache's snapshots are links into its blobs
                total += found.st_size if stat.S_ISREG(found.st_mode) else 0
        if time.monotonic() > ends:
            return None
    return total


def _endpoint() -> str:
    """The hub's address without a user's name and password."""
    from huggingface_hub import constants

    address = str(constants.ENDPOINT)
    parts = urlsplit(address)
    return parts._replace(netloc=parts.netloc.rsplit("@", 1)[-1]).geturl()
