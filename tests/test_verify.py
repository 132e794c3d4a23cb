import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlxtune.errors import InputError
from mlxtune.report import build
from mlxtune.rundir import RunDir, read_json
from mlxtune.verification.figures import leaves
from mlxtune.verify import verify
from tests import reported
from tests.reported import told


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a comparison and its report."""
    made = reported.make_run(tmp_path_factory.mktemp("finished"))
    reported.add_comparison(made)
    build.write(made)
    return made.root


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> RunDir:
    """A copy of the finished run, to be spoiled."""
    return RunDir(Path(shutil.copytree(finished, tmp_path / "tickets")))


def edit(path: Path, change: Callable[[Any], None]) -> None:
    """Changes a JSON value in its file."""
    value = read_json(path)
    change(value)
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def edit_line(path: Path, number: int, **changes: Any) -> None:
    lines = path.read_text().splitlines()
    lines[number] = json.dumps({**json.loads(lines[number]), **changes})
    path.write_text("\n".join(lines) + "\n")


def score(evaluation: dict[str, Any], metric: str) -> dict[str, Any]:
    found: dict[str, Any] = next(each for each in evaluation["scores"] if each["metric"] == metric)
    return found


def test_an_untouched_run_is_as_stated_wherever_it_was_moved_to(run: RunDir) -> None:
    found = verify(run)
    # the learning curve is one without the predictions that it comes from
    assert (found.differences, found.unchecked) == ([], ["compare/compare.json learning_curve"])
    assert found.predictions == 96 * 6
    assert found.files == len(read_json(run.report("json"))["files"]) + 2
    assert found.figures > 500


@pytest.mark.parametrize(
    ("metric", "end"),
    [
        ("loss", "value"),
        ("perplexity", "ci_low"),
        ("exact_match", "ci_high"),
        ("accuracy", "value"),
        ("macro_f1", "ci_low"),
        ("ece", "value"),
    ],
)
def test_a_figure_altered_in_an_evaluation_is_named(run: RunDir, metric: str, end: str) -> None:
    edit(run.evaluation("tuned"), lambda value: score(value, metric).update({end: score(value, metric)[end] + 1e-6}))
    found = told(verify(run))
    assert {("eval/tuned.json", f"scores.{metric}.{end}"), ("eval/tuned.json", "sha256")} <= found
    assert ("report.json", f"tuned.{metric}.{end}") in found


@pytest.mark.parametrize(
    ("table", "change"),
    [
        ("classes", lambda each: each[1].update(recall=each[1]["recall"] - 0.01)),
        ("confusion", lambda each: each["counts"][0].__setitem__(0, 23)),
        ("calibration", lambda each: each["bins"][0].update(accuracy=0.5)),
        ("coverage", lambda each: each.update(coverage=0.99)),
    ],
)
def test_a_figure_altered_in_a_table_is_named(run: RunDir, table: str, change: Callable[[Any], None]) -> None:
    edit(run.evaluation("fused"), lambda value: change(value["tables"][table]))
    found = told(verify(run))
    assert any(file == "eval/fused.json" and key.startswith(f"tables.{table}") for file, key in found)


def test_a_figure_altered_in_the_report_alone_is_named(run: RunDir) -> None:
    edit(run.report("json"), lambda value: value["fused"][0].update(value=0.1))
    found = verify(run)
    assert [(each.file, each.key, each.stated) for each in found.differences] == [
        ("report.json", "fused.loss.value", "0.1")
    ]
    assert found.differences[0].found.startswith("0.28")


@pytest.mark.parametrize("key", ["outcome", "verdict", "change"])
def test_a_sentence_altered_in_the_report_is_named(run: RunDir, key: str) -> None:
    edit(run.report("json"), lambda value: value.update({key: "It is wonderful."}))
    assert told(verify(run)) == {("report.json", key)}


def test_a_missing_and_an_added_key_of_the_report_are_named(run: RunDir) -> None:
    edit(run.report("json"), lambda value: (value["training"].pop("steps"), value["training"].update(more=1)))
    differences = {(each.key, each.stated, each.found) for each in verify(run).differences}
    assert differences == {("training.steps", "nothing", "300"), ("training.more", "1", "nothing")}


def test_an_altered_prediction_is_named(run: RunDir) -> None:
    edit_line(run.predictions("tuned"), 0, answer="queue: billing", right=True, exact=True, label="billing")
    found = told(verify(run))
    assert ("eval/tuned.jsonl", "sha256") in found
    assert ("eval/tuned.json", "scores.accuracy.value") in found
    assert ("eval/tuned.json", "scores.exact_match.value") in found
    assert ("eval/tuned.json", "tables.classes[0].precision") in found


def test_an_answer_altered_without_its_marks_is_named(run: RunDir) -> None:
    edit_line(run.predictions("base"), 50, answer="queue: outage")  # what is expected there
    found = told(verify(run))
    assert ("eval/base.json", "scores.exact_match.value") in found
    assert {("eval/base.jsonl:51", key) for key in ("exact", "label", "right")} <= found


def test_a_prediction_left_out_is_named(run: RunDir) -> None:
    lines = run.predictions("fused").read_text().splitlines()
    run.predictions("fused").write_text("\n".join(lines[:-1]) + "\n")
    found = verify(run)
    assert ("eval/fused.json", "n", "96", "95") in {(d.file, d.key, d.stated, d.found) for d in found.differences}


@pytest.mark.parametrize("name", ["adapter/adapters.safetensors", "fused/model.safetensors"])
def test_one_altered_byte_of_the_weights_is_named(run: RunDir, name: str) -> None:
    with (run.root / name).open("r+b") as weights:
        weights.seek(1000)
        weights.write(b"z")
    assert told(verify(run)) == {(name, "sha256")}


@pytest.mark.parametrize("suffix", ["html", "md"])
def test_an_edited_page_is_named_with_its_line(run: RunDir, suffix: str) -> None:
    page = run.report(suffix)
    text = page.read_text()
    page.write_text(text.replace("91.7", "99.7", 1))
    line = text[: text.index("91.7")].count("\n") + 1
    (found,) = verify(run).differences
    assert (found.file, found.key) == (f"report.{suffix}", f"line {line}")
    assert "99.7" in found.stated and "91.7" in found.found


def test_a_figure_altered_in_the_comparison_is_named(run: RunDir) -> None:
    path = run.compare / "compare.json"

    def change(value: Any) -> None:
        value["candidates"][1]["scores"][3]["value"] += 0.1
        value["candidates"][2]["difference"]["p_adjusted"] = 0.5
        value["flips"]["fixed"] += 1
        value["verdict"]["decision"] = "prompt"

    edit(path, change)
    keys = {key for file, key in told(verify(run)) if file == "compare/compare.json"}
    wanted = {"few_shot.scores.accuracy.value", "tuned.difference.p_adjusted", "flips.fixed"}
    assert wanted | {"sha256"} <= keys
    assert any(key.startswith("verdict.") for key in keys)


def test_an_altered_prediction_of_a_candidate_is_named(run: RunDir) -> None:
    edit_line(run.compare / "few_shot.jsonl", 1, right=True)
    found = told(verify(run))
    assert ("compare/few_shot.jsonl", "sha256") in found
    assert ("compare/compare.json", "few_shot.scores.accuracy.value") in found


def test_files_that_came_or_went_are_named(run: RunDir) -> None:
    (run.data / "valid.jsonl").unlink()
    (run.root / "base").mkdir()
    (run.root / "base" / "model.safetensors").write_bytes(b"x")
    found = {(each.file, each.stated == "nothing", each.found == "nothing") for each in verify(run).differences}
    assert {("data/valid.jsonl", False, True), ("base/model.safetensors", True, False)} <= found


def test_a_file_that_cannot_be_read_is_a_difference(run: RunDir) -> None:
    run.evaluation("tuned").write_text("{")
    assert {("eval/tuned.json", "sha256"), ("eval/tuned.json:1", "content")} == told(verify(run))


def test_one_unreadable_file_does_not_hide_what_else_differs(run: RunDir) -> None:
    run.predictions("tuned").write_text("{\n")
    edit_line(run.compare / "tuned.jsonl", 5, answer="something else")
    found = told(verify(run))
    assert {("eval/tuned.jsonl:1", "content"), ("compare/compare.json", "tuned.scores.exact_match.value")} <= found


@pytest.mark.parametrize(
    ("changes", "told_of"),
    [
        ({"loss": 10**400}, "`loss` is not a number"),
        ({"tokens": 10**30}, "`tokens` is not int"),
        ({"loss": 1e308}, "the loss of row 1 of the scored rows is inf"),
        ({"tokens_right": 99}, "row 1 of the scored rows has 99 of 5 tokens right"),
        ({"label_probability": 1.5}, "the probability of row 1 of the scored rows is 1.5"),
    ],
)
def test_a_prediction_that_can_be_none_is_named(run: RunDir, changes: dict[str, Any], told_of: str) -> None:
    edit_line(run.predictions("fused"), 0, **changes)
    found = {(each.file.partition(":")[0], each.found) for each in verify(run).differences}
    assert ("eval/fused.jsonl", told_of) in found


@pytest.mark.parametrize("spoil", [lambda file: file.symlink_to("nowhere"), lambda file: file.mkdir()])
def test_weights_that_are_no_file_are_named(run: RunDir, spoil: Callable[[Path], None]) -> None:
    file = run.adapter / "adapters.safetensors"
    file.unlink()
    spoil(file)
    found = {(each.file, each.key, each.found) for each in verify(run).differences}
    assert {("adapter/adapters.safetensors", "sha256", "nothing"), ("report.json", "sizes_bytes.adapter", "0")} <= found


def test_a_path_in_the_report_that_is_none_is_a_difference(run: RunDir) -> None:
    edit(run.report("json"), lambda report: report["paths"].update(run=5))
    assert {each.file for each in verify(run).differences} == {"report.md", "report.html"}


@pytest.mark.parametrize("key", ["prompt_tokens", "answer_tokens"])
def test_tokens_of_a_row_are_counted_again(run: RunDir, key: str) -> None:
    edit(run.evaluation("tuned"), lambda found: found["cost"].update({key: 1.0}))
    edit(run.compare / "compare.json", lambda found: found["candidates"][1]["cost"].update({key: 1.0}))
    expected = {("eval/tuned.json", f"cost.{key}"), ("compare/compare.json", f"few_shot.cost.{key}")}
    assert expected <= told(verify(run))


def test_a_page_that_was_cut_off_is_told_from_where(run: RunDir) -> None:
    page = run.report("md")
    text = page.read_text()
    page.write_text(text[: text.index("Compared on") + len("Compared on")])
    (found,) = (each for each in verify(run).differences if each.file == "report.md")
    assert found.stated != found.found and found.found.endswith("the same 96 rows")


def test_nothing_is_written(run: RunDir) -> None:
    def content() -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in run.root.rglob("*") if path.is_file()}

    before = content()
    verify(run)
    assert content() == before


@pytest.mark.parametrize("text", ["{}", "[]", '{"files": 3}'])
def test_another_kind_of_report_is_refused(run: RunDir, text: str) -> None:
    run.report("json").write_text(text)
    with pytest.raises(InputError, match="is no report of this version; write it again with `mlxtune report`"):
        verify(run)


def test_a_run_without_a_report_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=re.escape(f"{tmp_path}: has no report; write one with `mlxtune report`")):
        verify(RunDir(tmp_path))


def test_leaves_name_each_place() -> None:
    named = {"metric": "loss", "value": 1.5, "better": "lower"}
    found = dict(leaves({"a": [1, {"b": None}], "scores": [named], "empty": {}, "none": []}))
    assert found == {
        "a[0]": 1,
        "a[1].b": None,
        "scores.loss.metric": "loss",
        "scores.loss.value": 1.5,
        "scores.loss.better": "lower",
        "empty": "{}",
        "none": "[]",
    }
