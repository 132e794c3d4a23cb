"""The other side of `faults.py`: starts it with the shim of `faults.c`, sends it what to do, and reads how it ended."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

DEAD = -9


@dataclass(frozen=True)
class Outcome:
    """How a case ended: exit code, what it printed, and its operations as (number, name, path, new path or "")."""

    code: int
    output: str
    operations: list[tuple[int, str, str, str]]


class Forks:
    """The process under test, waiting for requests."""

    def __init__(self, shim: Path, scratch: Path):
        self.log, self.output = scratch / "operations", scratch / "output"
        self.process = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("faults.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "LD_PRELOAD": str(shim)},
        )

    def run(
        self, task: str, folder: Path, args: list[Any], at: int = 0, fate: str = "k", watch: bool = True
    ) -> Outcome:
        """Does `task`; its operation `at` meets its fate, or none where that is 0. `watch`: count the operations."""
        self.log.unlink(missing_ok=True)
        request = {
            "task": task,
            "folder": str(folder),
            "args": args,
            "at": at,
            "fate": "k" if fate == "p" else fate,
            "log": str(self.log) if watch else None,
            "output": str(self.output),
        }
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        code = int(self.process.stdout.readline())
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        fields = [[*line.split("\t"), ""][:4] for line in lines]
        operations = [(int(number), name, path, new) for number, name, path, new in fields]
        return Outcome(code, self.output.read_text(), operations)

    def stop(self) -> None:
        with self.process:
            assert self.process.stdin is not None
            self.process.stdin.close()


def started(scratch: Path) -> Iterator[Forks]:
    """The process while a fixture lasts; `scratch` is for what it needs itself."""
    compiler = shutil.which("cc")
    if sys.platform != "linux" or compiler is None:
        pytest.skip("preloading a shim needs Linux and a C compiler")
    source = Path(__file__).with_name("faults.c")
    shim = scratch / "faults.so"
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", shim, source, "-ldl", "-lpthread"], check=True)
    running = Forks(shim, scratch)
    yield running
    running.stop()


def in_memory() -> Iterator[Path]:
    """A folder in memory, where there is such a thing: thousands of files are synced in it."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        yield Path(folder).resolve()
