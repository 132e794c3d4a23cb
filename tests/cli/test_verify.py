import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from mlxtune.cli import group
from mlxtune.report import build
from mlxtune.rundir import RunDir
from tests import reported


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    made = reported.make_run(tmp_path)
    build.write(made)
    return made


def test_an_untouched_run_is_verified(run: RunDir) -> None:
    done = CliRunner().invoke(group, ["verify", str(run.root)])
    assert (done.exit_code, done.stdout) == (0, "verified\n")
    assert done.stderr.endswith(" 288 predictions: all as stated\n")


def test_each_difference_is_a_line_and_the_exit_code_is_1(run: RunDir) -> None:
    report = json.loads(run.report("json").read_text())
    next(each for each in report["tuned"] if each["metric"] == "accuracy")["value"] = 0.99
    run.report("json").write_text(json.dumps(report))
    done = CliRunner().invoke(group, ["verify", str(run.root)])
    assert done.exit_code == 1
    assert done.stdout == "report.json: tuned.accuracy.value: stated 0.99, found 0.9166666666666666\n"
    assert done.stderr.endswith("1 difference\n")


def test_json_has_all(run: RunDir) -> None:
    (run.fused / "model.safetensors").write_bytes(b"\x1b[31m")
    done = CliRunner().invoke(group, ["verify", str(run.root), "--json"])
    found = json.loads(done.stdout)
    assert done.exit_code == 1 and done.stdout.count("\n") == 1
    assert {each["file"] for each in found["differences"]} >= {"fused/model.safetensors", "report.json"}


def test_what_a_terminal_would_obey_is_spelt_out(run: RunDir) -> None:
    report = json.loads(run.report("json").read_text())
    report["verdict"] = "\x1b[2J" + "x" * 500
    run.report("json").write_text(json.dumps(report))
    done = CliRunner().invoke(group, ["verify", str(run.root)])
    assert "\x1b" not in done.stdout and "stated \\x1b[2Jxxx" in done.stdout and len(done.stdout) < 300


def test_a_folder_without_a_report_is_one_line(tmp_path: Path, invoke: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = invoke("verify", tmp_path)
    assert (code, out) == (2, "")
    assert err == f"error: {tmp_path}: has no report; write one with `mlxtune report`\n"


def test_what_is_not_checked_is_named_and_is_no_difference(run: RunDir) -> None:
    (run.adapter / "README.md").write_text("Mine.")
    done = CliRunner().invoke(group, ["verify", str(run.root)])
    assert (done.exit_code, done.stdout) == (0, "verified\n")
    assert done.stderr.startswith("not checked: adapter/README.md (edited, or written elsewhere)\n")
