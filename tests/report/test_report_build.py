import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from mlxtune.errors import InputError
from mlxtune.evaluate import Evaluation, Prediction
from mlxtune.report.build import build, write
from mlxtune.report.score import Score
from mlxtune.rundir import RunDir, read_json

PAGES = ("json", "md", "html")


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**read_json(path), **changes}), encoding="utf-8")


def test_a_finished_run_has_every_piece(run: RunDir) -> None:
    report = build(run)
    assert report["outcome"] == "better"
    assert report["verdict"] == (
        "Tuning took accuracy from 0 % to 91.7 % (95 % interval 84-96 %) on 96 held-out rows. "
        "The fused model kept 98.3 % of the gain in loss; its accuracy is 89.6 %."
    )
    for column in ("base", "tuned", "fused"):
        assert report[column] == read_json(run.evaluation(column))["scores"]
    assert report["training"] == read_json(run.adapter / "training.json")
    assert report["fuse"] == read_json(run.fused / "fuse.json")
    assert report["origin"] == read_json(run.origin)
    assert report["recipe_text"] == run.recipe.read_text()
    assert report["missing"] == []
    assert report["rows"] == {"train": 768, "valid": 96, "test": 96}
    assert report["audit"]["rows"] == 960
    assert report["audit"]["findings"] == {"duplicate": 12, "email_address": 3}
    assert [each["kind"] for each in report["audit"]["details"]] == ["duplicate", "email_address"]
    # the fused folder's tokenizer (9 kB) is no weight
    assert report["sizes_bytes"] == {"base": 5_500_000, "quantized": None, "adapter": 330_000, "fused": 5_500_000}
    assert report["paths"] == {
        "run": str(run.root),
        "report": str(run.root / "report.html"),
        "model": "models/tiny",
        "base": None,
        "adapter": str(run.root / "adapter"),
        "fused": str(run.root / "fused"),
    }


def test_write_adds_three_files_and_gives_the_same_ones_again(run: RunDir) -> None:
    before = files_below(run.root)
    report = write(run)
    after = files_below(run.root)
    assert after.keys() - before.keys() == {"report.json", "report.md", "report.html"}
    assert {name: after[name] for name in before} == before
    assert json.loads(after["report.json"]) == report
    assert write(run) == report
    assert files_below(run.root) == after


def test_a_quantized_base_has_its_own_size(run: RunDir) -> None:
    run.base.mkdir()
    (run.base / "model.safetensors").write_bytes(b"q" * 1500)
    (run.base / "tokenizer.json").write_bytes(b"t" * 70)
    report = build(run)
    assert report["sizes_bytes"]["quantized"] == 1500
    assert report["paths"]["base"] == str(run.base)


def test_a_run_that_stopped_before_training_says_what_is_missing(run: RunDir) -> None:
    for folder in (run.adapter, run.fused):
        shutil.rmtree(folder)
    for path in (run.log, run.evaluation("tuned"), run.evaluation("fused")):
        path.unlink()
    report = write(run)
    assert (report["outcome"], report["training"], report["fuse"], report["samples"]) == ("unknown", None, None, None)
    assert (report["tuned"], report["fused"], report["curve"]) == ([], [], [])
    assert report["sizes_bytes"] == {"base": 5_500_000, "quantized": None, "adapter": None, "fused": None}
    assert report["missing"] == [
        "the training log (log.jsonl)",
        "the trained adapter (adapter)",
        "the fused model (fused)",
        "the evaluation of the tuned model (eval/tuned.json)",
        "the evaluation of the fused model (eval/fused.json)",
    ]
    for suffix in PAGES:
        assert "eval/tuned.json" in run.report(suffix).read_text()


def test_a_run_with_only_its_recipe_is_a_run(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.recipe.write_text("model: tiny\n")
    report = write(run)
    assert report["origin"] is None and report["audit"] is None
    assert report["rows"] == {"train": None, "valid": None, "test": None}
    assert len(report["missing"]) == 8
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "recipe.yaml",
        "report.html",
        "report.json",
        "report.md",
    ]


