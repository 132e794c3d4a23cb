"""The machine's facts (device, memory, BLAS) and the decisions that follow from them.

The only place with device-specific code. Decisions are pure functions of given facts, so they can be tested anywhere.
`prepare` must run before `mlx.core` is imported; importing this module imports no mlx.
"""

import contextlib
import ctypes
import json
import math
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import mlx.core as mx

OPENBLAS_NAMES = ("libopenblas.so.0", "libopenblas.so")
REFERENCE_BLAS = "reference BLAS"
CONTAINER_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
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
    spread: matrices are held with a gap behind each row (see `precision.spread`); unfold: they stay as stored, and are
    made float32 when used (see `precision.unfold`); compile: graphs go through `mx.compile`; pad_multiple: row lengths
    are padded to a multiple of it.
    """

    float32: bool
    expand: bool
    spread: bool
    compile: bool
    pad_multiple: int
    unfold: bool = False


@dataclass(frozen=True, kw_only=True)
class MemoryLimits:
    """What MLX may hold, in bytes: kept from being paged out; before it waits for work to end; freed, for use again."""

    wired: int
    memory: int
    cache: int


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
        device_memory_bytes=_device_memory_bytes(device, memory),
        mlx_version=metadata.version("mlx"),
        blas=blas_name(),
        compiler=shutil.which("c++") or shutil.which("g++") or shutil.which("clang++"),
    )


def _device_memory_bytes(device: str, memory: int) -> int:
    """What the device recommends to hold, or has; a CPU has the machine's."""
    import mlx.core as mx

    info = mx.device_info() if device != "cpu" else {}
    names = ("max_recommended_working_set_size", "memory_size", "total_memory")
    return next((int(info[name]) for name in names if name in info), memory)


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
    ranks = (environ.get(name, "") for name in ("MLX_RANK", "OMPI_COMM_WORLD_RANK"))
    return next((int(rank) for rank in ranks if rank.isdecimal()), None)


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
    """Memory of the machine in bytes, or what a container leaves to this process."""
    limits = [file.read_text() for file in CONTAINER_LIMITS if file.is_file()]
    return least_memory(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), limits)


def least_memory(physical_bytes: int, limits: Sequence[str]) -> int:
    """The memory that the texts of a container's limits leave of the machine's; `max` is none."""
    return min([physical_bytes, *(int(text) for text in limits if text.strip().isdigit() and int(text) > 0)])


