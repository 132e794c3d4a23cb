"""Runs sent to the real tensorboard, wandb, mlflow and trackio, offline, and read back as these keep them."""

import json
import sqlite3
import struct
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from mlxtune import trackers

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore")]
STEPS, STOPPED = 6, 3
# what a terminal does at Ctrl-C when the update STOPPED is shown: SIGINT for all processes of the command
CTRL_C = f"""
import os, signal, sys
from mlxtune.cli import display, main
update = display.Progress.update
def shown(self, done, detail=""):
    update(self, done, detail)
    if done == {STOPPED} and detail.startswith("loss"):
        os.killpg(0, signal.SIGINT)
display.Progress.update = shown
main(sys.argv[1:])
"""


@dataclass
class Kept:
    """A run as a tracker has it: values by name and step, settings, and how it ended."""

    figures: dict[str, dict[int, float]] = field(default_factory=lambda: defaultdict(dict))
    settings: dict[str, Any] = field(default_factory=dict)
    state: str | int | None = None

    def add(self, name: str, step: int, value: float) -> None:
        assert step not in self.figures[name]  # nothing is told twice
        self.figures[name][step] = value


def tensorboard(folder: Path) -> list[Kept]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "run" / "tensorboard"), {"scalars": 0, "tensors": 0})
    events.Reload()
    kept = Kept()
    for name in events.Tags()["scalars"]:
        for each in events.Scalars(name):
            kept.add(name, each.step, each.value)
    (text,) = events.Tensors("recipe/text_summary")
    lines = text.tensor_proto.string_val[0].decode().splitlines()
    kept.settings = yaml.safe_load("\n".join(line.removeprefix("    ") for line in lines))
    return [kept]


def wandb(folder: Path) -> list[Kept]:
    """One for each run id: a run that goes on writes a second file, and both are synced to the same run."""
    from wandb.proto.wandb_internal_pb2 import Record

    runs: dict[str, Kept] = defaultdict(Kept)
    for file in sorted((folder / "run" / "wandb").glob("offline-run-*/*.wandb")):
        kept = runs[file.stem]
        for content in wandb_records(file.read_bytes()):
            record = Record.FromString(content)
            if record.HasField("run") and record.run.config.update:
                kept.settings = {each.key: json.loads(each.value_json) for each in record.run.config.update}
                del kept.settings["_wandb"]
            if record.HasField("history"):
                values = {(each.key or each.nested_key[0]): json.loads(each.value_json) for each in record.history.item}
                for name in values.keys() - {"_step", "_timestamp", "_runtime"}:
                    kept.add(name, values["_step"], values[name])
            if record.HasField("exit"):
                kept.state = record.exit.exit_code
    return list(runs.values())


def wandb_records(content: bytes) -> Iterator[bytes]:
    """The records of a .wandb file: 7 bytes that name it, and LevelDB's log format in blocks of 32 KiB."""
    whole, at = b"", 7
    while at < len(content):
        left = 32768 - at % 32768
        if left < 7:  # no header fits
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        whole += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # the whole record, or its last piece
            yield whole
            whole = b""


def mlflow(folder: Path) -> list[Kept]:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("mlxtune")
    runs = []
    for each in client.search_runs([experiment.experiment_id]):
        kept = Kept(state=each.info.status)
        for name in each.data.metrics:
            for value in client.get_metric_history(each.info.run_id, name):
                kept.add(name, value.step, value.value)
        for name, text in each.data.params.items():
            section, _, inner = name.rpartition(".")
            (kept.settings.setdefault(section, {}) if section else kept.settings)[inner] = text
        runs.append(kept)
    return runs


def trackio(folder: Path) -> list[Kept]:
    runs: dict[str, Kept] = defaultdict(Kept)
    with sqlite3.connect(folder / "trackio" / "mlxtune.db") as database:
        for name, step, metrics in database.execute("SELECT run_name, step, metrics FROM metrics"):
            for each, value in json.loads(metrics).items():
                runs[name].add(each, step, value)
        for name, config in database.execute("SELECT run_name, config FROM configs"):
            told = json.loads(config).items()
            runs[name].settings = {each: value for each, value in told if not each.startswith("_")}
    return list(runs.values())


