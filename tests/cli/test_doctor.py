"""`mlxtune doctor`: advice and overview of given facts, and the command on this machine."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mlxtune import __version__, machine
from mlxtune.cli import doctor

LAPTOP = doctor.Facts(
    system="Darwin 25.1.0",
    python="3.12.4",
    processor="arm",
    cores=10,
    device="metal",
    device_name="Apple M4",
    nvidia=False,
    mlx="0.32.4",
    mlx_lm="0.32.2",
    memory_bytes=17_179_869_184,
    working_set_bytes=12_713_115_648,
    open_files=256,
    blas="Accelerate",
    blas_choice="1",
    gflops=3012.4,
    compiler="/usr/bin/c++",
    disk_free_bytes=212_000_000_000,
    hub_cache="/Users/me/.cache/huggingface/hub",
    hub_cache_bytes=5_500_000_000,
    hub_cache_free_bytes=212_000_000_000,
    hub_cache_on_same_disk=True,
    hub_endpoint="https://huggingface.co",
    hub_offline=False,
    hub_token=True,
)
LINUX = dataclasses.replace(
    LAPTOP,
    system="Linux 6.8.0",
    device="cpu",
    device_name="x86_64",
    working_set_bytes=LAPTOP.memory_bytes,
    blas="OpenBLAS (libopenblas.so.0)",
    open_files=None,
    gflops=171.3,
    compiler=None,
    hub_cache_bytes=None,
    hub_offline=True,
    hub_token=False,
)
SLOW = "Training is several times slower without OpenBLAS: "


def test_nothing_to_improve() -> None:
    assert doctor.advice(LAPTOP) == []
    assert doctor.advice(dataclasses.replace(LINUX, hub_offline=False)) == []


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"blas": "reference BLAS"}, f"{SLOW}{machine.OPENBLAS_HINT}."),
        ({"blas": "reference BLAS", "blas_choice": "0"}, f"{SLOW}unset MLXTUNE_OPENBLAS, which is 0."),
        (
            {"blas": "reference BLAS", "blas_choice": "/opt/blas.so"},
            f"{SLOW}MLXTUNE_OPENBLAS names /opt/blas.so, which does not load; unset it to look for libopenblas.so.0.",
        ),
        (
            {"nvidia": True},
            "An NVIDIA GPU is not used: install MLX for it with `pip install 'mlxtune[cuda13]'`.",
        ),
        (
            {"working_set_bytes": 4_100_000_000},
            "4.1 GB of memory is little: choose models below 1B parameters, or quantize them.",
        ),
        (
            {"disk_free_bytes": 2_000_000_000, "hub_cache_free_bytes": 2_000_000_000},
            "2.0 GB of disk is free here and in the hub cache: a run can take several GB.",
        ),
        (
            {"disk_free_bytes": 2_000_000_000, "hub_cache_on_same_disk": False},
            "2.0 GB of disk is free here: a run can take several GB.",
        ),
        (
            {"hub_cache_free_bytes": 2_000_000_000, "hub_cache_on_same_disk": False},
            "2.0 GB of disk is free in the hub cache: set HF_HUB_CACHE to a folder on a larger disk.",
        ),
        ({"open_files": 128}, "Only 128 files may be open at once: raise the limit with `ulimit -n 1024`."),
        (
            {"hub_offline": True},
            "HF_HUB_OFFLINE is set: models that are not in the cache cannot be downloaded; unset it for that.",
        ),
    ],
)
def test_one_thing_to_improve(changes: dict[str, object], line: str) -> None:
    facts = dataclasses.replace(LINUX, hub_offline=False)
    assert doctor.advice(dataclasses.replace(facts, **changes)) == [line]  # type: ignore[arg-type]


def test_a_gpu_that_is_used_needs_no_blas() -> None:
    assert doctor.advice(dataclasses.replace(LAPTOP, device="cuda", nvidia=True, blas="reference BLAS")) == []


def test_the_worst_machine_gets_the_most_important_line_first() -> None:
    facts = dataclasses.replace(
        LINUX, nvidia=True, blas="reference BLAS", working_set_bytes=1, disk_free_bytes=1, open_files=8
    )
    assert [line.split()[0] for line in doctor.advice(facts)] == ["An", "Training", "1", "1", "Only", "HF_HUB_OFFLINE"]


def test_overview_of_a_laptop() -> None:
    assert doctor.describe(LAPTOP) == [
        ("system", "Darwin 25.1.0, Python 3.12.4"),
        ("device", "Apple GPU (Apple M4), 10 CPU cores"),
        ("memory", "17.2 GB, up to 12.7 GB for a model"),
        ("MLX", "0.32.4 on metal, mlx-lm 0.32.2"),
        ("matmul", "3,012 GFLOP/s in float32"),
        ("C++ compiler", "/usr/bin/c++"),
        ("open files", "256 at once"),
        ("disk here", "212.0 GB free"),
        ("hub cache", "/Users/me/.cache/huggingface/hub: 5.5 GB used, 212.0 GB free"),
        ("hub", "https://huggingface.co, online, with a token"),
    ]


def test_overview_of_a_linux_machine() -> None:
    shown = dict(doctor.describe(LINUX))
    assert shown["device"] == "CPU (x86_64), 10 CPU cores"
    assert shown["matmul"] == "171 GFLOP/s in float32, OpenBLAS (libopenblas.so.0)"
    assert shown["C++ compiler"] == "none (not needed)"
    assert shown["open files"] == "no limit"
    assert shown["hub cache"] == "/Users/me/.cache/huggingface/hub: 212.0 GB free"
    assert shown["hub"] == "https://huggingface.co, offline, no token (public models need none)"


def run(home: Path, *arguments: str, **variables: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "mlxtune", "doctor", *arguments],
        env={**os.environ, "HF_HOME": str(home), "HF_TOKEN": "hf_secret", **variables},
        cwd=home,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "secret" not in done.stdout
    return done.stdout


def test_json(tmp_path: Path) -> None:
    value = json.loads(run(tmp_path, "--json"))
    names = [field.name for field in dataclasses.fields(doctor.Facts)]
    assert list(value) == ["mlxtune", *names, "advice"]
    assert value["mlxtune"] == __version__
    facts = doctor.Facts(**{name: value[name] for name in names})
    assert value["advice"] == doctor.advice(facts)
    assert facts.memory_bytes == machine.memory_bytes()
    assert facts.gflops > 0
    assert (facts.hub_cache, facts.hub_cache_bytes) == (str(tmp_path / "hub"), 0)
    assert facts.hub_token
    assert facts.hub_cache_on_same_disk
    assert list(tmp_path.iterdir()) == []


def test_text_is_two_columns_and_a_last_line(tmp_path: Path) -> None:
    lines = run(tmp_path, HF_HUB_OFFLINE="1", MLXTUNE_OPENBLAS="1").splitlines()
    assert lines[:2] == [f"mlxtune {__version__}", ""]
    end = lines.index("", 2)
    names = [name for name, _ in doctor.describe(LAPTOP)]
    assert [line[2:16].rstrip() for line in lines[2:end]] == names
    assert all(line.startswith("  ") and line[16] != " " and line[15] == " " for line in lines[2:end])
    things = len(lines) - end - 2
    assert lines[end + 1] == ("1 thing to improve:" if things == 1 else f"{things} things to improve:")
    assert lines[-1].startswith("  HF_HUB_OFFLINE is set: ")


def test_mlx_that_does_not_load_is_one_line(tmp_path: Path) -> None:
    # as with MLX's wheel for Linux without one of its backends
    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx" / "core.py").write_text("raise ImportError('libmlx.so: cannot open shared object file')")
    done = subprocess.run(
        [sys.executable, "-m", "mlxtune", "doctor"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    extra = "[cpu]" if sys.platform == "linux" else ""
    assert done.stderr == (
        f"error: MLX does not load: libmlx.so: cannot open shared object file; run `pip install 'mlx{extra}'`\n"
    )
