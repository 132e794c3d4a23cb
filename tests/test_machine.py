"""Facts of this machine, decisions from given facts, and OpenBLAS in front of the reference BLAS."""

import ctypes
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import mlx.core as mx
import pytest

from mlxtune import machine
from mlxtune.machine import ComputePolicy

GB = 10**9


@pytest.mark.parametrize(
    ("memory_bytes", "float32_bytes", "fits"),
    [
        (16 * GB, 2 * GB, True),
        (1000, 600, True),
        (1000, 601, False),
        (8 * GB, 28 * GB, False),
    ],
)
@pytest.mark.parametrize("blas", ["OpenBLAS (libopenblas.so.0)", machine.REFERENCE_BLAS])
def test_a_cpu_computes_in_float32_if_it_fits(memory_bytes: int, float32_bytes: int, fits: bool, blas: str) -> None:
    policy = machine.compute_policy(device="cpu", memory_bytes=memory_bytes, float32_bytes=float32_bytes, blas=blas)
    spread = fits and blas == machine.REFERENCE_BLAS
    assert policy == ComputePolicy(float32=fits, expand=fits, spread=spread, compile=False, pad_multiple=1)


@pytest.mark.parametrize("device", ["metal", "cuda"])
@pytest.mark.parametrize("memory_bytes", [8 * GB, 512 * GB])
def test_a_gpu_keeps_the_stored_precision(device: str, memory_bytes: int) -> None:
    policy = machine.compute_policy(
        device=device, memory_bytes=memory_bytes, float32_bytes=2 * GB, blas=machine.REFERENCE_BLAS
    )
    assert policy == ComputePolicy(float32=False, expand=False, spread=False, compile=True, pad_multiple=32)


@pytest.mark.parametrize(
    ("device", "cores", "parts"), [("cpu", 1, 1), ("cpu", 10, 10), ("metal", 10, 1), ("cuda", 64, 1)]
)
def test_a_batch_is_split_over_the_cores_of_a_cpu(device: str, cores: int, parts: int) -> None:
    assert machine.batch_parts(device, cores) == parts


def test_the_facts_of_this_machine() -> None:
    found = machine.facts()
    assert found.device == machine.device_kind()
    assert found.system == f"{platform.system()} {platform.release()}"
    assert found.cores == machine.usable_cores()
    assert found.memory_bytes == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert found.device_memory_bytes > 0
    assert found.mlx_version == metadata.version("mlx")
    assert found.blas == machine.blas_name()
    assert found.compiler is None or os.access(found.compiler, os.X_OK)
    assert found.device_name
    assert found.processor


def test_the_default_device_decides() -> None:
    before = mx.default_device()
    mx.set_default_device(mx.Device(mx.cpu))
    try:
        assert machine.device_kind() == "cpu"
        assert machine.facts().device_memory_bytes == machine.memory_bytes()
    finally:
        mx.set_default_device(before)


def test_matmul_speed_is_operations_over_the_best_time(monkeypatch: pytest.MonkeyPatch) -> None:
    # started, then (loop's check, begin, end) twice: 4 s and 2 s, and the check that ends it
    clock = iter([0.0, 0.1, 1.0, 5.0, 5.0, 6.0, 8.0, 20.0])
    monkeypatch.setattr(machine.time, "perf_counter", lambda: next(clock))
    # 64 x 64 x 64 multiplications and additions in 2 s
    assert machine.measure_matmul_gflops(size=64, seconds=10) == pytest.approx(2 * 262_144 / 2 / 1e9)
    assert list(clock) == []


def test_matmul_is_measured_at_least_once() -> None:
    assert machine.measure_matmul_gflops(size=64, seconds=0) > 0


def run(script: str, **variables: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, **variables}, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


