import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from mlxtune.errors import InputError
from mlxtune.report.build import build, pages, write
from mlxtune.rundir import RunDir, read_json

PAGES = ("json", "md", "html")


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**read_json(path), **changes}), encoding="utf-8")


def predictions(run: RunDir, column: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run.predictions(column).read_text().splitlines()]


def put_predictions(run: RunDir, column: str, rows: list[dict[str, Any]]) -> None:
    run.predictions(column).write_text("".join(f"{json.dumps(each)}\n" for each in rows))


def test_a_finished_run_has_every_piece(run: RunDir) -> None:
    report = build(run)
    assert report["outcome"] == "better"
    assert report["verdict"] == (
        "Tuning took accuracy from 0 % to 91.7 % (95 % interval 84-96 %) on 96 held-out rows. "
        "The fused model kept 98.3 % of the gain in loss; its accuracy is 89.6 %."
    )
    for column in ("base", "tuned", "fused"):
        found = read_json(run.evaluation(column))
        assert (report[column], report["tables"][column]) == (found["scores"], found["tables"])
        assert report["cost"][column] == found["cost"]
    assert (report["comparison"], report["reasons"]) == (None, [])
    assert report["change"] == report["verdict"]
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
        ("eval/tuned.jsonl", "{}\n", "{path}:1: lacks `where`; *"),
        ("eval/tuned.jsonl", "{\n", "{path}:1: not valid JSON; *"),
        ("compare/compare.json", '{"rows": 3, "candidates": 4}', "{path}: `candidates` is not a list; *"),
        (
            "origin.json",
            '{"model": {"name": "x"}, "data": 1, "machine": 1, "versions": 1}',
            "{path}: lacks `model.path`; *",
        ),
        (
            "fused/fuse.json",
            '{"rows": 3, "layers": 2}',
            "{path}: lacks `kept`; it is damaged or from another program; remove it",
        ),
        ("data/audit.json", '{"rows": 3, "findings": [{}]}', "{path}: lacks `findings[0].kind`; *"),
        ("log.jsonl", '{"step": 1\n{"step": 2}\n', "{path}:1: not valid JSON; remove the line"),
    ],
)
def test_a_damaged_file_is_named_and_old_pages_stay(run: RunDir, name: str, content: str, line: str) -> None:
    write(run)
    before = {suffix: run.report(suffix).read_bytes() for suffix in PAGES}
    path = run.root / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(content)
    with pytest.raises(InputError) as caught:
        write(run)
    wanted = line.format(path=path)
    assert str(caught.value).startswith(wanted[:-1]) if wanted.endswith("*") else str(caught.value) == wanted
    assert {suffix: run.report(suffix).read_bytes() for suffix in PAGES} == before


def test_a_score_of_another_shape_is_refused(run: RunDir) -> None:
    edit(run.evaluation("base"), scores=[{"metric": "loss", "value": 1.0}])
    with pytest.raises(InputError, match=r"lacks `scores\[0\].unit`; it is damaged"):
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
    assert (samples["column"], samples["measure"]) == ("fused", "label")
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
    rows = predictions(run, "fused")[:20]
    put_predictions(run, "fused", [{**each, "right": index == 5} for index, each in enumerate(rows)])
    samples = build(run)["samples"]
    assert [each["right"] for each in samples["shown"]].count(True) == 1
    assert len(samples["shown"]) == 8
    assert (samples["rows"], samples["wrong"]) == (20, 19)


def test_without_labels_the_exact_text_says_what_is_right(run: RunDir) -> None:
    for column in ("base", "fused"):
        put_predictions(run, column, [{**each, "right": None} for each in predictions(run, column)])
    samples = build(run)["samples"]
    assert (samples["measure"], samples["wrong"], samples["newly_right"]) == ("exact match", 10, 86)
    assert [each["right"] for each in samples["shown"]].count(True) == 5