READERS: dict[str, Callable[[Path], list[Kept]]] = {
    "tensorboard": tensorboard,
    "wandb": wandb,
    "mlflow": mlflow,
    "trackio": trackio,
}
STATES: dict[str, tuple[Any, Any, Any]] = {  # after Ctrl-C, a failure, and the end; the others keep none
    "wandb": (130, 1, 0),
    "mlflow": ("KILLED", "FAILED", "FINISHED"),
}


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a test, where each tracker keeps its data, and the home of what it keeps beside them."""
    for name, value in {
        "HOME": tmp_path / "home",
        "WANDB_MODE": "offline",
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path / 'mlflow.db'}",
        "TRACKIO_DIR": tmp_path / "trackio",
    }.items():
        monkeypatch.setenv(name, str(value))
    rows = [{"prompt": f"number {row}", "completion": f"{row * row} is its square"} for row in range(24)]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return tmp_path


def needs(name: str) -> None:
    for each in (trackers.OPENERS[name][0], name):
        pytest.importorskip(each, reason=f"needs {each}")


def train(
    folder: Path, name: str, *more: str, code: str = "from mlxtune.cli import main; main()"
) -> tuple[int, str, str]:
    """`mlxtune train` in a process of its own; returns exit code, stdout and stderr."""
    flags = f"--iters {STEPS} --batch-size 4 --steps-per-report 1 --steps-per-eval 2 --out run --report-to {name}"
    command = [sys.executable, "-c", code, "train", "--data", "rows.jsonl", *flags.split(), *more]
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL, start_new_session=True
    )
    return done.returncode, done.stdout, done.stderr


def logged(folder: Path) -> dict[str, dict[int, float]]:
    """What log.jsonl says, as a tracker should have it."""
    found: dict[str, dict[int, float]] = defaultdict(dict)
    for text in (folder / "run" / "log.jsonl").read_text().splitlines():
        line = json.loads(text)
        for name in ("learning_rate", "tokens_per_second", "peak_memory_gb"):
            found[f"train/{name}"][line["step"]] = line[name]
        found["train/loss"][line["step"]] = line["train_loss"]
        if line["valid_loss"] is not None:
            found["valid/loss"][line["step"]] = line["valid_loss"]
    return found


def assert_same(kept: Kept, folder: Path) -> None:
    wanted = logged(folder)
    assert kept.figures.keys() == wanted.keys()
    for name, values in wanted.items():
        assert kept.figures[name] == pytest.approx(values, rel=1e-6)  # tensorboard's are float32


@pytest.mark.parametrize("name", READERS)
def test_a_run_goes_on_in_the_tracker(name: str, offline: Path) -> None:
    """Ctrl-C, the same command again: one run with all steps once, its settings, and only the result on stdout."""
    needs(name)
    code, out, err = train(offline, name, "--json", code=CTRL_C)
    assert (code, out) == (130, ""), err
    assert f"error: stopped after update {STOPPED} of {STEPS}; " in err.splitlines()[-1]
    (kept,) = READERS[name](offline)
    assert kept.figures["train/loss"].keys() == set(range(1, STOPPED + 1))
    assert kept.state == STATES.get(name, (None,) * 3)[0]

    code, out, err = train(offline, name, "--json")
    assert (code, out.count("\n")) == (0, 1), err
    assert json.loads(out)["training"]["resumed_at"] == STOPPED
    assert "\nwarning: " not in err
    (kept,) = READERS[name](offline)
    assert kept.figures["train/loss"].keys() == set(range(1, STEPS + 1))
    assert kept.figures["valid/loss"].keys() == {2, 4, 6}
    assert_same(kept, offline)
    settings = yaml.safe_load((offline / "run" / "recipe.yaml").read_text())
    if name == "mlflow":  # which keeps text
        settings = {
            section: {inner: str(value) for inner, value in each.items()} if isinstance(each, dict) else str(each)
            for section, each in settings.items()
        }
    assert kept.settings == settings
    assert kept.state == STATES.get(name, (None,) * 3)[2]
    assert not (offline / "home" / ".config" / "mlflow").exists()  # where its telemetry keeps who asks


@pytest.mark.parametrize("name", STATES)
def test_a_failed_run_is_marked(name: str, offline: Path) -> None:
    needs(name)
    code, out, err = train(offline, name, "--learning-rate", "1e30", "--set", "train.max_grad_norm=null")
    assert (code, out) == (1, ""), err
    assert "is not finite" in err.splitlines()[-1]
    (kept,) = READERS[name](offline)
    assert kept.state == STATES[name][1]


SENDS = """
import os, sys
from pathlib import Path
from mlxtune import trackers
from mlxtune.recipe import Recipe
from mlxtune.rundir import RunDir
from mlxtune.steplog import StepLog
name, first, last, end = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
run = RunDir(Path("run"))
run.root.mkdir(exist_ok=True)
with trackers.opened([name], run, Recipe(), lambda text: print(text, flush=True)) as send:
    if end == "full":
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    for step in range(first, last + 1):
        send(
            StepLog(
                step=step, train_loss=1 / step, valid_loss=None, learning_rate=1e-3, tokens_per_second=1e2,
                peak_memory_gb=0.5,
            )
        )
    if end == "dies":
        import time
        time.sleep(2)  # trackio writes twice a second
        os._exit(9)
print("closed")
"""


def send(folder: Path, *args: str) -> tuple[int, list[str]]:
    command = [sys.executable, "-c", SENDS, *args]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout.splitlines()


@pytest.mark.parametrize("name", ["tensorboard", "mlflow", "trackio"])
def test_steps_behind_the_last_checkpoint_are_told_once(name: str, offline: Path) -> None:
    """A run that was killed goes on at its checkpoint, with steps that the tracker has already."""
    needs(name)
    assert send(offline, name, "1", "5", "dies") == (9, [])
    assert send(offline, name, "4", "8", "ends") == (0, ["closed"])
    (kept,) = READERS[name](offline)
    assert kept.figures["train/loss"] == pytest.approx({step: 1 / step for step in range(1, 9)}, rel=1e-6)


@pytest.mark.parametrize("name", ["tensorboard", "mlflow"])
def test_a_full_disk_costs_the_tracker_and_not_the_training(name: str, offline: Path) -> None:
    """No file may grow beyond 4 KiB. tensorboardX's own writer stops for ever here."""
    needs(name)
    code, said = send(offline, name, "1", "500", "full")
    assert code == 0
    assert [line.split(":")[0] for line in said] == [f"{name} failed and gets no more", "closed"]
