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
prompts of 18 to 29 characters, median 21  ▅▅█▅ ▅█    ▅
answers of 11 to 12 characters, median 12

error    malformed, 1 row: not valid JSON: Expecting value
         train.jsonl:4
         → write one JSON object a line

error    malformed, 1 row: `prompt` is empty
         train.jsonl:5
         → fill it in or delete the row

warning  leak, 1 row: the same prompt as in another split
         test.jsonl:1  as train.jsonl:1
         → delete them from one side, or give mlxtune one file to split; scores on such rows mean nothing

warning  contradiction, 1 row: the same prompt as in another row, but another label: no model gets above 88.9%
         test.jsonl:1  'refund', but train.jsonl:1 says 'late'
         → decide which label is right; correct the other

warning  duplicate, 1 row: the same prompt and answer as an earlier row
         train.jsonl:2  as train.jsonl:1
         → delete the copies (--fix does)

warning  label, 2 rows: labels with fewer than 5 rows: 'late' (2)
         train.jsonl:1, train.jsonl:2
         → add examples, or merge them with other labels

warning  personal data, 1 row: e-mail addresses (email)
         train.jsonl:6
         → replace them by made-up ones, or with --fix OUT --redact; a model can repeat what it has learned

warning  personal data, 4 rows: phone numbers (phone)
         train.jsonl:7, train.jsonl:8, train.jsonl:9 and 1 more
         → replace them by made-up ones, or with --fix OUT --redact; a model can repeat what it has learned

info     label, 2 rows: labels of train that test does not have: 'late' (2)
         train.jsonl:1, train.jsonl:2
         → add rows with them to test: its scores say nothing about them

label   rows  share
refund     7  77.8%  ████████████████████████
late       2  22.2%  ███████

9 rows checked: 2 errors, 6 warnings, 1 note
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
        "label",
    ]
    assert value["findings"][-2]["entity"] == "phone"
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
    assert done.stdout.endswith("\n776 rows checked: 5 warnings, 1 note\n")


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


def test_tokens_are_counted_where_a_model_is_named(folder: Path) -> None:
    done = check("tickets", "--model", "tiny", "--max-seq-length", "80")
    lines = done.stdout.splitlines()
    assert lines[3].startswith("rows of ") and lines[3].endswith("  tiny")
    assert lines[4].startswith("learned: ") and lines[5].endswith(" rows over 80 tokens")
    assert lines[6].startswith("an epoch: ") and lines[6].endswith(" of them learned")
    assert "more tokens than train.max_seq_length 80" in done.stdout
    stats = json.loads(check("tickets", "--model", "tiny", "--json").stdout)["stats"]
    assert stats["tokens"]["rows"] == 776 and stats["tokens"]["too_long"] == 0
    assert "tokens" not in json.loads(check("tickets", "--json").stdout)["stats"]


def test_fast_leaves_near_duplicates_out(folder: Path) -> None:
    kinds = {each["kind"] for each in json.loads(check("tickets", "--json", "--fast").stdout)["findings"]}
    assert kinds == {"contradiction", "duplicate", "pii"}


def test_places_says_how_many_rows_are_named(folder: Path) -> None:
    found = [json.loads(check("tickets", "--json", *more).stdout) for more in ((), ("--places", "1000"))]
    few, every = (next(f for f in each["findings"] if f["kind"] == "near_duplicate") for each in found)
    assert len(few["where"]) == 20 < len(every["where"]) == every["count"] == few["count"]
    assert f"and {few['count'] - 1} more\n" in check("tickets", "--places", "1").stdout


FIXED = """
written  clean  8 of 11 rows
         2 × left out: malformed: train.jsonl:4, train.jsonl:5
         1 × left out: duplicate: train.jsonl:2
         5 × personal data replaced: train.jsonl:6, train.jsonl:7, train.jsonl:8 and 2 more
         1 × left for you: leak, see above
         1 × left for you: contradiction, see above
"""