def test_a_run_that_was_not_fused_shows_the_tuned_answers(run: RunDir) -> None:
    shutil.rmtree(run.fused)
    run.evaluation("fused").unlink()
    report = build(run)
    assert report["samples"]["column"] == "tuned"
    assert report["samples"]["wrong"] == 8
    assert report["outcome"] == "better"
    assert "fused" not in report["verdict"]


@pytest.mark.parametrize("kind", ["empty", "missing", "file", "model"])
def test_a_folder_that_holds_no_run_is_refused_and_left_alone(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "given"
    if kind == "file":
        folder.write_text("x")
    elif kind != "missing":
        folder.mkdir()
    if kind == "model":
        (folder / "config.json").write_text("{}")
    before = files_below(tmp_path)
    with pytest.raises(InputError) as caught:
        write(RunDir(folder))
    assert str(caught.value) == f"{folder}: holds no run; give a folder that `mlxtune run` wrote"
    assert files_below(tmp_path) == before


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("adapter/training.json", "{", "{path}:1: not valid JSON: Expecting property name enclosed in double quotes"),
        ("adapter/training.json", "[]", "{path}: lacks `steps`; it is damaged or from another program; remove it"),
        ("eval/tuned.json", "{}", "{path}: lacks `model`; it is damaged or from another program; remove it"),
        ("origin.json", '{"model": {"name": "x"}, "data": 1, "machine": 1, "versions": 1}', "{path}: lacks `path`; *"),
        ("fused/fuse.json", '{"rows": 3}', "{path}: lacks `kept`; it is damaged or from another program; remove it"),
        ("data/audit.json", '{"rows": 3, "findings": [{}]}', "{path}: lacks `kind`; *"),
        ("log.jsonl", '{"step": 1\n{"step": 2}\n', "{path}:1: not valid JSON; remove the line"),
    ],
)
def test_a_damaged_file_is_named_and_old_pages_stay(run: RunDir, name: str, content: str, line: str) -> None:
    write(run)
    before = {suffix: run.report(suffix).read_bytes() for suffix in PAGES}
    path = run.root / name
    path.write_text(content)
    with pytest.raises(InputError) as caught:
        write(run)
    wanted = line.format(path=path)
    assert str(caught.value).startswith(wanted[:-1]) if wanted.endswith("*") else str(caught.value) == wanted
    assert {suffix: run.report(suffix).read_bytes() for suffix in PAGES} == before


def test_a_score_of_another_shape_is_refused(run: RunDir) -> None:
    edit(run.evaluation("base"), scores=[{"metric": "loss", "value": 1.0}])
    with pytest.raises(InputError, match="has a score of another shape; remove it and evaluate again"):
        build(run)


def test_the_curve_starts_before_training_and_bridges_a_cut_line(run: RunDir) -> None:
    run.log.write_text(
        '{"step": 10, "train_loss": 2.5, "valid_loss": null, "learning_rate": 0.1}\n'
        '{"step": 20, "train_loss": NaN, "valid_loss": 1.5, "learning_rate": 0.1}\n'
        '{"step": 30, "trai'
    )
    assert build(run)["curve"] == [
        {"step": 0, "train_loss": None, "valid_loss": 2.71},
        {"step": 10, "train_loss": 2.5, "valid_loss": None},
        {"step": 20, "train_loss": None, "valid_loss": 1.5},
    ]
    write(run)


def test_a_long_log_is_thinned_but_keeps_each_validation_and_the_end(run: RunDir) -> None:
    lines = [
        {"step": step, "train_loss": 1.0, "valid_loss": 1.0 if step in (7, 1234) else None} for step in range(1, 5001)
    ]
    run.log.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    steps = [each["step"] for each in build(run)["curve"]]
    assert len(steps) == 503  # 500, the two validations, and step 0
    assert {0, 7, 1234, 5000} <= set(steps)