def test_importing_has_no_effects() -> None:
    script = "import sys; from mlxtune import machine; print('mlx' in sys.modules, machine.blas_name())"
    (line,) = run(script)
    expected = "Accelerate" if sys.platform == "darwin" else "reference BLAS"
    assert line == f"False {expected}"


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs a system that can bind a process to a core")
def test_only_usable_cores_count() -> None:
    script = (
        "import os; from mlxtune import machine; "
        "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); print(machine.usable_cores())"
    )
    assert run(script) == ["1"]


# --- OpenBLAS

PREPARE = """
import ctypes, sys
from mlxtune import machine
machine.prepare()
print(machine.blas_name())
import mlx.core
import numpy
try:
    address = ctypes.cast(ctypes.CDLL(None).cblas_sgemm, ctypes.c_void_p).value
except AttributeError:
    address = 0
for line in open("/proc/self/maps"):
    low, high = (int(end, 16) for end in line.split()[0].split("-"))
    if low <= address < high:
        print(line.split("/")[-1].strip())
"""


def openblas() -> str | None:
    """The name under which this system finds an OpenBLAS."""
    for name in machine.OPENBLAS_NAMES if sys.platform == "linux" else ():
        try:
            ctypes.CDLL(name)
        except OSError:
            continue
        return name
    return None


needs_openblas = pytest.mark.skipif(openblas() is None, reason=f"needs OpenBLAS on Linux: {machine.OPENBLAS_HINT}")
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="MLX brings its own fast BLAS elsewhere")


@needs_openblas
def test_openblas_comes_first() -> None:
    name, library = run(PREPARE, MLXTUNE_OPENBLAS="1")
    assert name == f"OpenBLAS ({library})"
    assert library.startswith("libopenblas")


@needs_openblas
def test_openblas_by_name() -> None:
    name, library = run(PREPARE, MLXTUNE_OPENBLAS=str(openblas()))
    assert name == f"OpenBLAS ({library})"


@on_linux
@pytest.mark.parametrize("choice", ["0", "/nowhere/libopenblas.so"])
def test_openblas_left_out(choice: str) -> None:
    assert run(PREPARE, MLXTUNE_OPENBLAS=choice)[0] == "reference BLAS"


@on_linux
def test_numpys_own_openblas_is_not_mlxs() -> None:
    script = "import numpy; from mlxtune import machine; print(machine.blas_name())"
    assert run(script, MLXTUNE_OPENBLAS="0") == ["reference BLAS"]


@needs_openblas
def test_after_mlx_it_is_too_late() -> None:
    script = """
import mlx.core
from mlxtune import machine
before = machine.blas_name()
machine.prepare()
print(before == machine.blas_name())
"""
    assert run(script, MLXTUNE_OPENBLAS="1") == ["True"]


@needs_openblas
def test_the_threads_of_openblas_are_shared_out_and_given_back() -> None:
    script = """
import ctypes
from mlxtune import machine
machine.prepare()
threads = ctypes.CDLL(None).openblas_get_num_threads
ctypes.CDLL(None).openblas_set_num_threads(2)
try:
    with machine.blas_threads(1):
        print(threads())
        raise KeyError
except KeyError:
    print(threads())
"""
    assert run(script, MLXTUNE_OPENBLAS="1", OPENBLAS_NUM_THREADS="2") == ["1", "2"]


@on_linux
def test_another_blas_is_left_alone() -> None:
    script = "from mlxtune import machine\nwith machine.blas_threads(1): print('fine')"
    assert run(script) == ["fine"]


@pytest.mark.slow
@needs_openblas
def test_openblas_is_faster() -> None:
    script = """
from mlxtune import machine
machine.prepare()
import mlx.core
print(machine.measure_matmul_gflops(size=512, seconds=1))
"""
    (with_it,), (without,) = run(script, MLXTUNE_OPENBLAS="1"), run(script, MLXTUNE_OPENBLAS="0")
    assert float(with_it) > 3 * float(without)


def test_a_machine_without_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.facts().compiler is None
