"""Death, power loss, a full disk, an I/O error at every file operation: nothing torn or lost, and a rerun is whole.

`faults.c` counts the operations and lets one of them fail, `faults.py` is the process that this happens to, and
`forks.py` starts it.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.forks import DEAD, Forks, Outcome, in_memory, started

FATES = {"k": "killed", "p": "power lost", "s": "disk full", "e": "I/O error"}
ROWS = [
    {"prompt": f"Which {thing} is {colour}?", "completion": f"{colour} {thing}."}
    for colour in ("red", "blue", "green", "grey", "pink", "gold")
    for thing in ("cat", "car", "tea", "rain")
]
Check = Callable[[Path, "Outcome"], None]


# --- what the tests see of it


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    yield from started(tmp_path_factory.mktemp("faults"))


@pytest.fixture
def scratch() -> Iterator[Path]:
    yield from in_memory()


def tree(folder: Path) -> dict[str, bytes | None]:
    """Every path below a folder, hidden ones too, with the content of files."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def lose_what_was_not_synced(operations: list[tuple[int, str, str, str]]) -> None:
    """What a loss of power leaves: of each file written after its last sync, what was synced, or the first half."""
    safe: dict[str, int] = {}  # bytes on the disk of what was written since
    synced: dict[str, int] = {}
    last = len(operations) - (operations[-1][1] != "write")  # death came before it, or in the middle of a write
    for _, name, path, new in operations[:last]:
        if name in ("write", "truncate"):
            safe[path] = synced.get(path, 0)
        elif name == "fsync":
            safe.pop(path, None)
            synced[path] = int(new)  # its size then
        elif name == "rename":
            safe, synced = (
                {
                    new + each[len(path) :] if f"{each}/".startswith(f"{path}/") else each: size
                    for each, size in by.items()
                }
                for by in (safe, synced)
            )
    for file, size in ((Path(path), size) for path, size in safe.items()):
        if file.is_file():
            length = file.stat().st_size
            os.truncate(file, max(min(size, length), length // 2))


@dataclass(frozen=True)
class Work:
    """One thing to do under fire: `task` with `args` in a copy of `before`; `check` raises AssertionError on damage."""

    task: str
    args: list[Any]
    before: Path
    check: Check
    same: Callable[[Path, Path], None]  # the end of a rerun, and the end of an undisturbed run
    refused: str = "\0"  # what a rerun says where the work was done before the fault


def troubles(forks: Forks, work: Work, scratch: Path, fates: str = "kpse", every: int = 1) -> tuple[int, list[str]]:
    """Lets every operation (or one of `every`) of `work` meet each fate. Returns how many cases, and what was wrong."""
    whole, folder = scratch / "whole", scratch / "run"
    shutil.copytree(work.before, whole, symlinks=True)
    done = forks.run(work.task, whole, work.args)
    assert done.code == 0, done.output
    cases, wrong = 0, []
    for at in range(1, len(done.operations) + 1, every):
        for fate in fates:
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(work.before, folder, symlinks=True)
            args = [str(each).replace(str(whole), str(folder)) if isinstance(each, str) else each for each in work.args]
            met = forks.run(work.task, folder, args, at, fate)
            if fate == "p":
                lose_what_was_not_synced(met.operations)
            cases += 1
            name = f"{FATES[fate]} at {at}, {' '.join(done.operations[at - 1][1:]).replace(str(whole), '')}"
            try:
                check_end(met, fate)
                work.check(folder, met)
                again = forks.run(work.task, folder, args, watch=False)
                assert again.code == 0 or work.refused in again.output, f"rerun: {again.output}"
                work.same(folder, whole)
            except (AssertionError, ValueError) as error:  # what is no JSON is a ValueError
                wrong.append(f"{name}: {str(error).splitlines()[0]}")
    return cases, wrong


def check_end(met: Outcome, fate: str) -> None:
    """Death is death; an error of the disk is survived, or is one line and exit code 3."""
    if fate in "kp":
        assert met.code == DEAD, f"exit code {met.code}"
        return
    assert met.code in (0, 3), f"exit code {met.code}: {met.output[-300:]!r}"
    errors = [line for line in met.output.splitlines() if line.startswith("error: ")]
    assert len(errors) == (met.code == 3), f"{len(errors)} error lines: {met.output[-300:]!r}"
    assert "Traceback" not in met.output, met.output[-300:]


def same_tree(folder: Path, whole: Path) -> None:
    found, expected = tree(folder), tree(whole)
    assert found.keys() == expected.keys(), f"files differ: {sorted(found.keys() ^ expected.keys())}"
    differing = [name for name in found if found[name] != expected[name]]
    assert not differing, f"content differs: {differing}"


# --- a save


@pytest.fixture(scope="module")
def saves(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, bytes | None]]]:
    """A folder with two checkpoints, the second save of which removed one; and what each of steps 1 … 4 holds."""
    folder = tmp_path_factory.mktemp("saves")
    kept: dict[str, dict[str, bytes | None]] = {}
    for step in (1, 2, 3, 4):
        target = folder / ("before" if step < 4 else "after")
        shutil.copytree(folder / "before", target) if step == 4 else None
        assert forks.run("save", target, [step], watch=False).code == 0
        kept |= {each.name: tree(each) for each in (target / "checkpoints").iterdir()}
    return folder / "before", kept


