"""`verify` on a real small run with all that a comparison may hold: by its files, and by its models."""

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mlxtune import compare, evaluate, pipeline, recipe
from mlxtune.comparison import scoring
from mlxtune.errors import HubError
from mlxtune.report import build
from mlxtune.rundir import RunDir
from mlxtune.verification import models
from mlxtune.verify import verify
from tests.chat_server import Server, said
from tests.reported import told

LABELS = ("card", "refund", "parcel")
WORDS = "blue lamp shop desk week name road tree hand door year note bird song line rain".split()  # noqa: SIM905
NAMES = ["base", "prompt", "few_shot", "retrieval", "tuned", "fused", "endpoint"]


def rows(count: int, seed: int) -> str:
    draw = random.Random(seed)
    values = [
        {"prompt": f"my {LABELS[row % 3]} {' '.join(draw.sample(WORDS, 6))}", "completion": LABELS[row % 3]}
        for row in range(count)
    ]
    return "".join(json.dumps(each) + "\n" for each in values)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a comparison that asked a server, which is gone, and a model as judge; nobody changes it."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "data").mkdir()
    for name, count in (("train", 36), ("valid", 6), ("test", 12)):
        (folder / "data" / f"{name}.jsonl").write_text(rows(count, count))
    (folder / "anchor.txt").write_text("Once upon a time there was a lamp in a shop. " * 30)
    (folder / "questions.jsonl").write_text(
        "".join(json.dumps({"question": f"{n}?", "choices": ["one", "two"], "answer": n % 2}) + "\n" for n in range(6))
    )
    settings: dict[str, Any] = {
        "model": "tiny",
        "data": {"path": str(folder / "data")},
        "train": {"iters": 12, "batch_size": 8, "learning_rate": 5e-3, "show_answer": False},
        "evaluate": {"max_tokens": 6},
        "compare": None,
    }
    made = recipe.build(settings, where="test")
    run = RunDir(folder / "run")
    pipeline.run(made, run.root)
    server = Server(lambda number, body: (200, said("parcel", prompt_tokens=9), {}))
    wanted = recipe.CompareRecipe(
        few_shot=1,
        passages=1,
        anchor=str(folder / "anchor.txt"),
        choices=str(folder / "questions.jsonl"),
        endpoint=server.url,
        endpoint_model="m",
        judge="tiny",
    )
    try:
        value = compare.compare(run, replace(made, compare=wanted), since=run)
    finally:
        server.close()
    assert [each["name"] for each in value["candidates"]] == NAMES
    pipeline.reported(run)
    return run.root


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> RunDir:
    """A copy of the run, to be spoiled."""
    return RunDir(Path(shutil.copytree(finished, tmp_path / "run")))


def test_its_files_tell_all_that_the_report_shows(finished: Path) -> None:
    shown: list[tuple[str, int, int]] = []
    found = verify(RunDir(finished), on_progress=lambda *progress: shown.append(progress))
    assert (found.differences, found.unchecked) == ([], [])
    assert found.predictions == 12 * (3 + len(NAMES))
    assert shown[0] == ("report", 0, 1)
    assert {what for what, _, _ in shown[1:]} == {"predictions, kB", "near rows"}
    done = [done for what, done, _ in shown[1:] if what != "near rows"]
    assert done == sorted(done) and done[-1] == shown[-1][2]


def test_its_models_give_the_same_again_each_asked_once(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def counting(*args: Any, **kwargs: Any) -> evaluate.Evaluation:
        asked.append(1)
        return evaluate.evaluate(*args, **kwargs)

    monkeypatch.setattr(scoring, "evaluate", counting)
    monkeypatch.setattr(models, "evaluate", counting)
    figures = verify(RunDir(finished)).figures
    found = verify(RunDir(finished), full=True)
    assert found.differences == []
    assert found.unchecked == [f"compare/compare.json {name} by the models" for name in ("endpoint", "judged")]
    assert found.figures > figures + 400
    assert len(asked) == len(NAMES) - 1


def zero(weights: Path, some: Callable[[str], bool]) -> None:
    """Puts zeros in place of some tensors of a safetensors file, whose size stays."""
    content = bytearray(weights.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    chosen = [each["data_offsets"] for name, each in header.items() if name != "__metadata__" and some(name)]
    assert chosen
    for low, high in chosen:
        content[start + low : start + high] = bytes(high - low)
    weights.write_bytes(content)


def test_another_adapter_is_named_by_what_it_gives(run: RunDir) -> None:
    zero(run.adapter / "adapters.safetensors", lambda name: name.endswith("lora_b"))
    build.write(run)  # the hashes are those of the new weights
    assert verify(run).differences == []
    found = verify(run, full=True)
    keys = {key for file, key in told(found) if file == "compare/compare.json"}
    assert ("eval/tuned.json", "by the models: scores.loss.value") in told(found)
    assert {f"by the models: {key}" for key in ("tuned.scores.loss.value", "forgetting.tuned_loss")} <= keys
    assert "by the models: forgetting.kl" in keys
    assert not any("base." in key or "fused." in key or "base_loss" in key for _, key in told(found))


def test_a_run_without_a_comparison(run: RunDir) -> None:
    shutil.rmtree(run.compare)
    zero(run.fused / "model.safetensors", lambda name: name == "model.norm.weight")
    build.write(run)
    found = verify(run, full=True)
    assert {file for file, _ in told(found)} == {"eval/fused.json"}
    assert ("eval/fused.json", "by the models: scores.loss.value") in told(found)


def test_an_anchor_that_is_gone_is_told_and_hides_nothing_else(run: RunDir) -> None:
    path = run.compare / "compare.json"
    value = json.loads(path.read_text())
    value["settings"]["anchor"] = value["forgetting"]["anchor"] = "absent.txt"
    path.write_text(json.dumps(value))
    zero(run.fused / "model.safetensors", lambda name: name == "model.norm.weight")
    build.write(run)
    assert verify(run).differences == []
    found = verify(run, full=True)
    assert ("eval/fused.json", "by the models: scores.loss.value") in told(found)
    assert [each.found for each in found.differences if each.key == "content"] == ["absent.txt: no such file or folder"]


def test_what_was_found_is_told_when_a_model_cannot_be_had(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_: Any) -> None:
        raise HubError("cannot be reached", where="someone/model")

    monkeypatch.setattr(models, "check", absent)
    with pytest.raises(HubError):
        verify(run, full=True)
    path = run.evaluation("tuned")
    path.write_text(path.read_text() + " ")
    found = verify(run, full=True)
    assert told(found) == {("eval/tuned.json", "sha256")}
    assert found.unchecked == ["the models (someone/model: cannot be reached)"]


def test_the_candidates_and_those_left_out_are_held_too(run: RunDir) -> None:
    path = run.compare / "compare.json"
    value = json.loads(path.read_text())
    value["left_out"] = {"retrieval": "no reason"}
    value["candidates"][0]["description"] = "another"
    path.write_text(json.dumps(value))
    build.write(run)
    assert {key for _, key in told(verify(run, full=True))} == {
        "by the models: left_out.retrieval", "by the models: left_out", "by the models: base.description",
    }  # fmt: skip
