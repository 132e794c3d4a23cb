import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from mlxtune.cli import main
from mlxtune.cli.report import command, show
from mlxtune.metrics.accuracy import accuracy
from mlxtune.metrics.loss import loss
from mlxtune.report.build import build
from mlxtune.rundir import RunDir, write_json, write_text

TABLE = """\
                              base                tuned                fused
held-out loss  2.000 (2.000-2.000)  0.500 (0.500-0.500)  0.500 (0.500-0.500)
accuracy               10 % (3-30)         90 % (70-97)         90 % (70-97)
size on disk                     -                    -               3.0 kB
"""


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run with what the short table shows, and no more."""
    run = RunDir(tmp_path / "my run")
    write_text(run.recipe, "model: tiny\n")
    for column, right, nats in (("base", 2, 2.0), ("tuned", 18, 0.5), ("fused", 18, 0.5)):
        answers = ["a"] * right + ["b"] * (20 - right)
        scores = [loss([nats] * 20, [1] * 20), accuracy(answers, ["a"] * 20, "(.)")]
        value = {"model": "m", "adapter": None, "n": 20, "scores": [each.to_dict() for each in scores]}
        write_json(run.evaluation(column), {**value, "predictions": [], "seconds": 1.0})
    write_text(run.fused / "model.safetensors", "x" * 3000)
    return run


def test_report_prints_the_table_the_verdict_and_what_to_type(run: RunDir) -> None:
    done = CliRunner().invoke(command, [str(run.root)])
    assert done.exit_code == 0 and done.stderr == ""
    assert done.stdout == TABLE + (
        "\n"
        "Tuning took accuracy from 10 % to 90 % (95 % interval 70-97 %) on 20 held-out rows.\n"
        "missing: where the model and the data come from (origin.json)\n"
        "missing: the data's audit (data/audit.json)\n"
        "missing: the training log (log.jsonl)\n"
        "missing: the trained adapter (adapter)\n"
        "\n"
        f"report  {run.root}/report.html\n"
        f"chat    mlxtune chat --model '{run.root}/fused'\n"
    )
    assert {path.name for path in run.root.iterdir() if path.is_file()} == {
        "recipe.yaml",
        "report.html",
        "report.json",
        "report.md",
    }


def test_report_prints_json(run: RunDir) -> None:
    done = CliRunner().invoke(command, [str(run.root), "--json"])
    assert done.exit_code == 0 and done.stdout.count("\n") == 1
    assert json.loads(done.stdout) == build(run) == json.loads(run.report("json").read_text())


def test_show_prints_only(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    show(build(run))
    assert capsys.readouterr().out.startswith(TABLE)
    assert not run.report("html").exists()


def test_show_falls_back_to_exact_match_and_then_to_the_loss(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    report = build(run)
    for column in ("base", "tuned", "fused"):
        report[column][1]["metric"] = "exact_match"
    show(report)
    assert capsys.readouterr().out.split("\n")[2].startswith("exact match ")
    for column in ("base", "tuned", "fused"):
        report[column] = report[column][:1]
    show(report)
    assert capsys.readouterr().out.split("\n")[2].startswith("size on disk")


def test_a_folder_without_a_run_is_one_line_and_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["report", str(tmp_path)])
    captured = capsys.readouterr()
    assert (ended.value.code, captured.out) == (2, "")
    assert captured.err == f"error: {tmp_path}: holds no run; give a folder that `mlxtune run` wrote\n"
    assert list(tmp_path.iterdir()) == []


def test_help_has_an_example() -> None:
    done = CliRunner().invoke(command, ["--help"])
    assert done.exit_code == 0
    assert "  mlxtune report runs/quickstart\n" in done.stdout