def check_saves(kept: dict[str, dict[str, bytes | None]]) -> Check:
    """Each checkpoint in sight is whole, and the newest of before or the new one is found, without a warning."""

    def check(folder: Path, met: Outcome) -> None:
        from mlxtune import checkpoint

        for each in (folder / "checkpoints").glob("step-*"):
            assert tree(each) == kept[each.name], f"torn: {each.name}"
        found, damaged = checkpoint.newest(folder / "checkpoints")
        assert damaged == [], "a whole checkpoint is called damaged"
        assert found is not None, "lost"
        assert found.step in ((3, 4) if met.code else (4,)), "lost"

    return check


def test_a_save_survives_everything(
    forks: Forks, saves: tuple[Path, dict[str, dict[str, bytes | None]]], scratch: Path
) -> None:
    before, kept = saves
    work = Work("save", [4], before, check_saves(kept), same_tree)
    cases, wrong = troubles(forks, work, scratch)
    assert wrong == []
    assert cases >= 4 * 30


@pytest.mark.parametrize(
    ("task", "fates", "found"),
    [("save in place", "k", "torn"), ("save in place", "s", "torn"), ("save unsynced", "p", "torn")],
)
def test_a_careless_save_is_found_out(
    forks: Forks,
    saves: tuple[Path, dict[str, dict[str, bytes | None]]],
    scratch: Path,
    task: str,
    fates: str,
    found: str,
) -> None:
    before, kept = saves
    _, wrong = troubles(forks, Work(task, [4], before, check_saves(kept), same_tree), scratch, fates)
    assert any(f": {found}" in each for each in wrong), wrong


def test_the_first_save_of_a_new_folder(
    forks: Forks, saves: tuple[Path, dict[str, dict[str, bytes | None]]], scratch: Path
) -> None:
    _, kept = saves
    (scratch / "empty").mkdir()

    def check(folder: Path, met: Outcome) -> None:
        for each in (folder / "checkpoints").glob("step-*"):
            assert tree(each) == kept[each.name], f"torn: {each.name}"

    assert troubles(forks, Work("save", [1], scratch / "empty", check, same_tree), scratch, "ke")[1] == []


# --- single files


def test_a_json_file_is_old_or_new(forks: Forks, scratch: Path) -> None:
    (scratch / "before" / "new").mkdir(parents=True)
    (scratch / "before" / "new" / "origin.json").write_text('{"name": "old"}\n')

    def check(folder: Path, met: Outcome) -> None:
        value = json.loads((folder / "new" / "origin.json").read_text())
        assert value["name"] in (("old", "new") if met.code else ("new",)), "lost"

    def same(folder: Path, whole: Path) -> None:
        shown = {name: content for name, content in tree(folder).items() if ".partial-" not in name}
        assert shown == tree(whole), "content differs"

    _, wrong = troubles(forks, Work("write", [], scratch / "before", check, same), scratch)
    assert wrong == []


def test_a_log_has_whole_lines_after_the_next_one(forks: Forks, scratch: Path) -> None:
    (scratch / "before").mkdir()
    (scratch / "before" / "log.jsonl").write_text('{"step": 1, "loss": 1.0}\n')

    def check(folder: Path, met: Outcome) -> None:
        lines = (folder / "log.jsonl").read_text().split("\n")
        assert met.code == DEAD or lines[-1] == "", "torn"
        assert all(json.loads(line) for line in lines[:-1]), "torn"

    def same(folder: Path, whole: Path) -> None:
        steps = [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()]
        assert steps[0] == 1
        assert steps[-3:] == [2, 3, 4], f"lines differ: {steps}"

    _, wrong = troubles(forks, Work("log", [], scratch / "before", check, same), scratch, "kse")
    assert wrong == []


# --- whole commands


def training(folder: Path, data: Path) -> list[str]:
    settings = (
        "--iters 4 --batch-size 2 --num-layers 1 --set lora.rank=2 --set train.save_every=1 --set lora.dropout=0.1"
    )
    reports = "--set train.report_every=1"
    return ["train", "--model", "tiny", "--data", str(data), "--out", str(folder), *f"{settings} {reports}".split()]


