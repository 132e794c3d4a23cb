import gzip
import io
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mlxtune.data import contents
from mlxtune.data.files import Row, is_hub_name, read_rows, resolve, scan_rows, split_files
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
        ("a.csv", "text,label\none\n", ":2: has 1 column, not the 2 of the header; check the quotes"),
        ("a.csv", "text,label\none,a,b\n", ":2: has 3 columns, not the 2 of the header; check the quotes"),
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


def test_names_that_no_path_can_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"^~no_such_user/a\.jsonl: no such file or folder"):
        resolve("~no_such_user/a.jsonl")
    assert not is_hub_name("org/" + "a" * 300)
    with pytest.raises(DataError, match=r"^a{300}: cannot be read: File name too long; check its name"):
        resolve("a" * 300)

    def refused(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_file", refused)
    with pytest.raises(DataError, match="cannot be read: Permission denied; check its name"):
        split_files(tmp_path)


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


def test_csv_rows_behind_blank_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "\n\ntext,label\n\n\none,a\n\ntwo\n")
    assert scan_rows(path)[0] == [Row(str(path), 6, {"text": "one", "label": "a"})]
    assert mistakes(path) == [":8: has 1 column, not the 2 of the header; check the quotes"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet"])
def test_every_kind_of_file_may_be_compressed_or_piped_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    parquet = io.BytesIO()
    pq.write_table(pa.table({"text": ["one", "two"], "label": ["a", "b"]}), parquet)
    content = {
        "a.jsonl": b'{"text": "one", "label": "a"}\n{"text": "two", "label": "b"}\n',
        "a.json": b' [{"text": "one", "label": "a"}, {"text": "two", "label": "b"}]',
        "a.csv": b"\xef\xbb\xbftext,label\r\none,a\r\ntwo,b\r\n",
        "a.parquet": parquet.getvalue(),
    }[name]
    values = [{"text": "one", "label": "a"}, {"text": "two", "label": "b"}]
    for path, data in ((tmp_path / name, content), (tmp_path / f"{name}.gz", gzip.compress(content))):
        path.write_bytes(data)
        assert [row.value for row in read_rows(path)] == values
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        for _ in range(2):  # it is read once and kept
            found = read_rows(resolve("-"))
            assert [row.value for row in found] == values
            assert found[0].where == ("stdin:2" if name == "a.csv" else "stdin:1")


def test_nothing_piped_in(monkeypatch: pytest.MonkeyPatch) -> None:
    stdin = io.TextIOWrapper(io.BytesIO(b""))
    monkeypatch.setattr(sys, "stdin", stdin)
    with pytest.raises(DataError, match="^-: has no rows"):
        read_rows(resolve("-"))
    monkeypatch.setattr(stdin, "isatty", lambda: True, raising=False)
    with pytest.raises(DataError, match="^stdin: nothing is piped in; pipe rows in, as in `cat"):
        read_rows(resolve("-"))
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(DataError, match="^stdin: nothing is piped in"):
        read_rows(resolve("-"))


def test_more_than_memory_is_not_read_from_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contents, "MOST", 3 << 20)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(bytes(4 << 20))))
    with pytest.raises(DataError, match="^stdin: is longer than 0.0 GB; give a file, or fewer rows"):
        read_rows(resolve("-"))


def test_a_folder_of_compressed_splits(tmp_path: Path) -> None:
    for name in ("train.jsonl.gz", "val.parquet", "test.csv.gz"):
        write(tmp_path / name, "")
    assert {split: path.name for split, path in split_files(tmp_path).items()} == {
        "train": "train.jsonl.gz",
        "valid": "val.parquet",
        "test": "test.csv.gz",
    }


def test_values_of_parquet_become_those_of_json(tmp_path: Path) -> None:
    from datetime import date, datetime
    from decimal import Decimal

    columns = {
        "text": pa.array(["a", "b"]),
        "day": [date(2024, 2, 29), None],
        "time": [datetime(2024, 2, 29, 12, 30)] * 2,
        "price": [Decimal("1.20")] * 2,
        "score": [float("nan"), 1.5],
        "bytes": [b"caf\xc3\xa9", b"\xff"],
        "map": pa.array([{"k": "v"}, None], pa.map_(pa.string(), pa.string())),
        "list": pa.array([["x"], []], pa.large_list(pa.large_string())),
        "code": pa.array([b"12", b"34"], pa.binary(2)),
        "kind": pa.array(["q", "r"]).dictionary_encode(),
    }
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table(columns), path)
    rest = {"time": "2024-02-29T12:30:00", "price": "1.20"}
    assert [row.value for row in read_rows(path)] == [
        {"text": "a", "day": "2024-02-29", **rest, "score": None, "bytes": "café", "map": {"k": "v"}, "list": ["x"]}
        | {"code": "12", "kind": "q"},
        {"text": "b", "day": None, **rest, "score": 1.5, "bytes": "/w==", "map": None, "list": []}
        | {"code": "34", "kind": "r"},
    ]


def test_rows_of_parquet_are_numbered_through_groups_and_batches(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    messages = [[{"role": "user", "content": f"number {n}" + "." * 500, "weight": None}] for n in range(3000)]
    table = pa.table({"n": list(range(3000)), "messages": messages})
    # a dictionary that is full leaves off in the middle of a group
    pq.write_table(table, path, row_group_size=1700, dictionary_pagesize_limit=100_000, data_page_size=10_000)
    found = read_rows(path)
    assert [row.line for row in found] == list(range(1, 3001))
    assert [row.value for row in found] == [{"n": n, "messages": messages[n]} for n in range(3000)]


def test_usual_encodings_of_parquet(tmp_path: Path) -> None:
    texts = [f"text {n % 7} of {n}" for n in range(2000)]
    for encoding in ("PLAIN", "DELTA_LENGTH_BYTE_ARRAY", "DELTA_BYTE_ARRAY"):
        path = tmp_path / f"{encoding}.parquet"
        options = {"use_dictionary": False, "column_encoding": {"text": encoding}}
        pq.write_table(pa.table({"text": texts}), path, compression="none", **options)
        assert [row.value["text"] for row in read_rows(path)] == texts


@pytest.mark.parametrize(
    ("name", "whether"),
    [
        ("org/name", True),
        ("org/name:train", True),
        ("openai/gsm8k/main:test", True),
        ("org/name.jsonl", False),
        ("org/name.csv.gz", False),
        ("tickets", False),
        ("./org/name", False),
        ("../name", False),
        ("~/name", False),
        ("/org/name", False),
    ],
)
def test_names_of_the_hub(name: str, whether: bool) -> None:
    assert is_hub_name(name) is whether
    if not Path(name).exists():
        with pytest.raises(DataError) as caught:
            if name != "tickets":
                resolve(name)
            raise DataError("")
        assert ("mlxtune data convert" in str(caught.value)) is whether
