import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from mlxtune.cli import main
from mlxtune.cli.report import command, show
from mlxtune.metrics.intervals import share
from mlxtune.metrics.loss import loss
from mlxtune.report.build import build
from mlxtune.rundir import RunDir, write_json, write_text
from tests import reported

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
        scores = [loss([nats] * 20, [1] * 20), share("accuracy", right, 20)]
        value = {"model": "m", "adapter": None, "n": 20, "scores": [each.to_dict() for each in scores]}
        write_json(run.evaluation(column), {**value, "tables": {}, "cost": {}, "seconds": 1.0})
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


def test_a_comparison_is_shown_with_its_reasons(tmp_path: Path) -> None:
    made = reported.make_run(tmp_path)
    reported.add_comparison(made)
    done = CliRunner().invoke(command, [str(made.root)])
    assert done.exit_code == 0
    lines = done.stdout.split("\n")
    assert lines[5].split() == (
        ["accuracy", "difference", "p", "prompt", "tokens", "answer", "tokens", "time", "a", "row", "memory", "size"]
    )
    assert lines[7].split()[:7] == ["few", "shot", "50", "%", "(40-60)", "-", "-"]
    assert lines[10].startswith("Tuning is worth it on 96 held-out rows")
    assert lines[11].startswith("  p ") and lines[11].endswith("below 0.05")


def test_open_opens_the_page_and_says_if_it_cannot(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", lambda address: opened.append(address) is None)
    done = CliRunner().invoke(command, [str(run.root), "--open"])
    assert (done.exit_code, done.stderr, opened) == (0, "", [run.report("html").resolve().as_uri()])
    monkeypatch.setattr("webbrowser.open", lambda address: False)
    assert CliRunner().invoke(command, [str(run.root), "--open"]).stderr == "warning: no browser could be opened\n"


def test_two_runs_are_shown_side_by_side_and_nothing_is_written(
    tmp_path: Path, listing: Callable[[Path], dict[str, str]]
) -> None:
    first, second = (reported.make_run(tmp_path / name) for name in ("a", "b"))
    reported.put_evaluation(second, "fused", reported.wrong_every(5), 0.4)
    second.recipe.write_text(second.recipe.read_text() + "lora: {rank: 4}\n")
    before = listing(tmp_path)
    done = CliRunner().invoke(command, [str(first.root), str(second.root)])
    assert (done.exit_code, done.stderr, listing(tmp_path)) == (0, "", before)
    lines = done.stdout.split("\n")
    assert lines[0].split() == [str(first.root), str(second.root)]
    assert "fused accuracy" in done.stdout and "89.6 % (82-94)" in done.stdout
    assert (
        "accuracy of the fused model, second minus first, on 96 rows that both have: -10.4 (-16.8 to -3.6), p 0.00195"
    ) in lines
    assert "From first to second: 0 rows became right and 10 wrong." in lines
    assert "  broken data/test.jsonl:6: 'queue: access' → 'queue: outage'" in lines
    assert lines[-2] == "lora.rank: 16 there, 4 here"
    found = json.loads(CliRunner().invoke(command, [str(first.root), str(second.root), "--json"]).stdout)
    assert found["flips"]["broken"] == 10 and found["recipe"] == ["lora.rank: 16 there, 4 here"]


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["a", "b", "c"], "RUN: are 3 runs; give one or two"),
        (["a", "b", "--open"], "--open: is of use with one run only; leave it out"),
        (["a", "b"], "a: holds no run; give a folder that `mlxtune run` wrote"),
    ],
)
def test_what_cannot_be_is_one_line(args: list[str], line: str, invoke: Callable[..., tuple[int, str, str]]) -> None:
    assert invoke("report", *args) == (2, "", f"error: {line}\n")


def test_help_has_an_example() -> None:
    done = CliRunner().invoke(command, ["--help"])
    assert done.exit_code == 0
    assert "  mlxtune report runs/quickstart --open\n" in done.stdout