def test_samples_are_taken_evenly_from_wrong_and_right_rows(run: RunDir) -> None:
    samples = build(run)["samples"]
    assert (samples["column"], samples["measure"]) == ("fused", "exact match")
    assert (samples["rows"], samples["wrong"], samples["newly_right"], samples["newly_wrong"]) == (96, 10, 86, 0)
    shown = [(int(each["where"].split(":")[1]) - 1, each["right"]) for each in samples["shown"]]
    # wrong are 0, 10, ..., 90: of the ten the 1st, 4th and 7th; right are the 86 others: each 17.2th of them
    assert shown == [(0, False), (1, True), (19, True), (30, False), (38, True), (57, True), (60, False), (76, True)]
    assert samples["shown"][1] == {
        "where": "data/test.jsonl:2",
        "prompt": "Ticket: The link to reset my password leads to an empty page. My login is user1001.\nQueue:",
        "expected": "queue: access",
        "base": "The <script>alert(1)</script> customer␛[31m says",
        "answer": "queue: access",
        "base_right": False,
        "right": True,
    }


def test_samples_fill_up_with_wrong_rows_where_few_are_right(run: RunDir) -> None:
    found = read_json(run.evaluation("fused"))
    rows = found["predictions"][:20]
    for index, each in enumerate(rows):
        each["exact"] = index == 5
    edit(run.evaluation("fused"), predictions=rows)
    samples = build(run)["samples"]
    assert [each["right"] for each in samples["shown"]].count(True) == 1
    assert len(samples["shown"]) == 8
    assert (samples["rows"], samples["wrong"]) == (20, 19)


def test_rows_whose_labels_were_compared_are_marked_by_them(run: RunDir) -> None:
    for column in ("base", "fused"):
        rows = read_json(run.evaluation(column))["predictions"]
        edit(run.evaluation(column), predictions=[{**each, "right": True} for each in rows])
    samples = build(run)["samples"]
    assert (samples["measure"], samples["wrong"], samples["newly_right"]) == ("label", 0, 0)
    assert all(each["right"] for each in samples["shown"])


def test_plain_text_has_no_answers_to_show(run: RunDir) -> None:
    for column in ("base", "tuned", "fused"):
        found = read_json(run.evaluation(column))
        rows = [{**each, "answer": None, "expected": None, "exact": None} for each in found["predictions"]]
        scores = [each for each in found["scores"] if each["metric"] in ("loss", "perplexity")]
        edit(run.evaluation(column), predictions=rows, scores=scores)
    report = write(run)
    assert report["samples"] is None
    assert report["verdict"].startswith("Tuning took held-out loss from 2.672 to 0.249 nats per token (95 % interval")


def test_a_long_prompt_is_cut_in_its_middle(run: RunDir) -> None:
    rows = read_json(run.evaluation("fused"))["predictions"]
    edit(run.evaluation("fused"), predictions=[{**rows[0], "prompt": "start " + "x" * 9000 + " end?"}])
    prompt = build(run)["samples"]["shown"][0]["prompt"]
    assert len(prompt) == 600
    assert prompt.startswith("start x") and prompt.endswith("x end?")
    # asked something else, the base's answer is not set beside it
    assert build(run)["samples"]["shown"][0]["base"] is None
    write(run)


def test_without_labels_the_exact_text_says_what_is_right(run: RunDir) -> None:
    """The evaluation's own shape: `right` is always there, and None where no label was compared."""
    found = {column: read_json(run.evaluation(column)) for column in ("base", "fused")}
    for column, each in found.items():
        made = Evaluation(
            model="models/tiny",
            adapter=None,
            n=each["n"],
            seconds=1.0,
            scores=[Score(**score) for score in each["scores"]],
            predictions=[Prediction(**row, right=None) for row in each["predictions"]],
        )
        run.evaluation(column).write_text(json.dumps(made.to_dict()), encoding="utf-8")
    samples = build(run)["samples"]
    assert (samples["measure"], samples["wrong"], samples["newly_right"]) == ("exact match", 10, 86)
    assert [each["right"] for each in samples["shown"]].count(True) == 5
