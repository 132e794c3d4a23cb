import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from mlxtune.cli import group, main

TRAIN = """\
{"prompt": "Where is my parcel?", "completion": "late\\nSorry."}
{"prompt": "where is my parcel", "completion": "late\\nSorry."}
{"prompt": "Give me the money back.", "completion": "refund\\nDone."}
no json
{"prompt": "", "completion": "late"}
{"prompt": "Write to a@example.com please", "completion": "refund\\nDone."}
{"prompt": "Call 202-555-0142 please", "completion": "refund\\nDone."}
{"prompt": "Call 202-555-0143 now", "completion": "refund\\nDone."}
{"prompt": "Or call 202-555-0144", "completion": "refund\\nDone."}
{"prompt": "Do not call 202-555-0145", "completion": "refund\\nDone."}
"""
TEST = '{"prompt": "Where is my parcel?!", "completion": "refund\\nDone."}\n'

REPORT = """\
train: train.jsonl  8 rows
test: test.jsonl  1 row
prompts of 18 to 29 characters, median 21
answers of 11 to 12 characters, median 12

error    malformed, 1 row: not valid JSON: Expecting value
         train.jsonl:4
         → write one JSON object a line

error    malformed, 1 row: `prompt` is empty
         train.jsonl:5
         → fill it in or delete the row

warning  leak, 1 row: a prompt of another split again: 1 the same, 0 nearly
         test.jsonl:1  as train.jsonl:1
         → delete them from one side, or give mlxtune one file to split; scores on such rows mean nothing

warning  contradiction, 1 row: the same prompt as in another row, or nearly, but another label
         test.jsonl:1  'refund', but train.jsonl:1 says 'late'
         → decide which label is right; correct the other

warning  duplicate, 1 row: the same prompt and answer as an earlier row
         train.jsonl:2  as train.jsonl:1
         → delete the copies: they weigh double

warning  label, 2 rows: labels with fewer than 5 rows: 'late' (2)
         train.jsonl:1, train.jsonl:2
         → add examples, or merge them with other labels

warning  personal data, 1 row: e-mail addresses (email)
         train.jsonl:6
         → replace them by made-up ones; a model can repeat what it has learned

warning  personal data, 4 rows: phone numbers (phone)
         train.jsonl:7, train.jsonl:8, train.jsonl:9 and 1 more
         → replace them by made-up ones; a model can repeat what it has learned

label   rows  share
refund     7  77.8%  ████████████████████████
late       2  22.2%  ███████

9 rows checked: 2 errors, 6 warnings
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of splits with a little of everything, and the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.jsonl").write_text(TRAIN, encoding="utf-8")
    (tmp_path / "test.jsonl").write_text(TEST, encoding="utf-8")
    return tmp_path


def check(*args: str) -> Result:
    return CliRunner().invoke(group, ["data", "check", *args], standalone_mode=False)


def exit_code(*args: str) -> object:
    with pytest.raises(SystemExit) as caught:
        main(["data", "check", *args])
    return caught.value.code


def test_the_report(folder: Path) -> None:
    done = check(".", "--label", r"^(\w+)")
    assert (done.stdout, done.stderr) == (REPORT, "")
    assert done.return_value == 2
    assert sorted(path.name for path in folder.iterdir()) == ["test.jsonl", "train.jsonl"]


def test_json_is_one_value_with_the_same_findings(folder: Path) -> None:
    done = check(".", "--json", "--label", r"^(\w+)")
    assert done.stdout.count("\n") == 1 and done.stderr == ""
    value = json.loads(done.stdout)
    assert list(value) == ["files", "rows", "findings", "stats"]
    assert value["files"][1] == {"split": "test", "path": "test.jsonl", "rows": 1}
    assert [each["kind"] for each in value["findings"]] == [
        "malformed",
        "malformed",
        "leak",
        "contradiction",
        "duplicate",
        "label",
        "pii",
        "pii",
    ]
    assert value["findings"][-1]["entity"] == "phone"
    assert value["stats"]["labels"] == {"refund": 7, "late": 2}
    assert done.return_value == 2


def test_exit_codes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clean = folder / "clean.jsonl"
    clean.write_text('{"text": "one thing"}\n{"text": "another"}\n', encoding="utf-8")
    repeated = folder / "repeated.jsonl"
    repeated.write_text('{"text": "one thing"}\n{"text": "One thing."}\n', encoding="utf-8")
    assert exit_code("clean.jsonl") == 0
    assert exit_code("clean.jsonl", "--strict") == 0
    assert exit_code("repeated.jsonl") == 0
    assert exit_code("repeated.jsonl", "--strict") == 1
    assert exit_code("repeated.jsonl", "--strict", "--json") == 1
    assert exit_code(".") == 2
    assert exit_code(".", "--strict") == 2
    assert capsys.readouterr().err == ""


def test_a_clean_file(folder: Path) -> None:
    (folder / "clean.jsonl").write_text('{"text": "one thing"}\n', encoding="utf-8")
    assert check("clean.jsonl").stdout == (
        "clean.jsonl  1 row\nprompts of 9 to 9 characters, median 9\n\n1 row checked: nothing found\n"
    )


def test_the_embedded_tickets_are_named_shortly(folder: Path) -> None:
    done = check("tickets")
    assert done.return_value == 0
    assert done.stdout.startswith("tickets.jsonl  776 rows\n")
    assert "assets" not in done.stdout
    assert done.stdout.endswith("\n776 rows checked: 4 warnings, 1 note\n")


def test_a_recipe_says_how_rows_are_read(folder: Path) -> None:
    (folder / "rows.csv").write_text("ask,say,lang\nWho?,I.,en\nWho?,Ich.,de\n", encoding="utf-8")
    (folder / "recipe.yaml").write_text(
        "data: {path: rows.csv, prompt: '{{ ask }}', completion: '{{ say }}', keep: {lang: [en]}}\n"
        "evaluate: {label: '(.+)[.]'}\n",
        encoding="utf-8",
    )
    value = json.loads(check("-c", "recipe.yaml", "--json").stdout)
    assert (value["rows"], value["stats"]["labels"]) == (1, {"I": 1})
    assert json.loads(check("rows.csv", "-c", "recipe.yaml", "--json").stdout) == value


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["nowhere.jsonl"], "error: nowhere.jsonl: no such file or folder; give a JSONL, JSON or CSV file"),
        ([], "error: name a file or folder, or a recipe that has data.path (`mlxtune data check --help`)"),
        (["tickets", "--label", "("], "error: label '(': is no regular expression: missing )"),
        (["tickets", "--label", "x"], "error: label 'x': has no group in parentheses"),
        (["tickets", "-c", "gone.yaml"], "error: gone.yaml: no such recipe"),
    ],
)
def test_mistakes_are_one_line(folder: Path, capsys: pytest.CaptureFixture[str], args: list[str], line: str) -> None:
    assert exit_code(*args) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith(line) and printed.err.count("\n") == 1


def test_what_stands_in_a_file_does_not_steer_the_terminal(folder: Path) -> None:
    rows = [json.dumps({"prompt": f"say {n}{chr(97 + n)}", "completion": "\x1b[2Jclear" + "!" * 50}) for n in range(6)]
    (folder / "odd.jsonl").write_text("\n".join(rows), encoding="utf-8")
    done = check("odd.jsonl", "--label", "(.+)")
    assert "\x1b" not in done.stdout
    assert r"\x1b[2Jclear!!!" in done.stdout and "!" * 50 not in done.stdout


def test_line_breaks_of_a_file_make_no_lines_of_the_report(folder: Path) -> None:
    rows = [json.dumps({"prompt": f"say {n}{chr(97 + n)}", "completion": "one\nerror   forged"}) for n in range(6)]
    (folder / "odd.jsonl").write_text("\n".join(rows), encoding="utf-8")
    done = check("odd.jsonl", "--label", "(?s)(.+)")
    assert r"one\nerror   forged" in done.stdout
    assert not any(line.startswith("error") for line in done.stdout.splitlines())
