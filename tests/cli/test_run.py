"""`mlxtune run`: exact files, the report as JSON, running again, going on after a stop, what is refused."""

import json
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from click.testing import CliRunner

from mlxtune import pipeline, recipe
from mlxtune.cli import display, group

Invoke = Callable[..., tuple[int, str, str]]
Listing = Callable[[Path], dict[str, str]]
Broken = Callable[[str], Path]
WriteRows = Callable[..., Path]
Logits = Callable[..., mx.array]
Far = Callable[[mx.array, mx.array], float]

TOKENIZER = ["tokenizer.json", "tokenizer_config.json"]
MODEL = ["config.json", "model.safetensors", "model.safetensors.index.json", *TOKENIZER]
CANDIDATES = [f"{name}.jsonl" for name in ("base", "few_shot", "fused", "prompt", "retrieval", "tuned")]
EVIDENCE = ["evidence", "evidence/forgetting.jsonl"]
FILES = [
    ".lock",
    *(
        "adapter",
        "adapter/README.md",
        "adapter/adapter_config.json",
        "adapter/adapters.safetensors",
        "adapter/training.json",
    ),
    *("base", *(f"base/{name}" for name in MODEL)),
    *("compare", *(f"compare/{name}" for name in sorted(["compare.json", *CANDIDATES, *EVIDENCE]))),
    *("data", "data/audit.json", "data/test.jsonl", "data/train.jsonl", "data/valid.jsonl"),
    *("eval", *(f"eval/{name}.{kind}" for name in ("base", "fused", "tuned") for kind in ("json", "jsonl"))),
    *("fused", *(f"fused/{name}" for name in sorted([*MODEL, "README.md", "fuse.json"]))),
    *("log.jsonl", "loss.svg", "origin.json", "recipe.yaml", "report.html", "report.json", "report.md"),
]
METRICS = [
    "loss", "perplexity", "token_accuracy", "exact_match", "accuracy", "macro_f1", "outside_labels", "label_accuracy",
    "ece",
]  # fmt: skip
SCORE = {"metric", "value", "unit", "ci_low", "ci_high", "n", "better"}
RECIPE = """
model: tiny
data: {path: d.jsonl, test: 0.2, valid: 0.2}
quantize: {bits: 8}
train: {iters: 6, batch_size: 4, learning_rate: 5e-3}
evaluate: {max_tokens: 8, label: '^(\\w+)'}
"""


