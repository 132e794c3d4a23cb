"""`mlxtune data split`: the files it writes, what it says about them, and what it refuses."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

Invoke = Callable[..., tuple[int, str, str]]

ROWS = [
    {"prompt": "Where is my parcel?", "completion": "late", "who": "ann", "at": 1.5},
    {"prompt": "Give me the money back.", "completion": "refund", "who": "bob", "at": None},
    {"prompt": "I forgot the password", "completion": "login", "who": "cy", "at": [1]},
    {"prompt": "where is my parcel", "completion": "late", "who": "dot", "at": 2},
    {"prompt": "Wo bleibt die Straße\u2028?", "completion": "late", "who": "bob", "at": 3},
    {"prompt": "GIVE me the money back", "completion": "refund", "who": "ann", "at": 4},
]
REPORT = """\
part   rows  share
train     2  33.3%
valid     1  16.7%
test      2  33.3%

label   train  valid  test
late        2      0     1
refund      0      0     1
login       0      1     0

test rows with a neighbour in train  split by chance  this split
similarity ≥ 0.8                               50.0%        0.0%
similarity ≥ 0.6                               50.0%        0.0%

1 row left out, each like rows of two parts: rows.jsonl:6

out
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the rows above in `rows.jsonl`."""
    monkeypatch.chdir(tmp_path)
    lines = [json.dumps(row, ensure_ascii=False) for row in ROWS]
    (tmp_path / "rows.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return tmp_path


def read(path: Path) -> list[object]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").removesuffix("\n").split("\n")]


def test_the_report_and_the_files(folder: Path, invoke: Invoke) -> None:
    before = (folder / "rows.jsonl").read_bytes()
    args = ("data", "split", "rows.jsonl", "--out", "out", "--group-by", "who", "--label", "(.+)", "--seed", 0)
    assert invoke(*args) == (0, REPORT, "")
    assert sorted(path.name for path in folder.rglob("*")) == [
        "out", "rows.jsonl", "test.jsonl", "train.jsonl", "valid.jsonl",
    ]  # fmt: skip
    written = {name: read(folder / "out" / f"{name}.jsonl") for name in ("train", "valid", "test")}
    assert written == {"train": [ROWS[0], ROWS[3]], "valid": [ROWS[2]], "test": [ROWS[1], ROWS[4]]}
    assert (folder / "rows.jsonl").read_bytes() == before


def test_json_is_one_value_with_the_same_figures(folder: Path, invoke: Invoke) -> None:
    code, out, err = invoke(
        "data", "split", "rows.jsonl", "--out", "out", "--group-by", "who", "--label", "(.+)", "--seed", 0, "--json"
    )
    assert (code, err, out.count("\n")) == (0, "", 1)
    assert json.loads(out) == {
        "out": "out",
        "rows": {"train": 2, "valid": 1, "test": 2},
        "left_out": ["rows.jsonl:6"],
        "labels": {
            "late": {"train": 2, "valid": 0, "test": 1},
            "refund": {"train": 0, "valid": 0, "test": 1},
            "login": {"train": 0, "valid": 1, "test": 0},
        },
        "leaked": [
            {"similarity": 0.8, "before": 0.5, "after": 0.0},
            {"similarity": 0.6, "before": 0.5, "after": 0.0},
        ],
    }


def test_parts_without_a_share_have_no_file(folder: Path, invoke: Invoke) -> None:
    code, out, _ = invoke("data", "split", "rows.jsonl", "--out", "a", "--test", 0, "--valid", 0.3)
    assert code == 0 and "neighbour" not in out
    assert sorted(path.name for path in (folder / "a").iterdir()) == ["train.jsonl", "valid.jsonl"]


def test_a_later_command_reads_the_same_rows_in_the_same_parts(folder: Path, invoke: Invoke) -> None:
    recipe = folder / "mine.yaml"
    recipe.write_text(
        "data: {path: rows.csv, prompt: '{{ ask }}', completion: '{{ to }}', keep: {ok: ['yes']}, test: 0.2}\n"
    )
    asked = [chr(97 + n) * 9 for n in range(20)]
    rows = [f"{ask},team {n % 2},{'no' if n == 7 else 'yes'}" for n, ask in enumerate(asked)]
    (folder / "rows.csv").write_text("\n".join(["ask,to,ok", *rows]))
    assert invoke("data", "split", "-c", "mine.yaml", "--out", "out", "--seed", 3)[0] == 0

    from mlxtune.data.load import load_splits
    from mlxtune.recipe import load

    data = load(recipe).data
    whole = load_splits(data, 3, None)
    assert sum(len(rows) for rows in whole.values()) == 19
    for name, rows in whole.items():
        assert read(folder / "out" / f"{name}.jsonl") == [row.value for row, _ in rows]
    recipe.write_text(recipe.read_text().replace("rows.csv", "out"))
    again = load_splits(load(recipe).data, 3, None)
    assert {name: [example for _, example in rows] for name, rows in again.items()} == {
        name: [example for _, example in rows] for name, rows in whole.items()
    }


def test_rows_at_the_end_move_no_other(folder: Path, invoke: Invoke) -> None:
    source = folder / "tickets.jsonl"
    from mlxtune.data.files import resolve

    lines = resolve("tickets").read_text(encoding="utf-8").splitlines(keepends=True)
    source.write_text("".join(lines[:500]), encoding="utf-8")
    assert invoke("data", "split", "tickets.jsonl", "--out", "a", "--group-by", "cluster")[0] == 0
    source.write_text("".join(lines), encoding="utf-8")
    assert invoke("data", "split", "tickets.jsonl", "--out", "b", "--group-by", "cluster")[0] == 0
    for name in ("train.jsonl", "valid.jsonl", "test.jsonl"):
        before, after = read(folder / "a" / name), read(folder / "b" / name)
        assert after[: len(before)] == before


def test_no_stratify(folder: Path, invoke: Invoke) -> None:
    found = {
        flag: json.loads(invoke("data", "split", "tickets", "--out", flag[2:], flag, "--json")[1])
        for flag in ("--stratify", "--no-stratify")
    }
    spread = {flag: [part["test"] for part in each["labels"].values()] for flag, each in found.items()}
    assert max(spread["--stratify"]) - min(spread["--stratify"]) < max(spread["--no-stratify"]) - min(
        spread["--no-stratify"]
    )


@pytest.mark.parametrize(
    ("args", "code", "line"),
    [
        (["rows.jsonl", "--out", "rows.jsonl"], 2, "rows.jsonl: exists already; choose another --out or remove it"),
        ([".", "--out", "out"], 2, ".: is a folder of splits; name one file"),
        (["nope.jsonl", "--out", "out"], 2, "nope.jsonl: no such file or folder"),
        (["rows.jsonl", "--out", "out", "--group-by", "nobody"], 2, "rows.jsonl:1: has no column `nobody`"),
        (["rows.jsonl", "--out", "out", "--test", "0.6", "--valid", "0.4"], 2, "leave no rows to train on"),
        (["rows.jsonl", "--out", "out", "--test", "2"], 2, "data.test"),
        (["rows.jsonl", "--out", "out", "--label", "("], 2, "is no regular expression"),
        (["rows.jsonl"], 2, "Missing option '--out'"),
        (["--out", "out"], 2, "data.path: is not set"),
        (["three.jsonl", "--out", "out"], 2, "3 rows in 1 group that must stay together"),
    ],
)
def test_what_is_refused_leaves_nothing(folder: Path, invoke: Invoke, args: list[str], code: int, line: str) -> None:
    (folder / "three.jsonl").write_text(f"{json.dumps(ROWS[0])}\n" * 3)
    (folder / "train.jsonl").write_text(f"{json.dumps(ROWS[0])}\n")
    before = sorted(folder.rglob("*"))
    found, out, err = invoke("data", "split", *args)
    assert (found, out, err.count("\n")) == (code, "", 1)
    assert err.startswith("error: ") and line in err
    assert sorted(folder.rglob("*")) == before
