"""`mlxtune compare`: the table and the JSON of a run, what is shown again, the learning curve, what is refused."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from mlxtune import model, pipeline, recipe
from mlxtune.cli import compare as module
from mlxtune.cli import group
from mlxtune.errors import MlxtuneError
from mlxtune.rundir import RunDir
from mlxtune.verify import verify

NAMES = ["base", "few_shot", "retrieval", "tuned"]
LEFT_OUT = "not compared: prompt (compare.prompt is not set, and the answers give no labels to name)\n"


def call(*args: object) -> Result:
    return CliRunner().invoke(group, ["compare", *(str(arg) for arg in args)])


def error(*args: object) -> str:
    """The line of the error that a command ends with."""
    done = call(*args)
    assert isinstance(done.exception, MlxtuneError)
    assert done.stdout == ""
    return str(done.exception)


@dataclass(frozen=True)
class Compared:
    """A run with a comparison in it, made with settings of its own recipe, and what the command printed."""

    run: Path
    json: str
    err: str


@pytest.fixture(scope="session")
def compared(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Compared:
    folder = tmp_path_factory.mktemp("compared")
    run = folder / "run"
    shutil.copytree(trained / "run", run)
    (folder / "anchor.txt").write_text("Once upon a time there was a lamp in a shop. " * 9)
    made = recipe.load(run / "recipe.yaml")
    compare = recipe.CompareRecipe(few_shot=1, passages=1, anchor=str(folder / "anchor.txt"))
    made = replace(made, compare=compare, evaluate=replace(made.evaluate, max_tokens=6))
    (run / "recipe.yaml").write_text(recipe.dump(made))
    done = call(run, "--json")
    assert done.exception is None
    return Compared(run, done.stdout, done.stderr)


@pytest.fixture
def copied(compared: Compared, tmp_path: Path) -> Path:
    """A run with a comparison, to change."""
    shutil.copytree(compared.run, tmp_path / "run")
    return tmp_path / "run"


def test_json(compared: Compared) -> None:
    assert compared.json.count("\n") == 1
    value = json.loads(compared.json)
    assert value == json.loads((compared.run / "compare" / "compare.json").read_text())
    assert [each["name"] for each in value["candidates"]] == NAMES
    assert value["verdict"].keys() == {"decision", "sentence", "reasons", "rows_needed"}
    assert sorted(path.name for path in (compared.run / "compare").iterdir()) == sorted(
        ["compare.json", "evidence", *(f"{name}.jsonl" for name in NAMES)]
    )


def test_a_finished_comparison_is_shown_without_a_model(compared: Compared, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "load", None)
    done = call(compared.run)
    assert done.exception is None
    value = json.loads(compared.json)
    lines = done.stdout.splitlines()
    assert lines[0].split()[:2] == ["held-out", "loss"]
    assert [line.split("  ")[0].replace(" ", "_") for line in lines[1:5]] == NAMES
    assert done.stderr == LEFT_OUT
    assert lines[5] == ""
    assert any(line.startswith("forgetting on ") for line in lines)
    assert value["verdict"]["sentence"] in lines
    assert all(f"  - {reason}" in lines for reason in value["verdict"]["reasons"])


def test_other_settings_need_a_folder_of_their_own(compared: Compared, tmp_path: Path) -> None:
    line = error(compared.run, "--set", "compare.few_shot=2")
    assert line == f"{compared.run}/compare: holds a comparison with other settings; give an --out, or remove it"
    out = tmp_path / "out"
    sets = ["--set", "compare.few_shot=0", "--set", "compare.retrieval=false"]
    done = call(compared.run, "--out", out, "--json", *sets)
    assert done.exception is None
    assert [each["name"] for each in json.loads(done.stdout)["candidates"]] == ["base", "tuned"]
    assert sorted(path.name for path in out.iterdir()) == ["base.jsonl", "compare.json", "evidence", "tuned.jsonl"]


def test_other_answers_need_a_folder_of_their_own(compared: Compared) -> None:
    line = error(compared.run, "--set", "evaluate.max_tokens=7")
    assert line.startswith(f"{compared.run}/compare: holds a comparison with other settings; ")


def test_a_learning_curve_is_added(copied: Path) -> None:
    pipeline.reported(RunDir(copied))
    before = json.loads((copied / "compare" / "compare.json").read_text())
    left = copied / "compare" / "evidence" / "curve"  # by one that was cut off before it stood in the file
    left.mkdir()
    (left / "25.jsonl").write_text("")
    done = call(copied, "--learning-curve", "50,100")
    assert done.exception is None
    assert sorted(path.name for path in left.iterdir()) == ["100.jsonl", "50.jsonl"]
    found = verify(RunDir(copied))
    assert (found.differences, found.unchecked) == ([], [])
    after = json.loads((copied / "compare" / "compare.json").read_text())
    curve = after["learning_curve"]
    assert {**after, "learning_curve": None} == before
    assert [point["rows"] for point in curve["points"]] == [15, 30]
    assert curve["fit"]["rows"] == 60
    assert curve["sentence"] in done.stdout.splitlines()
    # the whole of the rows, trained again in the same way, is the run's own adapter
    tuned = next(each for each in before["candidates"] if each["name"] == "tuned")
    loss = next(each["value"] for each in tuned["scores"] if each["metric"] == "loss")
    assert curve["points"][1]["value"] == pytest.approx(loss, rel=1e-5)
    report = json.loads((copied / "report.json").read_text())
    assert curve["sentence"] in json.dumps(report, ensure_ascii=False)
    assert "has a learning curve already" in error(copied, "--learning-curve", "50,100")


@pytest.mark.parametrize("percents", ["50", "0,50", "50,200"])
def test_no_learning_curve(compared: Compared, percents: str) -> None:
    assert "is no curve" in error(compared.run, "--learning-curve", percents)


def test_no_numbers(compared: Compared) -> None:
    done = call(compared.run, "--learning-curve", "half")
    assert (done.exit_code, done.stdout) == (2, "")
    assert "'half' is no list of per cents such as 25,50,100" in done.stderr


def test_a_recipe_is_run_first(compared: Compared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(compared.run / "recipe.yaml", tmp_path / "my.yaml")
    ran: list[tuple[Any, Path]] = []

    def run_stages(recipe: Any, out: Path) -> None:
        ran.append((recipe, out))
        shutil.copytree(compared.run, out)

    monkeypatch.setattr(module, "run_stages", run_stages)
    done = call("my.yaml", "--json")
    assert done.exception is None
    assert [out for _, out in ran] == [Path("runs/my")]
    assert json.loads(done.stdout) == json.loads(compared.json)


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["absent.yaml"], "absent.yaml: no such recipe; give the path of a YAML file"),
        (["."], ".: holds no run; give a folder that `mlxtune run` wrote, or a recipe"),
        (["RUN", "--set", "lora.rank=8"], "--set: is not how RUN was made (lora.rank: 16 there, 8 here); "),
        (
            ["RUN", "--set", "compare.few_shots=8"],
            "command line: unknown key `compare.few_shots`; did you mean `compare.few_shot`?",
        ),
        (["RUN", "--against", "."], ".: has no evaluation of a tuned model; give a finished run"),
        (["RUN", "--out", "taken"], "taken: exists already; choose another --out or remove it"),
    ],
)
def test_wrong_input(
    compared: Compared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: list[str], line: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(model, "load", None)
    (tmp_path / "taken").mkdir()
    found = error(*(arg.replace("RUN", str(compared.run)) for arg in args))
    assert found.startswith(line.replace("RUN", str(compared.run)))
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


Value = dict[str, Any]


@pytest.fixture
def value(compared: Compared) -> Callable[..., Value]:
    """The comparison with some of its values changed."""
    return lambda **changes: json.loads(compared.json) | changes


def test_everything_that_was_measured_is_told(value: Callable[..., Value], capsys: pytest.CaptureFixture[str]) -> None:
    flips = {"from": "base", "to": "tuned", "fixed": 1, "broken": 2, "examples": []}
    near = {"test": "data/test.jsonl:5", "train": "data/train.jsonl:7", "similarity": 0.9}
    judged = {"judge": "http://j", "better": "tuned", "than": "base", "wins": 3, "ties": 2, "losses": 1}
    score = next(each for each in value()["candidates"][-1]["scores"] if each["metric"] == "loss")
    score = {**score, "value": 1.25, "ci_low": 1.0, "ci_high": 1.5}
    curve = {"metric": "loss", "points": [{"rows": 9, "value": 1.5}], "fit": None, "sentence": "Nothing more."}
    module.show(
        value(
            flips=flips,
            flips_since={**flips, "from": "tuned of old"},
            contamination={"count": 1, "near": [near], "without": [{"name": "tuned", "scores": [score]}]},
            judged=judged,
            learning_curve=curve,
        )
    )
    out = capsys.readouterr().out
    assert "from base to tuned: 1 row fixed, 2 broken\nfrom tuned of old to tuned: 1 row fixed, 2 broken\n" in out
    assert "1 test row near training rows, such as data/test.jsonl:5; without them: tuned 1.250 (1.000-1.500)\n" in out
    assert "judged by http://j: tuned better than base in 3, as good in 2, worse in 1\n" in out
    assert "learning curve of held-out loss: 9 rows 1.500\nNothing more.\n" in out


def test_names_from_elsewhere_do_nothing_to_the_terminal(
    value: Callable[..., Value], capsys: pytest.CaptureFixture[str]
) -> None:
    changed = value(left_out={"x": "\x1b[31mred"})
    changed["candidates"][0]["name"] = "\x1b]0;title\x07"
    module.show(changed)
    out, err = capsys.readouterr()
    assert "\x1b" not in out + err
    assert "not compared: x (\\x1b[31mred)" in err
