"""Facts of this machine, decisions from given facts, and OpenBLAS in front of the reference BLAS."""

import ctypes
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlxtune import machine
from mlxtune.machine import ComputePolicy, MemoryLimits

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


def test_the_thrifty_have_matrices_made_float32_when_used_on_a_cpu_only() -> None:
    facts = {"memory_bytes": 16 * GB, "float32_bytes": 2 * GB, "blas": machine.REFERENCE_BLAS}
    assert machine.compute_policy(device="cpu", thrifty=True, **facts) == ComputePolicy(
        float32=False, expand=False, spread=False, compile=False, pad_multiple=1, unfold=True
    )
    for device in ("metal", "cuda"):
        assert machine.compute_policy(device=device, thrifty=True, **facts) == machine.compute_policy(
            device=device, **facts
        )


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


@pytest.mark.parametrize(
    ("limits", "left"),
    [
        ([], 16 * GB),
        (["max\n"], 16 * GB),
        (["4000000000\n"], 4 * GB),
        (["9223372036854771712\n", "5000000000"], 5 * GB),
        (["0"], 16 * GB),
    ],
)
def test_a_container_limits_the_memory(limits: list[str], left: int) -> None:
    assert machine.least_memory(16 * GB, limits) == left


@pytest.mark.parametrize(
    ("device", "memory_bytes", "device_memory_bytes", "usable"),
    [
        ("cpu", 16 * GB, 16 * GB, 14_400_000_000),
        ("cpu", 4 * GB, 4 * GB, 3 * GB),
        ("cpu", GB // 2, GB // 2, 0),
        ("metal", 16 * GB, 11 * GB, 11 * GB),
        ("cuda", 128 * GB, 80 * GB, 76 * GB),
    ],
)
def test_what_may_be_held_at_once(device: str, memory_bytes: int, device_memory_bytes: int, usable: int) -> None:
    assert usable == machine.usable_bytes(
        device=device, memory_bytes=memory_bytes, device_memory_bytes=device_memory_bytes
    )


def test_limits_on_metal_follow_from_the_working_set() -> None:
    limits = MemoryLimits(wired=12 * GB, memory=12 * GB, cache=3 * GB)
    assert machine.memory_limits(device="metal", working_set_bytes=12 * GB) == limits
    assert machine.memory_limits(device="metal", working_set_bytes=0) is None  # a system that recommends none
    assert machine.memory_limits(device="cpu", working_set_bytes=12 * GB) is None
    assert machine.memory_limits(device="cuda", working_set_bytes=12 * GB) is None


@pytest.mark.parametrize(
    ("device", "info", "set_to"),
    [
        ("metal", {"max_recommended_working_set_size": 8 * GB, "memory_size": 16 * GB}, [8 * GB, 8 * GB, 2 * GB]),
        ("cuda", {"total_memory": 80 * GB}, []),
        ("cpu", {}, []),
    ],
)
def test_configure_sets_the_limits_on_metal_only(
    monkeypatch: pytest.MonkeyPatch, device: str, info: dict[str, int], set_to: list[int]
) -> None:
    calls: list[int] = []
    monkeypatch.setattr(machine, "device_kind", lambda: device)
    monkeypatch.setattr(mx, "device_info", lambda: info)
    for name in ("set_wired_limit", "set_memory_limit", "set_cache_limit"):
        monkeypatch.setattr(mx, name, calls.append)
    machine.configure()
    assert calls == set_to


def test_the_facts_of_this_machine() -> None:
    found = machine.facts()
    assert found.device == machine.device_kind()
    assert found.system == f"{platform.system()} {platform.release()}"
    assert found.cores == machine.usable_cores()
    assert 0 < found.memory_bytes <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
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


@pytest.mark.parametrize(
    ("device", "before", "after", "pays"),
    [("cpu", 100, 80, True), ("cpu", 100, 81, False), ("metal", 100, 75, True), ("cuda", 100, 76, False)],
)
def test_where_packing_pays(device: str, before: int, after: int, pays: bool) -> None:
    assert machine.packing_pays(device, before, after) == pays


@pytest.mark.parametrize(
    ("prefix", "rest", "lines", "pays"),
    [(96, 32, 4, True), (96, 32, 2, True), (96, 32, 1, False), (63, 1, 4, False), (64, 400, 4, False)],
)
def test_where_sharing_the_beginning_pays(prefix: int, rest: int, lines: int, pays: bool) -> None:
    assert machine.sharing_pays(prefix, rest, lines) == pays


def test_places_are_padded_where_each_number_is_compiled() -> None:
    assert [machine.padded_count(count, 100, "cpu") for count in (0, 1, 5, 100)] == [1, 1, 5, 100]
    assert [machine.padded_count(count, 100, "metal") for count in (0, 1, 5, 64, 65)] == [1, 1, 8, 64, 100]


@pytest.mark.parametrize(
    ("device", "blocks", "tokens"), [("cpu", (64, 0), 320), ("metal", (512, 1024), None), ("cuda", (None, 0), None)]
)
def test_how_training_attends_and_how_much_at_once(
    device: str, blocks: tuple[int | None, int], tokens: int | None
) -> None:
    assert machine.attention_blocks(device) == blocks
    assert machine.most_tokens(device) == tokens


@pytest.mark.parametrize("device", ["cpu", "metal"])
def test_powers_of_two(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "device_kind", lambda: device)
    exponents = np.array([-100.0, -20.5, -1.0, 0.0, 0.3], dtype=np.float32)
    found = np.array(machine.power_of_two(mx.array(exponents)), dtype=np.float64)
    np.testing.assert_allclose(found, 2.0 ** exponents.astype(np.float64), rtol=1e-5)