def written(rows: list[dict[str, str]], folder: Path) -> Path:
    """A file of examples."""
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return data


def whole_checkpoint(folder: Path) -> bool:
    if not (folder / "manifest.json").is_file():
        return False
    hashes = json.loads((folder / "manifest.json").read_text())["sha256"]
    names = {"adapter_config.json", "adapters.safetensors", "best.safetensors", "optimizer.safetensors", "state.json"}
    return hashes.keys() == names and all(
        hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest for name, digest in hashes.items()
    )


def check_run(whole: Path) -> Check:
    """What is in sight of a run is whole; the newest checkpoint that was ever complete is there still."""

    def check(folder: Path, met: Outcome) -> None:
        for each in (folder / "checkpoints").glob("step-*"):
            assert whole_checkpoint(each), f"torn: {each.name}"
        for name in ("adapter", "data"):
            if (folder / name).exists():
                assert tree(folder / name).keys() == tree(whole / name).keys(), f"torn: {name}"
        for name in ("recipe.yaml", "data/train.jsonl", "adapter/adapters.safetensors"):
            if (folder / name).exists():
                assert (folder / name).read_bytes() == (whole / name).read_bytes(), f"torn: {name}"
        if (folder / "origin.json").exists():
            assert json.loads((folder / "origin.json").read_text()), "torn: origin.json"
        failed = len(met.operations) if met.code == DEAD else 0
        ends = [new for number, name, _, new in met.operations if name == "rename" and number != failed]
        steps = [Path(new).name for new in ends if Path(new).name.startswith("step-")]
        if steps and met.code == DEAD:
            assert (folder / "checkpoints" / steps[-1]).exists(), f"lost: {steps[-1]}"

    return check


def same_run(folder: Path, whole: Path) -> None:
    """The same files, and the same adapter to the bit; times and speeds differ.

    After a death between a save and what it removes, one checkpoint more may stay until the next save.
    """
    found, expected = tree(folder), tree(whole)
    more = {name for name in found.keys() - expected.keys() if name.startswith("checkpoints/step-0000001")}
    assert found.keys() - more == expected.keys(), f"files differ: {sorted(found.keys() ^ expected.keys())}"
    for name in ("adapter/adapters.safetensors", "data/train.jsonl", "recipe.yaml"):
        assert found[name] == expected[name], f"content differs: {name}"
    steps = [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4], f"lines of the log: {steps}"


def train_work(scratch: Path) -> Work:
    (scratch / "empty").mkdir()
    whole = scratch / "whole"
    return Work("cli", training(whole, written(ROWS, scratch)), scratch / "empty", check_run(whole), same_run)


def test_training_survives_a_sample_of_faults(forks: Forks, scratch: Path) -> None:
    cases, wrong = troubles(forks, train_work(scratch), scratch, "ke", every=83)
    assert wrong == []
    assert cases >= 4


@pytest.mark.slow
@pytest.mark.parametrize("fate", FATES)
def test_training_survives_everything(forks: Forks, scratch: Path, fate: str) -> None:
    cases, wrong = troubles(forks, train_work(scratch), scratch, fate)
    assert wrong == []
    assert cases >= 100


@pytest.mark.slow
@pytest.mark.parametrize("command", ["convert", "fuse"])
def test_a_model_folder_is_whole_or_absent(forks: Forks, scratch: Path, command: str) -> None:
    (scratch / "empty").mkdir()
    whole = scratch / "whole"
    args = ["convert", "tiny", "--mlx-path", f"{whole}/out", "-q"]
    if command == "fuse":
        trained = scratch / "trained"
        assert forks.run("cli", trained, training(trained, written(ROWS, scratch)), watch=False).code == 0
        args = ["fuse", "--model", "tiny", "--adapter-path", f"{trained}/adapter", "--save-path", f"{whole}/out"]

    def check(folder: Path, met: Outcome) -> None:
        if (folder / "out").exists():
            assert tree(folder / "out") == expected(), "torn"

    def expected() -> dict[str, bytes | None]:
        return {
            name: content.replace(str(whole).encode(), str(scratch / "run").encode()) if content else content
            for name, content in tree(whole / "out").items()
        }

    def same(folder: Path, _: Path) -> None:
        assert [each.name for each in folder.iterdir()] == ["out"], "files differ"
        assert tree(folder / "out") == expected(), "content differs"

    _, wrong = troubles(forks, Work("cli", args, scratch / "empty", check, same, "exists already"), scratch)
    assert wrong == []
