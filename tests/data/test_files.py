from pathlib import Path

import pytest

from mlxtune.data.files import Row, read_rows, resolve, scan_rows, split_files
from mlxtune.errors import DataError


def write(path: Path, text: str) -> Path:
    path.write_bytes(text.encode())
    return path


def mistakes(path: Path) -> list[str]:
    return [str(error).removeprefix(str(path)) for error in scan_rows(path)[1]]


def test_jsonl_rows_know_their_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '\ufeff{"text": "one"}\r\n\n  \n{"text": "two\u2028three"}')
    assert read_rows(path) == [Row(str(path), 1, {"text": "one"}), Row(str(path), 4, {"text": "two\u2028three"})]
    assert read_rows(path)[1].where == f"{path}:4"


def test_json_rows_are_numbered(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", '[{"text": "one"},\n\n {"text": "two"}]')
    assert read_rows(path) == [Row(str(path), 1, {"text": "one"}), Row(str(path), 2, {"text": "two"})]


def test_csv_rows_know_the_line_on_which_they_begin(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", 'text,label\n"two\nlines",a\r\nlast,b\n')
    assert read_rows(path) == [
        Row(str(path), 2, {"text": "two\nlines", "label": "a"}),
        Row(str(path), 4, {"text": "last", "label": "b"}),
    ]


def test_all_malformed_lines_are_found_in_one_pass(tmp_path: Path) -> None:
    lines = ['{"text": "fine"}', "{", "[1]", '{"x": NaN}', "[" * 100_000, '"text"', "null", r'{"text": "\ud83d"}']
    path = write(tmp_path / "a.jsonl", "\n".join(lines))
    rows, _ = scan_rows(path)
    assert [row.line for row in rows] == [1]
    found = mistakes(path)
    assert [each.split(";")[0] for each in found[:3]] == [
        ":2: not valid JSON: Expecting property name enclosed in double quotes at column 2",
        ":3: is a JSON list, not an object",
        ":4: not valid JSON: NaN is not a JSON number",
    ]
    assert found[3].startswith(":5: not valid JSON: ")
    assert [each.split(";")[0] for each in found[4:]] == [
        ":6: is a JSON string, not an object",
        ":7: is a JSON null, not an object",
        r":8: has half a character, such as \ud83d without its second half",
    ]


def test_whole_characters_in_two_escapes_are_fine(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", r'{"text": "\ud83d\ude00 \\ud83d"}')
    assert read_rows(path)[0].value == {"text": "\U0001f600 \\ud83d"}


def test_the_first_malformed_row_is_raised_with_the_number_of_others(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "fine"}\n1\n2\n3\n')
    with pytest.raises(DataError) as caught:
        read_rows(path)
    assert str(caught.value) == (
        f'{path}:2: is a JSON number, not an object (and 2 more such rows); write {{"prompt": …}}'
    )


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.json", '{"text": "one"}', ": is a JSON object, not a list; write a list of objects, or JSONL"),
        ("a.json", '[{"text": 1},\n 2]', ':2: is a JSON number, not an object; write {"prompt": …}'),
        ("a.csv", "text,label\none\n", ":2: does not have 2 columns; check the quotes"),
        ("a.csv", "text,label\none,a,b\n", ":2: does not have 2 columns; check the quotes"),
        ("a.csv", 'text\n"one', ":2: not valid CSV: unexpected end of data; check the quotes"),
        ("a.csv", "text,text\none,two\n", ":1: has the column `text` twice; rename one of them"),
    ],
)
def test_malformed_json_and_csv(tmp_path: Path, name: str, text: str, expected: str) -> None:
    assert mistakes(write(tmp_path / name, text)) == [expected]


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no rows"):
        read_rows(write(tmp_path / "empty.jsonl", "\n"))
    with pytest.raises(DataError, match=r"unknown suffix '.txt'; use .jsonl, .json, .csv"):
        read_rows(write(tmp_path / "a.txt", "text"))
    with pytest.raises(DataError, match=r"gone.jsonl: cannot be read: No such file"):
        read_rows(tmp_path / "gone.jsonl")
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes(b'{"text": "one"}\n{"text": "caf\xe9"}\n')
    with pytest.raises(DataError, match=r"latin.jsonl:2: is not UTF-8"):
        read_rows(latin)


def test_the_embedded_set_gives_way_to_a_file_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve("tickets").name == "tickets.jsonl"
    (tmp_path / "tickets").mkdir()
    assert resolve("tickets") == Path("tickets")
    with pytest.raises(DataError, match="nowhere: no such file or folder"):
        resolve("nowhere")


def test_a_folder_of_splits(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no train, valid or test file"):
        split_files(tmp_path)
    for name in ("train.csv", "validation.jsonl", "test.json", "notes.txt"):
        write(tmp_path / name, "")
    assert split_files(tmp_path) == {
        "train": tmp_path / "train.csv",
        "valid": tmp_path / "validation.jsonl",
        "test": tmp_path / "test.json",
    }
    write(tmp_path / "val.jsonl", "")
    with pytest.raises(DataError, match=r"has val.jsonl and validation.jsonl for the valid split; keep one of them"):
        split_files(tmp_path)


def test_home_and_capital_suffixes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "A.JSONL", '{"text": "one"}')
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/A.JSONL") == path
    assert read_rows(path) == [Row(str(path), 1, {"text": "one"})]
    with pytest.raises(DataError, match="^~/gone.jsonl: no such file or folder"):
        resolve("~/gone.jsonl")