def test_plain_text_has_no_answers_to_show(run: RunDir) -> None:
    for column in ("base", "tuned", "fused"):
        nothing = {"answer": None, "expected": None, "exact": None, "right": None}
        put_predictions(run, column, [{**each, **nothing} for each in predictions(run, column)])
        found = read_json(run.evaluation(column))["scores"]
        scores = [each for each in found if each["metric"] in ("loss", "perplexity")]
        edit(run.evaluation(column), scores=scores, tables={})
    report = write(run)
    assert report["samples"] is None
    assert report["verdict"].startswith("Tuning took held-out loss from 2.672 to 0.249 nats per token (95 % interval")


def test_a_long_prompt_is_cut_in_its_middle(run: RunDir) -> None:
    row = predictions(run, "fused")[0]
    put_predictions(run, "fused", [{**row, "prompt": "start " + "x" * 9000 + " end?"}])
    shown = build(run)["samples"]["shown"][0]
    assert len(shown["prompt"]) == 600
    assert shown["prompt"].startswith("start x") and shown["prompt"].endswith("x end?")
    # asked something else, the base's answer is not set beside it
    assert shown["base"] is None
    write(run)


def test_the_comparison_has_the_word(compared: RunDir) -> None:
    found = read_json(compared.compare / "compare.json")
    report = build(compared)
    assert report["outcome"] == "better"
    assert report["verdict"] == found["verdict"]["sentence"] and report["reasons"] == found["verdict"]["reasons"]
    assert report["change"].startswith("Tuning took accuracy from 0 % to 91.7 %")
    assert [each["name"] for each in report["comparison"]["candidates"]] == ["base", "few_shot", "tuned"]
    assert len(report["comparison"]["flips"]["examples"]) == len(found["flips"]["examples"]) == 10


@pytest.mark.parametrize(
    ("decision", "outcome"),
    [("tune", "better"), ("prompt", "enough"), ("retrieve", "enough"), ("cannot_tell", "unclear"), ("<x>", "unclear")],
)
def test_each_decision_has_its_outcome(compared: RunDir, decision: str, outcome: str) -> None:
    path = compared.compare / "compare.json"
    edit(path, verdict={**read_json(path)["verdict"], "decision": decision})
    assert build(compared)["outcome"] == outcome


def test_intervals_that_overlap_do_not_contradict_a_comparison(compared: RunDir) -> None:
    shutil.copy(compared.evaluation("base"), compared.evaluation("tuned"))
    report = build(compared)
    assert report["change"] is None
    assert all("No clear difference" not in page for page in pages(report).values())


def test_a_recipe_that_compares_misses_a_comparison(run: RunDir) -> None:
    run.recipe.write_text(run.recipe.read_text() + "compare:\n  few_shot: 4\n")
    assert build(run)["missing"] == ["the comparison with prompts and retrieval (compare)"]
    run.recipe.write_text("model: tiny\ncompare: null\n")
    assert build(run)["missing"] == []


def test_every_file_has_its_hash_but_pages_and_cards(compared: RunDir) -> None:
    (compared.fused / "README.md").write_text("card")
    (compared.checkpoints / "step-1").mkdir(parents=True)
    (compared.checkpoints / "step-1" / "adapters.safetensors").write_text("x")
    write(compared)
    hashed = write(compared)["files"]
    wanted = {name for name in files_below(compared.root) if not name.startswith(("report.", "checkpoints/"))}
    assert hashed.keys() == wanted - {"fused/README.md"}
    for name, digest in hashed.items():
        assert digest == hashlib.sha256((compared.root / name).read_bytes()).hexdigest()


def test_old_files_without_tables_and_cost_still_have_a_page(run: RunDir) -> None:
    found = read_json(run.evaluation("fused"))
    run.evaluation("fused").write_text(json.dumps({name: found[name] for name in ("model", "n", "scores")}))
    report = write(run)
    assert (report["tables"]["fused"], report["cost"]["fused"]) == ({}, {})