@pytest.fixture
def folder(tmp_path: Path, write_rows: WriteRows, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with `my.yaml` and its data."""
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "d.jsonl", 30)
    (tmp_path / "my.yaml").write_text(RECIPE)
    return tmp_path


@dataclass(frozen=True)
class Finished:
    """A working folder in which `mlxtune run my.yaml --json` ended, and what it printed. Nobody changes it."""

    folder: Path
    out: str
    err: str


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, write_rows: WriteRows) -> Finished:
    folder = tmp_path_factory.mktemp("finished")
    write_rows(folder / "d.jsonl", 30)
    (folder / "my.yaml").write_text(RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        done = CliRunner().invoke(group, ["run", "my.yaml", "--json"])
    assert done.exit_code == 0
    return Finished(folder, done.stdout, done.stderr)


def stages_of(err: str) -> dict[str, str]:
    """What is said of each stage, by its name."""
    said = [line[3:] for line in err.splitlines() if line.startswith((" ✓ ", " · "))]
    return {line[:15].strip(): line[15:].strip() for line in said}


def test_the_whole_path(listing: Listing, logits: Logits, plain_logits: Logits, far: Far, finished: Finished) -> None:
    assert finished.out.count("\n") == 1
    assert list(stages_of(finished.err)) == list(pipeline.STAGES)
    assert not any(said.startswith("skipped") for said in stages_of(finished.err).values())
    folder = finished.folder
    run = folder / "runs" / "my"
    assert list(listing(run)) == FILES
    assert list(listing(folder)) == ["d.jsonl", "my.yaml", "runs", "runs/my", *(f"runs/my/{name}" for name in FILES)]

    report = json.loads(finished.out)
    assert report == json.loads((run / "report.json").read_text())
    for column in ("base", "tuned", "fused"):
        scores = report[column]
        assert [score["metric"] for score in scores] == METRICS
        assert all(score.keys() == SCORE and score["n"] == 6 for score in scores)
        assert scores == json.loads((run / "eval" / f"{column}.json").read_text())["scores"]
    loss = {column: report[column][0]["value"] for column in ("base", "tuned", "fused")}
    assert loss["tuned"] < loss["base"]
    assert loss["fused"] == pytest.approx(loss["tuned"], rel=0.01)
    assert report["training"] == json.loads((run / "adapter" / "training.json").read_text())
    assert report["paths"] == {
        "run": "runs/my",
        "report": "runs/my/report.html",
        "model": report["origin"]["model"]["path"],
        "base": "runs/my/base",
        "adapter": "runs/my/adapter",
        "fused": "runs/my/fused",
    }
    sizes = {name: (run / name / "model.safetensors").stat().st_size for name in ("base", "fused")}
    assert report["sizes_bytes"] == {
        "base": 5_513_465,
        "quantized": sizes["base"],
        "adapter": (run / "adapter" / "adapters.safetensors").stat().st_size,
        "fused": sizes["fused"],
    }
    # mlx-lm multiplies packed weights, mlxtune expands them first: the same sums in another order
    assert far(plain_logits(run / "fused"), logits(run / "fused")) < 2e-4
    assert far(plain_logits(run / "base", run / "adapter"), logits(run / "base", run / "adapter")) < 2e-4


def test_again_skips_what_is_done(
    invoke: Invoke, listing: Listing, finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = finished.folder
    monkeypatch.chdir(folder)
    before = listing(folder)
    code, out, err = invoke("run", "my.yaml", "--json")
    assert (code, out) == (0, finished.out)
    said = stages_of(err)
    assert list(said) == list(pipeline.STAGES)
    assert {said[stage] for stage in pipeline.STAGES[:-1]} == {"skipped: done already"}
    assert said["report"] == "runs/my/report.html"
    assert listing(folder) == before

    for flags, differs in (
        (["--set", "lora.rank=4"], "lora.rank: 16 there, 4 here"),
        (["--learning-rate", "1e-3"], "train.learning_rate: 0.005 there, 0.001 here"),
        (["--seed", "1"], "seed: 0 there, 1 here"),
    ):
        code, out, line = invoke("run", "my.yaml", *flags)
        assert (code, out) == (2, "")
        hint = "choose another --out, or remove the folder"
        assert line == f"error: runs/my: holds a run of another recipe ({differs}); {hint}\n"
    assert listing(folder) == before


def test_a_run_can_be_repeated_from_its_own_recipe(
    invoke: Invoke, listing: Listing, folder: Path, finished: Finished
) -> None:
    """Every file but those with times and paths in them is the same to the byte, and so is every score."""
    first, second = finished.folder / "runs" / "my", folder / "again"
    assert invoke("run", first / "recipe.yaml", "--out", "again")[0] == 0
    a, b = listing(first), listing(second)
    assert a.keys() == b.keys()
    timed = {"adapter/training.json", "log.jsonl", "report.html", "report.json", "report.md", "fused/fuse.json"}
    timed |= {name for name in a if name.startswith(("eval/", "compare/"))} | {"adapter/adapter_config.json"}
    assert {name for name in a if a[name] != b[name]} <= timed
    configs = [json.loads((run / "adapter" / "adapter_config.json").read_text()) for run in (first, second)]
    assert [config.pop("model") for config in configs] == ["runs/my/base", "again/base"]
    assert configs[0] == configs[1]
    for column in ("base", "tuned", "fused"):
        scores = [json.loads((run / "eval" / f"{column}.json").read_text())["scores"] for run in (first, second)]
        assert scores[0] == scores[1]


def test_set_and_flags_reach_the_recipe(invoke: Invoke, folder: Path) -> None:
    flags = [
        "--set",
        "lora.rank=4",
        "--set",
        "lora.targets=[q_proj, v_proj]",
        "--set",
        "quantize=null",
        "--epochs",
        "0.5",
    ]
    code, out, err = invoke("run", "my.yaml", "--out", "other", *flags)
    assert code == 0
    assert "quantize" in stages_of(err) and "no quantize section" in stages_of(err)["quantize"]
    made = recipe.load(folder / "other" / "recipe.yaml")
    assert (made.lora.rank, made.lora.targets, made.quantize) == (4, ["q_proj", "v_proj"], None)
    assert (made.train.iters, made.train.epochs, made.train.learning_rate) == (None, 0.5, 5e-3)
    assert not (folder / "other" / "base").exists()
    assert {value.shape for value in mx.load("other/adapter/adapters.safetensors").values()} == {
        (192, 4), (4, 192), (4, 64),
    }  # fmt: skip
    assert out.splitlines()[0].split() == ["base", "tuned", "fused"]
    assert out.splitlines()[-1] == "chat    mlxtune chat --model other/fused"


def test_a_stop_in_every_stage_and_going_on(
    invoke: Invoke, listing: Listing, folder: Path, finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever stage Ctrl-C meets, what is finished stays, nothing is half there, and the end is the same."""
    update = display.Progress.update
    for stage in ("evaluate base", "train", "evaluate tuned", "evaluate fused"):

        def shown(self: display.Progress, done: int, detail: str = "", stage: str = stage) -> None:
            update(self, done, detail)
            if self.label == stage and (stage != "train" or "tokens/s" in detail):
                signal.raise_signal(signal.SIGINT)

        with monkeypatch.context() as patch:
            patch.setattr(display.Progress, "update", shown)
            code, out, err = invoke("run", "my.yaml", "--out", "runs/mine")
        assert (code, out) == (130, ""), stage
        last = err.splitlines()[-1]
        assert (
            last.startswith("error: stopped after update 1 of 6") if stage == "train" else last == "error: interrupted"
        )
        assert not [name for name in listing(folder) if "partial" in name]
    code, _, err = invoke("run", "my.yaml", "--out", "runs/mine")
    assert code == 0
    assert {stage for stage, said in stages_of(err).items() if said == "skipped: done already"} == {
        "audit", "split", "convert", "quantize", "evaluate base", "train", "evaluate tuned", "fuse",
    }  # fmt: skip
    runs = finished.folder / "runs" / "my", folder / "runs" / "mine"
    whole, stopped = map(listing, runs)
    extra = {name for name in stopped if name.startswith("checkpoints")}
    assert stopped.keys() - extra == whole.keys()
    for name in ("adapter/adapters.safetensors", "fused/model.safetensors", "data/train.jsonl"):
        assert stopped[name] == whole[name]
    reports = [json.loads((run / "report.json").read_text()) for run in runs]
    for column in ("base", "tuned", "fused"):
        assert reports[0][column] == reports[1][column]
    moved = json.dumps(reports[1]["samples"]).replace("runs/mine/", "runs/my/")
    assert json.loads(moved) == reports[0]["samples"]


MISTAKES: list[tuple[str, str]] = [
    ("model: tiny\nlora: {rnk: 3}\n", "bad.yaml: unknown key `lora.rnk`; did you mean `lora.rank`?"),
    ("model: tiny\nlora: {rank: x}\n", "bad.yaml: lora.rank: is 'x', not a whole number"),
    ("model: tiny\nlora: {rank: -1}\n", "bad.yaml: lora.rank: is -1; give at least 1"),
    ("model: tiny\n  lora: 1\n", "bad.yaml:2: not valid YAML: mapping values are not allowed here"),
    ("model: tiny\n", "data.path: is not set; give --data FILE, or data.path in the recipe"),
    ("data: absent.jsonl\n", "absent.jsonl: no such file or folder; "),
    ("data: bad.jsonl\n", "bad.jsonl:2: not valid JSON: "),
    ("data: d.jsonl\nmodel: absent\n", "absent: no such folder; "),
    ("data: d.jsonl\nmodel: model\n", "model: lacks the weights model-00002-of-00002.safetensors, "),
    ("data: {path: d.jsonl, group_by: kind}\n", "d.jsonl:1: has no column `kind`, which data.group_by names"),
    ("data: d.jsonl\ntrain: {max_seq_length: 8}\n", "d.jsonl:"),
]


@pytest.mark.parametrize(("text", "line"), MISTAKES)
@pytest.mark.usefixtures("without_weights")
def test_wrong_input(invoke: Invoke, listing: Listing, broken: Broken, folder: Path, text: str, line: str) -> None:
    broken("missing shard")
    (folder / "bad.yaml").write_text(text)
    (folder / "bad.jsonl").write_text(f"{(folder / 'd.jsonl').read_text().splitlines()[0]}\n{{\n")
    before = listing(folder)
    code, out, err = invoke("run", "bad.yaml")
    errors = [each for each in err.splitlines() if not each.startswith((" ✓", " ·"))]
    assert (code, out, len(errors)) == (2, "", 1)
    assert errors[0].startswith(f"error: {line}")
    assert listing(folder) == before


def test_a_recipe_that_is_not_there(invoke: Invoke, folder: Path) -> None:
    line = "error: absent.yaml: no such recipe; give the path of a YAML file\n"
    assert invoke("run", "absent.yaml") == (2, "", line)
    assert invoke("run", ".")[:2] == (2, "")
    assert not (folder / "runs").exists()


def test_another_process_at_work(invoke: Invoke, listing: Listing, folder: Path) -> None:
    from mlxtune.rundir import RunDir

    (folder / "busy").mkdir()
    with RunDir(folder / "busy").lock():
        before: dict[str, Any] = listing(folder)
        line = "error: busy: another run is at work in this folder; wait for it\n"
        assert invoke("run", "my.yaml", "--out", "busy") == (2, "", line)
        assert listing(folder) == before
    shutil.rmtree(folder / "busy")
