"""`mlxtune doctor`: what this machine has, and what would make it faster. Knows thresholds, not how facts are found."""

import dataclasses
import os
import platform
import resource
import shutil
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import click

from mlxtune import __version__
from mlxtune.cli import display
from mlxtune.report.words import size

LOW_MEMORY_BYTES = 7_500_000_000  # "8 GB" machines report a little less
LOW_DISK_BYTES = 10_000_000_000
LOW_OPEN_FILES = 256  # the default of macOS, which suffices


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What was found. Sizes in bytes; `gflops` is float32 matmul on the default device; `open_files` None: no limit."""

    system: str
    python: str
    processor: str
    cores: int
    device: str
    device_name: str
    nvidia: bool
    mlx: str
    mlx_lm: str
    memory_bytes: int
    working_set_bytes: int
    open_files: int | None
    blas: str
    blas_choice: str
    gflops: float
    compiler: str | None
    disk_free_bytes: int
    hub_cache: str
    hub_cache_bytes: int | None
    hub_cache_free_bytes: int
    hub_cache_on_same_disk: bool
    hub_endpoint: str
    hub_offline: bool
    hub_token: bool


@click.command("doctor", short_help="what this machine has, and what would make it faster")
@click.option("--json", "as_json", is_flag=True, help="print the facts and the advice as JSON, sizes in bytes")
def command(as_json: bool) -> None:
    """Show what this machine has, measure its speed, and say what would make it faster.

    \b
    Example:
      mlxtune doctor
    """
    facts = gather()
    if as_json:
        display.result_json(to_json(facts))
        return
    display.result(click.style(f"mlxtune {__version__}", bold=True))
    display.result()
    for name, value in describe(facts):
        display.result(f"  {name:<14}{value}")
    display.result()
    improvements = advice(facts)
    if not improvements:
        display.result("Everything looks good.")
        return
    display.result(f"{display.count(len(improvements), 'thing')} to improve:")
    for line in improvements:
        display.result(f"  {line}")


def gather() -> Facts:
    """The facts of this machine and this folder; takes about a second. Raises MlxtuneError if MLX does not load."""
    from mlxtune import hub, machine
    from mlxtune.errors import MlxtuneError

    try:
        found = machine.facts()
    except (ImportError, metadata.PackageNotFoundError) as error:
        extra = "[cpu]" if platform.system() == "Linux" else ""
        raise MlxtuneError(f"MLX does not load: {error}", hint=f"run `pip install 'mlx{extra}'`") from None
    online = hub.state()
    here, cache = existing(Path()), existing(Path(online["cache"]))
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return Facts(
        system=found.system,
        python=platform.python_version(),
        processor=found.processor,
        cores=found.cores,
        device=found.device,
        device_name=found.device_name,
        nvidia=shutil.which("nvidia-smi") is not None,
        mlx=found.mlx_version,
        mlx_lm=metadata.version("mlx-lm"),
        memory_bytes=found.memory_bytes,
        working_set_bytes=found.device_memory_bytes,
        open_files=None if files == resource.RLIM_INFINITY else files,
        blas=found.blas,
        blas_choice=os.environ.get("MLXTUNE_OPENBLAS", "1"),
        gflops=round(machine.measure_matmul_gflops(), 1),
        compiler=found.compiler,
        disk_free_bytes=shutil.disk_usage(here).free,
        hub_cache=online["cache"],
        hub_cache_bytes=online["cache_bytes"],
        hub_cache_free_bytes=shutil.disk_usage(cache).free,
        hub_cache_on_same_disk=here.stat().st_dev == cache.stat().st_dev,
        hub_endpoint=online["endpoint"],
        hub_offline=online["offline"],
        hub_token=online["token"],
    )


def existing(folder: Path) -> Path:
    """The nearest folder above `folder`, or itself, that exists."""
    return next(each for each in (folder.absolute(), *folder.absolute().parents) if each.exists())


def describe(facts: Facts) -> list[tuple[str, str]]:
    """What each line of the overview says: name and value."""
    device = {"metal": "Apple GPU", "cuda": "NVIDIA GPU", "cpu": "CPU"}[facts.device]
    through = f", {facts.blas}" if facts.device == "cpu" else ""
    limit = "no limit" if facts.open_files is None else f"{facts.open_files:,} at once"
    used = "" if facts.hub_cache_bytes is None else f"{size(facts.hub_cache_bytes)} used, "
    token = "with a token" if facts.hub_token else "no token (public models need none)"
    return [
        ("system", f"{facts.system}, Python {facts.python}"),
        ("device", f"{device} ({facts.device_name}), {display.count(facts.cores, 'CPU core')}"),
        ("memory", f"{size(facts.memory_bytes)}, up to {size(facts.working_set_bytes)} for a model"),
        ("MLX", f"{facts.mlx} on {facts.device}, mlx-lm {facts.mlx_lm}"),
        ("matmul", f"{facts.gflops:,.0f} GFLOP/s in float32{through}"),
        ("C++ compiler", facts.compiler or "none (not needed)"),
        ("open files", limit),
        ("disk here", f"{size(facts.disk_free_bytes)} free"),
        ("hub cache", f"{facts.hub_cache}: {used}{size(facts.hub_cache_free_bytes)} free"),
        ("hub", f"{facts.hub_endpoint}, {'offline' if facts.hub_offline else 'online'}, {token}"),
    ]


def advice(facts: Facts) -> list[str]:
    """One line for each thing that is slow, short or missing, the most important first."""
    lines = []
    if facts.device == "cpu" and facts.nvidia:
        lines.append("An NVIDIA GPU is not used: install MLX for it with `pip install 'mlxtune[cuda13]'`.")
    if facts.device == "cpu" and facts.blas == "reference BLAS":
        lines.append(f"Training is several times slower without OpenBLAS: {_openblas_hint(facts)}.")
    if facts.working_set_bytes < LOW_MEMORY_BYTES:
        lines.append(
            f"{size(facts.working_set_bytes)} of memory is little: choose models below 1B parameters, or quantize them."
        )
    if facts.disk_free_bytes < LOW_DISK_BYTES:
        place = "here and in the hub cache" if facts.hub_cache_on_same_disk else "here"
        lines.append(f"{size(facts.disk_free_bytes)} of disk is free {place}: a run can take several GB.")
    if facts.hub_cache_free_bytes < LOW_DISK_BYTES and not facts.hub_cache_on_same_disk:
        free = size(facts.hub_cache_free_bytes)
        lines.append(f"{free} of disk is free in the hub cache: set HF_HUB_CACHE to a folder on a larger disk.")
    if facts.open_files is not None and facts.open_files < LOW_OPEN_FILES:
        lines.append(f"Only {facts.open_files} files may be open at once: raise the limit with `ulimit -n 1024`.")
    if facts.hub_offline:
        lines.append("HF_HUB_OFFLINE is set: models that are not in the cache cannot be downloaded; unset it for that.")
    return lines


def _openblas_hint(facts: Facts) -> str:
    from mlxtune.machine import OPENBLAS_HINT, OPENBLAS_NAMES

    if facts.blas_choice == "0":
        return "unset MLXTUNE_OPENBLAS, which is 0"
    if facts.blas_choice != "1":
        return (
            f"MLXTUNE_OPENBLAS names {facts.blas_choice}, which does not load; unset it to look for {OPENBLAS_NAMES[0]}"
        )
    return OPENBLAS_HINT


def to_json(facts: Facts) -> dict[str, Any]:
    """The facts and the advice as one JSON object."""
    return {"mlxtune": __version__, **dataclasses.asdict(facts), "advice": advice(facts)}
