"""The process under fire: loads once and forks for each case, as training needs seconds to start and a fork needs none.

It is started by `forks.py` with the shim of `faults.c` preloaded.
"""

import ctypes
import importlib
import json
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

HEAVY = {"cli": "mlxtune.pipeline", "train": "mlxtune.train"}  # what a task imports


def serve() -> None:
    """Answers each request, a line of JSON, with the exit code of a fork that did it."""
    from mlxtune import machine

    machine.prepare()
    tasks = make_tasks()
    shim = ctypes.CDLL(os.environ["LD_PRELOAD"])
    shim.faults_arm.argtypes = [ctypes.c_char_p, ctypes.c_int, ctypes.c_char, ctypes.c_char_p]
    for line in sys.stdin:
        request = json.loads(line)
        if request["task"] in HEAVY:
            importlib.import_module(HEAVY[request["task"]])  # once for all, and not where a small process does
        child = os.fork()
        if child == 0:
            perform(request, tasks, shim)
        _, status = os.waitpid(child, 0)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(status)}\n")
        sys.stdout.flush()


def perform(request: dict[str, Any], tasks: dict[str, Callable[..., None]], shim: ctypes.CDLL) -> None:
    from mlxtune.errors import MlxtuneError

    output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(output, stream)
    code = 0
    if request["log"] is not None:
        shim.faults_arm(request["folder"].encode(), request["at"], request["fate"].encode(), request["log"].encode())
    try:
        tasks[request["task"]](Path(request["folder"]), *request["args"])
    except MlxtuneError as error:
        sys.stderr.write(f"error: {error}\n")
        code = error.exit_code
    except SystemExit as error:
        code = int(error.code or 0)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def make_tasks() -> dict[str, Callable[..., None]]:
    """What a fork can do, by name. Its arrays are made here, before anything is evaluated: MLX's threads don't fork."""
    import mlx.core as mx
    import numpy as np

    from mlxtune import checkpoint, rundir
    from mlxtune.cli import main

    draws = np.random.default_rng(1)
    arrays = {
        stem: {name: mx.array(draws.standard_normal((40, 50)).astype(np.float32)) for name in ("a", "b")}
        for stem in ("adapters", "best", "optimizer")
    }

    def point(step: int) -> checkpoint.Checkpoint:
        return checkpoint.Checkpoint(step, {"seen": step}, arrays)

    def save(folder: Path, *steps: int) -> None:
        with rundir.RunDir(folder).lock():
            for step in steps:
                checkpoint.save(folder / "checkpoints", point(step), {"num_layers": 1})

    def save_in_place(folder: Path, *steps: int) -> None:
        """Writes where the checkpoint belongs and removes the old one first, as a careless program would."""
        for step in steps:
            target = folder / "checkpoints" / f"step-{step:07d}"
            shutil.rmtree(folder / "checkpoints" / f"step-{step - 2:07d}", ignore_errors=True)
            target.mkdir(parents=True, exist_ok=True)
            for stem, tensors in arrays.items():
                mx.save_safetensors(str(target / stem), tensors)

    def save_unsynced(folder: Path, *steps: int) -> None:
        """Stages and renames, but leaves the content to the page cache."""
        rundir.sync = lambda path: None
        save(folder, *steps)

    def write(folder: Path) -> None:
        rundir.write_json(folder / "new" / "origin.json", {"name": "new", "list": list(range(50))})

    def log(folder: Path) -> None:
        for step in (2, 3, 4):
            rundir.append_line(folder / "log.jsonl", json.dumps({"step": step, "loss": 1.0}))

    def cli(folder: Path, *args: str) -> None:
        os.chdir(folder.parent)
        main(list(args))

    def train(
        folder: Path,
        base: str,
        samples: list[dict[str, Any]],
        valid: list[dict[str, Any]],
        seed: int,
        lora: dict[str, Any],
        settings: dict[str, Any],
        death: int,
    ) -> None:
        """Trains in `folder`; dies when update `death` is done and logged, but not saved."""
        from mlxtune import model
        from mlxtune.data.render import Sample
        from mlxtune.recipe import LoraRecipe, Recipe, TrainRecipe
        from mlxtune.steplog import StepLog
        from mlxtune.train import train

        def die(line: StepLog, steps: int) -> None:
            if line.step == death:
                os.kill(os.getpid(), signal.SIGKILL)

        rows, held_out = ([Sample(**each) for each in part] for part in (samples, valid))
        recipe = Recipe(seed=seed, lora=LoraRecipe(**lora), train=TrainRecipe(**settings))
        train(model.load(Path(base)), rows, held_out, recipe, folder, on_step=die)

    return {
        "save": save,
        "save in place": save_in_place,
        "save unsynced": save_unsynced,
        "write": write,
        "log": log,
        "cli": cli,
        "train": train,
    }


if __name__ == "__main__":
    serve()
