"""The machine's facts (device, memory, BLAS) and the decisions that follow from them.

The only place with device-specific code. Decisions are pure functions of given facts, so they can be tested anywhere.
`prepare` must run before `mlx.core` is imported; importing this module imports no mlx.
"""

import contextlib
import ctypes
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

OPENBLAS_NAMES = ("libopenblas.so.0", "libopenblas.so")
REFERENCE_BLAS = "reference BLAS"
OPENBLAS_HINT = "install one with `apt-get install libopenblas0` (Debian, Ubuntu) or `dnf install openblas` (Fedora)"


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What was found. Memory in bytes; `device` is `metal`, `cuda` or `cpu`."""

    system: str
    processor: str
    cores: int
    memory_bytes: int
    device: str
    device_name: str
    device_memory_bytes: int
    mlx_version: str
    blas: str
    compiler: str | None


@dataclass(frozen=True, kw_only=True)
class ComputePolicy:
    """How to compute on a machine.

    float32: weights are held in float32 whatever they are stored in; expand: a quantized base is expanded as well;
    spread: matrices are held with a gap behind each row (see `precision.spread`); compile: graphs go through
    `mx.compile`; pad_multiple: row lengths are padded to a multiple of it.
    """

    float32: bool
    expand: bool
    spread: bool
    compile: bool
    pad_multiple: int


def prepare() -> None:
    """Puts an installed OpenBLAS in front of the reference BLAS that MLX's Linux CPU wheels link.

    The dynamic linker takes the first definition it finds, so this works only before `mlx.core` is loaded.
    float32 matmul then runs 25 times faster. MLXTUNE_OPENBLAS=0 leaves it out; a path names another library.
    """
    wanted = os.environ.get("MLXTUNE_OPENBLAS", "1")
    if sys.platform != "linux" or wanted == "0" or "mlx.core" in sys.modules:
        return
    for name in OPENBLAS_NAMES if wanted == "1" else (wanted,):
        try:
            ctypes.CDLL(name, ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        return


def blas_name() -> str:
    """The BLAS that float32 matmul on the CPU goes through."""
    if sys.platform == "darwin":
        return "Accelerate"
    loaded = Path("/proc/self/maps")
    names = {line.rsplit("/", 1)[-1].strip() for line in loaded.read_text().splitlines()} if loaded.exists() else set()
    for name in sorted(names):
        # numpy carries an OpenBLAS of its own under other symbol names; MLX never calls that one
        if name.startswith("libopenblas"):
            return f"OpenBLAS ({name})"
    return REFERENCE_BLAS


def facts() -> Machine:
    """The facts of this machine. Imports mlx."""
    import mlx.core as mx

    device = device_kind()
    info = mx.device_info() if device != "cpu" else {}
    memory = memory_bytes()
    return Machine(
        system=f"{platform.system()} {platform.release()}",
        processor=platform.processor() or platform.machine(),
        cores=usable_cores(),
        memory_bytes=memory,
        device=device,
        device_name=str(info.get("device_name", platform.machine())),
        device_memory_bytes=int(info.get("max_recommended_working_set_size", info.get("memory_size", memory))),
        mlx_version=metadata.version("mlx"),
        blas=blas_name(),
        compiler=shutil.which("c++") or shutil.which("g++") or shutil.which("clang++"),
    )


def device_kind() -> str:
    """`metal`, `cuda` or `cpu`: where MLX computes by default."""
    import mlx.core as mx

    if mx.default_device() == mx.Device(mx.cpu):
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"


def usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def worker_rank(environ: Mapping[str, str]) -> int | None:
    """The number of this process among the workers of a run, or None where it works alone."""
    ranks = (environ.get(name) for name in ("MLX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK"))
    return next((int(rank) for rank in ranks if rank), None)


def workers_on_this_host(environ: Mapping[str, str]) -> int:
    """How many workers share this host's cores, as far as the file tells that `mlx.launch` gives each of them."""
    rank, hosts = worker_rank(environ), environ.get("MLX_HOSTFILE")
    if rank is None or hosts is None:
        return 1
    try:
        addresses = [each[0].rsplit(":", 1)[0] for each in json.loads(Path(hosts).read_text())]
        return addresses.count(addresses[rank])
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return 1


def own_cores() -> int:
    """This process's share of the cores."""
    return max(1, usable_cores() // workers_on_this_host(os.environ))


def memory_bytes() -> int:
    """Memory of the machine in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def compute_policy(*, device: str, memory_bytes: int, float32_bytes: int, blas: str) -> ComputePolicy:
    """The policy for a model whose weights take `float32_bytes` when held in float32.

    On a CPU only float32 matmul goes through BLAS, so everything is computed in float32 and a quantized base is
    expanded when that takes at most 60 % of the memory. On Metal and CUDA the stored precision is kept. `mx.compile`
    calls a C++ compiler for each graph on a CPU and gained nothing there in any measurement.
    """
    if device == "cpu":
        fits = float32_bytes <= 0.6 * memory_bytes
        return ComputePolicy(
            float32=fits, expand=fits, spread=fits and blas == REFERENCE_BLAS, compile=False, pad_multiple=1
        )
    return ComputePolicy(float32=False, expand=False, spread=False, compile=True, pad_multiple=32)


def policy_here(parameters: int) -> ComputePolicy:
    """The policy of this machine for a model of so many parameters."""
    return compute_policy(
        device=device_kind(), memory_bytes=memory_bytes(), float32_bytes=4 * parameters, blas=blas_name()
    )


def batch_parts(device: str, cores: int) -> int:
    """Parts of a batch that are computed at once: on a CPU, MLX gives each operation one core."""
    return cores if device == "cpu" else 1


@contextlib.contextmanager
def blas_threads(count: int) -> Iterator[None]:
    """Lets OpenBLAS use `count` threads for each product inside the block; does nothing for another BLAS."""
    try:
        blas = ctypes.CDLL(None)
        get, use = blas.openblas_get_num_threads, blas.openblas_set_num_threads
    except (AttributeError, OSError):
        yield
        return
    before = get()
    use(count)
    try:
        yield
    finally:
        use(before)


def configure(save_memory: bool = False) -> None:
    """Sets what holds for the whole process on a CPU: no `mx.compile`, where each new graph costs a compiler run.

    And MLX walks a graph breadth first, unless that is to `save_memory`: in its usual order it hands out the operations
    of one stream before those of the next, so that the parts of a batch wait for each other; but gradient
    checkpointing saves less breadth first. MLX asks for the width once, so the first call in a process decides.
    """
    import mlx.core as mx

    if device_kind() == "cpu":
        mx.disable_compile()
        os.environ.setdefault("MLX_BFS_MAX_WIDTH", "20" if save_memory else "100000")


def measure_matmul_gflops(size: int = 1024, seconds: float = 0.3) -> float:
    """float32 matmul speed of the default device in GFLOP/s: the best of the repeats that fit in `seconds`."""
    import mlx.core as mx

    a = mx.random.normal((size, size), key=mx.random.key(0))
    b = mx.random.normal((size, size), key=mx.random.key(1))
    mx.eval(a, b, a @ b)
    best, started = float("inf"), time.perf_counter()
    while time.perf_counter() - started < seconds or best == float("inf"):
        begin = time.perf_counter()
        mx.eval(a @ b)
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best / 1e9