def test_a_cleaned_copy(folder: Path) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    done = check(".", "--label", r"^(\w+)", "--fix", "clean", "--redact", "--redact-map", "map.json")
    assert done.stdout.startswith(REPORT) and done.stdout.removeprefix(REPORT) == FIXED
    assert done.return_value == 2  # malformed rows are an error of the input
    assert {name: (folder / name).read_bytes() for name in before} == before
    assert sorted(path.name for path in (folder / "clean").iterdir()) == ["test.jsonl", "train.jsonl"]
    rows = [json.loads(line) for line in (folder / "clean" / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    assert rows[2] == {"prompt": "Write to [EMAIL_1] please", "completion": "refund\nDone."}
    originals = json.loads((folder / "map.json").read_text(encoding="utf-8"))
    assert originals["clean/train.jsonl:3"] == {"[EMAIL_1]": "a@example.com"} and len(originals) == 5
    assert (folder / "map.json").stat().st_mode & 0o077 == 0
    again = check("clean", "--label", r"^(\w+)")
    assert again.return_value == 0
    assert "personal data" not in again.stdout and "warning  duplicate" not in again.stdout


def test_a_copy_as_json(folder: Path) -> None:
    done = check("tickets", "--json", "--fix", "clean.jsonl")
    value = json.loads(done.stdout)
    assert list(value) == ["files", "rows", "findings", "stats", "fix"]
    assert (value["fix"]["out"], value["fix"]["rows_read"], value["fix"]["rows_written"]) == ("clean.jsonl", 776, 770)
    assert [(each["what"], each["count"]) for each in value["fix"]["changes"]] == [("left out: duplicate", 6)]
    assert (folder / "clean.jsonl").read_text(encoding="utf-8").count("\n") == 770
    assert not list(folder.glob(".*"))


def test_a_clean_file_is_copied_as_it_is(folder: Path) -> None:
    (folder / "clean.jsonl").write_text('{"text": "one thing"}\n', encoding="utf-8")
    done = check("clean.jsonl", "--fix", "copy.jsonl")
    assert done.stdout.endswith("\nwritten  copy.jsonl  1 of 1 rows\n         nothing to clean\n")
    assert (folder / "copy.jsonl").read_bytes() == (folder / "clean.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["tickets", "--redact"], "error: --redact changes the copy that --fix OUT writes: name OUT"),
        (["tickets", "--fix", "o.jsonl", "--redact-map", "m.json"], "error: --redact-map belongs to --redact"),
        (["tickets", "--fix", "test.jsonl"], "error: test.jsonl: exists already; choose another --fix or remove it"),
        (["tickets", "--fix", "o.csv"], "error: o.csv: one file of rows is written as JSONL; let OUT end in .jsonl"),
        (
            ["tickets", "--fix", "o.jsonl", "--redact", "--redact-map", "test.jsonl"],
            "error: test.jsonl: exists already; choose another --redact-map or remove it",
        ),
        (
            ["tickets", "--fix", "o.jsonl", "--redact", "--redact-map", "./o.jsonl"],
            "error: --redact-map and --fix name the same file",
        ),
        ([".", "--fix", "test.jsonl"], "error: test.jsonl: exists already"),
    ],
)
def test_wrong_outputs_write_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str], args: list[str], line: str
) -> None:
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert exit_code(*args) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith(line) and printed.err.count("\n") == 1
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_many_labels_show_their_ends(folder: Path) -> None:
    rows = [
        {"prompt": f"say {n} {m} so", "completion": f"label {chr(97 + n)}"} for n in range(20) for m in range(n + 20)
    ]
    (folder / "many.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    table = check("many.jsonl", "--fast").stdout.split("\n\n")[-2].splitlines()
    assert len(table) == 13 and table[10].startswith("… 9 more labels") and table[-1].startswith("label a")


def test_places_in_a_folder_elsewhere_are_named_shortly(folder: Path) -> None:
    (folder / "deep").mkdir()
    (folder / "deep" / "train.jsonl").write_text('{"text": "one thing"}\n' * 2, encoding="utf-8")
    shown = check("deep").stdout
    assert "train: train.jsonl  2 rows" in shown and "train.jsonl:2  as train.jsonl:1" in shown
    assert "deep/" not in shown
