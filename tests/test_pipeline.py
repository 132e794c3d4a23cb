"""The pipeline as a library: its events, what it writes down, and what is left when a stage ends badly."""

import hashlib
import json
import random
import re
import shlex
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from mlxtune import pipeline, recipe
from mlxtune.cli import main, signals, stages
from mlxtune.errors import DataError, FuseError, InputError, Interrupted, OutputError, RecipeError, TrainingError
from mlxtune.pipeline import STAGES, TRAIN_STAGES, Event

WORDS = ["card", "parcel", "invoice", "voucher", "laptop", "refund", "basket", "kettle", "window", "courier", "battery"]
Make = Callable[..., recipe.Recipe]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """A recipe over 24 rows in `d.jsonl`, with the settings given by dotted keys, in a working folder of its own."""
    monkeypatch.chdir(tmp_path)
    draw = random.Random(0)
    rows = [{"prompt": " ".join(draw.sample(WORDS, 5)), "completion": f"answer {i % 3}"} for i in range(24)]
    Path("d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def of(**settings: Any) -> recipe.Recipe:
        small = {
            "data.path": "d.jsonl", "train.iters": 3, "train.batch_size": 4, "train.learning_rate": 1e-3,
            "evaluate.max_tokens": 4,
        }  # fmt: skip
        return recipe.build({}, settings=small | {name.replace("__", "."): value for name, value in settings.items()})

    return of


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def test_events_come_in_order_and_nothing_is_printed(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    events: list[Event] = []
    report = pipeline.run(make(), Path("run"), on_event=events.append)
    told = [(event.kind, event.stage) for event in events if event.kind not in ("progress", "validated")]
    assert [event.detail.split(":")[0] for event in events if event.kind == "validated"] == ["1/3", "2/3", "3/3"]
    expected = [(kind, stage) for stage in STAGES for kind in ("started", "finished")]
    at = expected.index(("started", "quantize"))
    expected[at : at + 2] = [("skipped", "quantize")]
    assert told == expected
    steps = [(e.done, e.total) for e in events if (e.kind, e.stage) == ("progress", "train") and "tokens/s" in e.detail]
    assert steps == [(1, 3), (2, 3), (3, 3)]
    assert capsys.readouterr() == ("", "")
    assert report == json.loads(Path("run/report.json").read_text())

    again: list[Event] = []
    pipeline.run(make(), Path("run"), on_event=again.append)
    assert [event.stage for event in again if event.kind == "skipped"] == list(STAGES[:-1])


def test_origin_names_model_data_and_versions(make: Make, tiny: Path) -> None:
    pipeline.run(make(), Path("run"), stages=TRAIN_STAGES)
    origin = json.loads(Path("run/origin.json").read_text())
    assert origin.keys() == {"model", "data", "machine", "versions"}
    assert origin["model"] == {
        "name": "tiny",
        "path": str(tiny),
        "revision": None,
        "bytes": (tiny / "model.safetensors").stat().st_size,
        "sha256": {name: sha256(tiny / name) for name in ("config.json", "model.safetensors")},
    }
    assert origin["data"] == {"path": "d.jsonl", "sha256": {"d.jsonl": sha256(Path("d.jsonl"))}}
    assert origin["versions"].keys() == {"python", "mlxtune", "mlx", "mlx_lm"}
    assert origin["machine"]["device"] in ("cpu", "metal", "cuda")


def test_training_first_and_the_rest_later(make: Make) -> None:
    early = pipeline.run(make(), Path("run"), stages=TRAIN_STAGES)
    assert not Path("run/report.json").exists()
    assert (early["base"], early["tuned"], early["fused"]) == ([], [], [])
    assert early["training"]["steps"] == 3
    adapter = sha256(Path("run/adapter/adapters.safetensors"))
    late = pipeline.run(make(), Path("run"))
    assert late["training"] == early["training"]
    assert sha256(Path("run/adapter/adapters.safetensors")) == adapter
    at_once = pipeline.run(make(), Path("other"))
    for column in ("base", "tuned", "fused"):
        assert late[column] == at_once[column] and len(late[column]) >= 3


def test_predictions_name_the_rows_of_the_run_whoever_made_them(make: Make) -> None:
    """The base is measured in the process that split the data, the tuned model in one that reads the split."""
    pipeline.run(make(), Path("run"), stages=("audit", "split", "convert", "evaluate base"))
    pipeline.run(make(), Path("run"))
    places = {
        column: [json.loads(line)["where"] for line in Path(f"run/eval/{column}.jsonl").read_text().splitlines()]
        for column in ("base", "tuned", "fused")
    }
    count = len(Path("run/data/test.jsonl").read_text().splitlines())
    assert places["base"] == [f"run/data/test.jsonl:{line}" for line in range(1, count + 1)]
    assert places["base"] == places["tuned"] == places["fused"]


def test_a_stop_during_training(make: Make) -> None:
    asked: list[int] = []

    def stop() -> int | None:
        asked.append(1)
        return signal.SIGTERM if len(asked) == 2 else None

    with pytest.raises(Interrupted) as caught:
        pipeline.run(make(), Path("run"), stop=stop)
    assert caught.value.exit_code == 143
    assert [path.name for path in Path("run/checkpoints").iterdir()] == ["step-0000002"]
    assert pipeline.run(make(), Path("run"))["training"]["resumed_at"] == 2


def test_rows_left_out_are_counted(make: Make) -> None:
    rows = Path("d.jsonl").read_text()
    Path("d.jsonl").write_text(rows + json.dumps({"prompt": "a " * 90, "completion": "b"}) + "\n")
    with pytest.raises(DataError, match=r"^d\.jsonl:25: has \d+ tokens, more than train\.max_seq_length 60 \(1 such"):
        pipeline.run(make(train__max_seq_length=60), Path("run"))
    assert not Path("run").exists()
    events: list[Event] = []
    wanted = make(train__max_seq_length=60, data__too_long="drop", data__test=0, data__valid=0)
    pipeline.run(wanted, Path("run"), stages=("audit", "split"), on_event=events.append)
    assert events[-1].detail == "train 25 (24 samples) · valid 0 · test 0; train: 1 too long, left out"
    assert len(Path("run/data/train.jsonl").read_text().splitlines()) == 25


def test_training_that_fails_keeps_its_folder(make: Make) -> None:
    bad = make(train__learning_rate=1e38, train__optimizer="sgd", train__max_grad_norm=None)
    with pytest.raises(TrainingError):
        pipeline.run(bad, Path("run"))
    left = {path.name for path in Path("run").iterdir()}
    assert {"recipe.yaml", "data", "origin.json", "eval"} <= left
    assert "adapter" not in left


def test_fusing_that_would_lose_too_much(make: Make) -> None:
    """The error names the command that mends it, and the run then goes on to its end."""
    wanted = make(quantize__bits=2, fuse__keep=1, train__iters=6)
    with pytest.raises(FuseError) as caught:
        pipeline.run(wanted, Path("run"))
    assert caught.value.exit_code == 1
    assert not Path("run/fused").exists()
    command = re.search(r"run `mlxtune (.*)`, then this again$", str(caught.value))
    assert command is not None
    with pytest.raises(SystemExit) as ended:
        main(shlex.split(command[1]))
    assert not ended.value.code
    report = pipeline.run(wanted, Path("run"))
    assert report["fuse"]["bits"] is None
    assert report["fused"][0]["value"] == pytest.approx(report["tuned"][0]["value"], rel=1e-4)


def test_a_folder_belongs_to_one_recipe(make: Make) -> None:
    pipeline.run(make(), Path("run"), stages=("audit", "split"))
    for other in (make(seed=1), make(lora__rank=4), make(evaluate__max_tokens=5)):
        with pytest.raises(OutputError, match="holds a run of another recipe"):
            pipeline.run(other, Path("run"))
    Path("file").write_text("")
    with pytest.raises(OutputError, match="^file: is a file"):
        pipeline.run(make(), Path("file"))


def test_a_folder_belongs_to_one_model(make: Make, tiny: Path) -> None:
    shutil.copytree(tiny, "m")
    pipeline.run(make(model="m"), Path("run"), stages=TRAIN_STAGES)
    config = json.loads(Path("m/config.json").read_text())
    Path("m/config.json").write_text(json.dumps(config | {"rope_theta": 20000.0}))
    with pytest.raises(OutputError, match="^run: holds a run of another model: m has changed since"):
        pipeline.run(make(model="m"), Path("run"))


def test_a_signal_after_the_last_update_still_stops(make: Make) -> None:
    """Too late for a checkpoint: the adapter is written, and what follows is left for the next run."""
    caught = signals.Signals()
    shown = stages._Shown(caught)

    def event(each: Event) -> None:
        if each.stage == "train" and each.kind == "progress" and each.done == each.total:
            caught.received = signal.SIGTERM
        shown.event(each)

    with pytest.raises(Interrupted, match="stopped after train; run it again to go on") as ended:
        pipeline.run(make(), Path("run"), on_event=event, stop=caught.stop)
    assert ended.value.exit_code == 143
    assert Path("run/adapter").is_dir()
    assert not Path("run/eval/tuned.json").exists()


def test_an_ignored_signal_stays_ignored() -> None:
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals.caught():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_label_pattern_that_misses_a_row_is_found_at_once(make: Make) -> None:
    with pytest.raises(DataError, match=r"d.jsonl:\d+: evaluate.label .* finds no label in its answer 'answer \d'"):
        pipeline.run(make(evaluate__label=r"(nothing)"), Path("run"))
    assert not Path("run").exists()


def test_nothing_else_of_a_folder_is_removed(make: Make) -> None:
    """A run that turns out wrong takes back what it made, not folders that were there."""
    Path("there/below").mkdir(parents=True)
    with pytest.raises(Exception, match="matches no layer"):
        pipeline.run(make(lora__targets=["wq"]), Path("there/below/new/run"))
    assert [str(path) for path in Path("there").rglob("*")] == ["there/below"]
    # a folder that finished a stage before is left as it is
    pipeline.run(make(), Path("run"), stages=("audit", "split"))
    Path("run/data/train.jsonl").write_text("{")
    with pytest.raises(DataError, match=r"^run/data/train\.jsonl:1: not valid JSON"):
        pipeline.run(make(), Path("run"))
    assert Path("run/data/test.jsonl").exists() and Path("run/recipe.yaml").exists()


def test_each_stage_shows_under_its_own_name() -> None:
    """Two stages may have as many steps as each other."""
    shown = stages._Shown(signals.Signals())
    for stage, done in (("split", 6), ("train", 6), ("fuse", 1), ("fuse", 2)):
        shown.event(Event(kind="progress", stage=stage, done=done, total=6))
        assert shown.bar is not None
        assert (shown.bar.label, shown.bar.done) == (stage, done)


def test_an_anchor_text_is_measured_at_each_validation(make: Make) -> None:
    Path("anchor.txt").write_text("The quick brown fox jumps over the lazy dog. " * 30)
    events: list[Event] = []
    report = pipeline.run(make(train__anchor="anchor.txt"), Path("run"), stages=TRAIN_STAGES, on_event=events.append)
    told = [event.detail for event in events if event.kind == "validated"]
    assert len(told) == 3 and all(re.search(r"validation loss [\d.]+, anchor [\d.]+  '", each) for each in told)
    assert report["training"]["first_anchor_loss"] > 0
    lines = [json.loads(line) for line in Path("run/log.jsonl").read_text().splitlines()]
    assert all(line["anchor_loss"] > 0 for line in lines)


@pytest.mark.parametrize(
    ("content", "line"),
    [(None, "a.txt: cannot be read: "), (b"\xff", "a.txt: is not UTF-8"), (b" \n", "a.txt: has no text")],
)
def test_a_wrong_anchor_is_found_first(make: Make, content: bytes | None, line: str) -> None:
    if content is not None:
        Path("a.txt").write_bytes(content)
    with pytest.raises(DataError) as caught:
        pipeline.run(make(train__anchor="a.txt"), Path("run"))
    assert str(caught.value).startswith(line)
    assert not Path("run").exists()


def test_a_wrong_option_of_the_optimizer_is_found_first(make: Make) -> None:
    with pytest.raises(RecipeError, match="adamw has no option 'foo'"):
        pipeline.run(make(train__optimizer_options={"foo": 1}, model="absent"), Path("run"))
    assert not Path("run").exists()


def test_the_losses_are_drawn(make: Make) -> None:
    pipeline.run(make(), Path("run"), stages=TRAIN_STAGES)
    drawn = ElementTree.fromstring(Path("run/loss.svg").read_text())
    assert drawn.tag == "{http://www.w3.org/2000/svg}svg"
    assert len([each for each in drawn.iter() if each.get("class") in ("train", "valid")]) >= 2


def test_data_from_stdin_is_refused_by_a_run(make: Make) -> None:
    with pytest.raises(InputError) as caught:
        pipeline.run(make(data__path="-"), Path("run"))
    assert str(caught.value) == "-: a run must find its data again; save it to a file first"