def usable_bytes(*, device: str, memory_bytes: int, device_memory_bytes: int) -> int:
    """The bytes that MLX may hold at once and the machine still runs well.

    On Metal what the system recommends. On CUDA, 95 % of the device's memory, which is MLX's own limit there. On a
    CPU all but a tenth, at least 1 GB: for Python, its libraries (0.5 GB here) and the system.
    """
    if device == "metal":
        return device_memory_bytes
    if device == "cuda":
        return int(0.95 * device_memory_bytes)
    return max(0, memory_bytes - max(memory_bytes // 10, 10**9))


def usable_here() -> int:
    """The bytes that MLX may hold on this machine."""
    device, memory = device_kind(), memory_bytes()
    return usable_bytes(device=device, memory_bytes=memory, device_memory_bytes=_device_memory_bytes(device, memory))


def memory_limits(*, device: str, working_set_bytes: int) -> MemoryLimits | None:
    """MLX's limits on Metal, from the working set that the system recommends; None: its own are kept.

    MLX wires nothing by itself, and allocates up to 1.5 times the working set, where macOS begins to swap: at the
    working set it should rather wait for running work to give back memory. Rows of many lengths leave freed buffers
    of many sizes, of which a quarter of the working set is kept for use again. Chosen from MLX's documentation; not
    measured on a Mac.
    """
    if device != "metal" or working_set_bytes <= 0:
        return None
    return MemoryLimits(wired=working_set_bytes, memory=working_set_bytes, cache=working_set_bytes // 4)


def compute_policy(
    *, device: str, memory_bytes: int, float32_bytes: int, blas: str, thrifty: bool = False
) -> ComputePolicy:
    """The policy for a model whose weights take `float32_bytes` when held in float32.

    On a CPU only float32 matmul goes through BLAS, so everything is computed in float32 and a quantized base is
    expanded when that takes at most 60 % of the memory; a `thrifty` user, who computes no gradients, has it unfolded
    instead. On Metal and CUDA the stored precision is kept. `mx.compile`
    calls a C++ compiler for each graph on a CPU and gained nothing there in any measurement.
    """
    if device == "cpu":
        fits = float32_bytes <= 0.6 * memory_bytes and not thrifty
        gaps = fits and blas == REFERENCE_BLAS
        return ComputePolicy(float32=fits, expand=fits, spread=gaps, compile=False, pad_multiple=1, unfold=thrifty)
    return ComputePolicy(float32=False, expand=False, spread=False, compile=True, pad_multiple=32)


def policy_here(parameters: int, *, thrifty: bool = False) -> ComputePolicy:
    """The policy of this machine for a model of so many parameters."""
    return compute_policy(
        device=device_kind(),
        memory_bytes=memory_bytes(),
        float32_bytes=4 * parameters,
        blas=blas_name(),
        thrifty=thrifty,
    )


def batch_parts(device: str, cores: int) -> int:
    """Parts of a batch that are computed at once: on a CPU, MLX gives each operation one core."""
    return cores if device == "cpu" else 1


def padded_count(count: int, most: int, device: str) -> int:
    """How many places to have room for, of `most`: at least one; few numbers where each new one is compiled."""
    return max(1, count) if device == "cpu" else max(1, min(most, 1 << max(0, count - 1).bit_length()))


def packing_pays(device: str, before: int, after: int) -> bool:
    """Whether to pack a batch whose longest part has so many tokens before and after, in lines of the same width.

    A token in a longer line has more keys. On a CPU, with skewed lengths, 24 % fewer tokens were 1.25 times as fast
    with 20 M parameters and 1.05 times with 0.3 M, and 4 % fewer were slower. A GPU also loses the half of attention
    that it skips without a mask: not measured.
    """
    return after <= (0.8 if device == "cpu" else 0.75) * before


def sharing_pays(prefix: int, rest: float, lines: int) -> bool:
    """Whether to compute `prefix` tokens once for each part of a batch, with so many `lines` of a mean `rest`.

    On a CPU, on two models, this was faster by what it predicts for prefixes of 64 tokens and more; with fewer, the
    second pass through the blocks costs more than it saves.
    """
    return prefix >= 64 and lines * (prefix + rest) >= 1.2 * (prefix + lines * rest)


def chunk_bytes(device: str) -> int:
    """Bytes of float32 logits that a loss makes at once. MLX works on ahead, so about ten times that are held.

    8 MB, 16 positions of a vocabulary of 131,072, lost no time to 64 MB on a CPU; a GPU needs larger products.
    """
    return 2**23 if device == "cpu" else 2**26


def attention_blocks(device: str) -> tuple[int | None, int]:
    """Queries that training attends with at once, and tokens of the shortest rows for which it does so; None: none.

    On a CPU this is faster than MLX's own at any length: 1.2 times at 62 tokens, twice at 500. On Metal, where nothing
    of it was measured, it is for rows whose attention weights would take most of the memory. CUDA has an attention
    that keeps none.
    """
    return {"cpu": (64, 0), "metal": (512, 1024)}.get(device, (None, 0))


def power_of_two(exponents: "mx.array") -> "mx.array":
    """2^x: on a CPU, MLX's power takes 4 ns a number and its exp, which is not vectorized there, 12."""
    import mlx.core as mx

    return mx.power(2.0, exponents) if device_kind() == "cpu" else mx.exp(exponents * math.log(2))


def most_tokens(device: str) -> int | None:
    """Tokens of each of the parts of a batch that are computed at once; what is more comes after them. None: no limit.

    On a CPU larger arrays are no faster, and what is kept for the backward pass grows with them. 320 tokens cost 5 %
    of the time on a model of 0.3 M parameters, whose operations are the shortest.
    """
    return 320 if device == "cpu" else None


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
    """Sets what holds for the whole process: on Metal MLX's `memory_limits`, on a CPU how graphs are run.

    There `mx.compile` is off, as each new graph costs a compiler run, and MLX walks a graph breadth first, unless that
    is to `save_memory`: in its usual order it hands out the operations of one stream before those of the next, so that
    the parts of a batch wait for each other; but gradient checkpointing saves less breadth first. MLX asks for the
    width once, so the first call in a process decides.
    """
    import mlx.core as mx

    device = device_kind()
    if device == "cpu":
        mx.disable_compile()
        os.environ.setdefault("MLX_BFS_MAX_WIDTH", "20" if save_memory else "100000")
        return
    limits = memory_limits(device=device, working_set_bytes=_device_memory_bytes(device, 0))
    if limits is not None:
        mx.set_wired_limit(limits.wired)
        mx.set_memory_limit(limits.memory)
        mx.set_cache_limit(limits.cache)


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
