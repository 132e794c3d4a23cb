"""`mlxtune data convert`: every format becomes canonical JSONL, nothing is lost, and bad input leaves no file."""

import gzip
import importlib.util
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlxtune.data.canonical import convert
from mlxtune.data.fetch import fetch, parts_of
from mlxtune.data.files import read_rows
from mlxtune.errors import DataError, HubError, InputError, OutputError
from mlxtune.recipe import DataRecipe

Invoke = Callable[..., tuple[int, str, str]]
USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello"}
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(name: str, *rows: Any) -> None:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def read(name: str) -> list[Any]:
    return [json.loads(line) for line in Path(name).read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"id": 7, "prompt": "Hi", "completion": "Hello"}, {"messages": [USER, ANSWER], "id": 7}),
        ({"text": "Once", "n": None, "tags": ["a"]}, {"text": "Once", "n": None, "tags": ["a"]}),
        (
            {"instruction": "Sum up.", "input": "Long.", "output": "Hello", "cluster": 3},
            {"messages": [{"role": "user", "content": "Sum up.\n\nLong."}, ANSWER], "cluster": 3},
        ),
        (
            {"conversations": [{"from": "human", "value": "Hi", "at": 9}, {"from": "gpt", "value": "Hello"}], "id": 1},
            {"messages": [USER | {"at": 9}, ANSWER], "id": 1},
        ),
        (
            {
                "system": "Be kind.",
                "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}],
            },
            {"messages": [{"role": "system", "content": "Be kind."}, USER, ANSWER]},
        ),
        (
            {
                "tools": [{"type": "function"}],
                "lang": "en",
                "messages": [
                    USER | {"name": "Ada", "time": "12:00"},
                    {"role": "assistant", "content": None, "tool_calls": [CALL], "weight": 0},
                    {"role": "tool", "content": "3", "tool_call_id": "c1"},
                    ANSWER | {"reasoning_content": "Hm.", "weight": 1},
                ],
            },
            {
                "messages": [
                    USER | {"name": "Ada", "time": "12:00"},
                    {"role": "assistant", "content": "", "weight": 0, "tool_calls": [CALL]},
                    {"role": "tool", "content": "3", "tool_call_id": "c1"},
                    ANSWER | {"weight": 1, "reasoning_content": "Hm."},
                ],
                "tools": [{"type": "function"}],
                "lang": "en",
            },
        ),
    ],
)
def test_every_format(invoke: Invoke, row: dict[str, Any], expected: dict[str, Any]) -> None:
    write("in.jsonl", row)
    assert invoke("data", "convert", "in.jsonl", "out.jsonl") == (0, "out.jsonl\n", "1 row\n")
    (found,) = read("out.jsonl")
    assert found == expected
    assert list(found) == list(expected)
    assert invoke("data", "convert", "out.jsonl", "again.jsonl")[0] == 0
    assert Path("again.jsonl").read_bytes() == Path("out.jsonl").read_bytes()
    assert sorted(path.name for path in Path().iterdir()) == ["again.jsonl", "in.jsonl", "out.jsonl"]


def test_columns_of_the_recipe(invoke: Invoke) -> None:
    Path("in.csv").write_text("id,text,category\n1,Hi,Hello\n", encoding="utf-8")
    sets = ["--set", "data.prompt=text", "--set", "data.completion=category"]
    assert invoke("data", "convert", "in.csv", "out.jsonl", *sets)[0] == 0
    assert read("out.jsonl") == [{"messages": [USER, ANSWER], "id": "1"}]
    # what a Jinja text names may be more than it writes
    sets = ["--set", "data.prompt={{ text }}", "--set", "data.completion=category"]
    assert invoke("data", "convert", "in.csv", "jinja.jsonl", *sets)[0] == 0
    assert read("jinja.jsonl") == [{"messages": [USER, ANSWER], "id": "1", "text": "Hi"}]
    assert invoke("data", "convert", "in.csv", "none.jsonl", "--set", "data.prompt=text") == (
        2,
        "",
        "error: command line: data: prompt and completion belong together; set both or none\n",
    )


def test_a_recipe_file_and_what_it_leaves_out(invoke: Invoke) -> None:
    write("in.jsonl", *({"q": "Hi", "a": "Hello", "lang": lang} for lang in ("en", "de", "fr")))
    Path("my.yaml").write_text("data: {prompt: q, completion: a, keep: {lang: [en]}}\n")
    args = ["data", "convert", "in.jsonl", "out.jsonl", "-c", "my.yaml"]
    assert invoke(*args) == (0, "out.jsonl\n", "1 row; 2 left out by data.keep\n")
    assert read("out.jsonl") == [{"messages": [USER, ANSWER], "lang": "en"}]
    Path("out.jsonl").unlink()
    code, out, err = invoke(*args, "--json")
    assert (code, err) == (0, "")
    assert json.loads(out) == {
        "out": "out.jsonl",
        "rows": 1,
        "left_out": 2,
        "files": [{"split": "all", "path": "out.jsonl", "rows": 1, "left_out": 2}],
    }


def test_a_folder_becomes_a_folder_of_splits(invoke: Invoke) -> None:
    write("in/train.jsonl", {"prompt": "Hi", "completion": "Hello"}, {"prompt": "Ho", "completion": "Hello"})
    pq.write_table(pa.table({"text": ["Once"]}), "in/validation.parquet")
    Path("in/test.csv.gz").write_bytes(gzip.compress(b"instruction,output\nHi,Hello\n"))
    assert invoke("data", "convert", "in", "made/out") == (0, "made/out\n", "4 rows (train 2 · valid 1 · test 1)\n")
    assert sorted(path.name for path in Path("made/out").iterdir()) == ["test.jsonl", "train.jsonl", "valid.jsonl"]
    assert read("made/out/valid.jsonl") == [{"text": "Once"}]
    assert read("made/out/test.jsonl") == [{"messages": [USER, ANSWER]}]
    assert invoke("data", "convert", "made/out", "again")[0] == 0
    for path in Path("again").iterdir():
        assert path.read_bytes() == (Path("made/out") / path.name).read_bytes()


def test_what_a_text_of_json_holds_is_read_as_strictly_as_the_file(invoke: Invoke) -> None:
    for number, arguments in enumerate(['{"a": NaN}', r'{"a": "\ud83d"}']):
        call = {"function": {"name": "f", "arguments": arguments}}
        write("in.jsonl", {"messages": [USER, {"role": "assistant", "tool_calls": [call]}]})
        code, out, err = invoke("data", "convert", "in.jsonl", f"{number}.jsonl")
        assert (code, out) == (2, "") and err.startswith("error: in.jsonl:1: message 2, tool call 1, has the arguments")


def test_what_is_piped_in(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = gzip.compress(b"prompt,completion\nHi,Hello\n")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(packed)))
    assert invoke("data", "convert", "-", "out.jsonl")[0] == 0
    assert read("out.jsonl") == [{"messages": [USER, ANSWER]}]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["in.jsonl", "taken.jsonl"], "taken.jsonl: exists already; choose another OUT or remove it"),
        (["in.jsonl", "in.jsonl"], "in.jsonl: exists already; choose another OUT or remove it"),
        (["in.jsonl", "out"], "out: one file of rows is written as JSONL; let OUT end in .jsonl"),
        (["in.jsonl", "out.csv"], "out.csv: one file of rows is written as JSONL; let OUT end in .jsonl"),
        (["splits", "out.jsonl"], "out.jsonl: several splits are written as a folder; let OUT not end in .jsonl"),
        (["gone.jsonl", "out.jsonl"], "gone.jsonl: no such file or folder; give a JSONL, JSON or CSV file"),
        (["bad.jsonl", "out.jsonl"], "bad.jsonl:2: not valid JSON: Expecting value at column 1 (and 1 more such row)"),
        (["odd.jsonl", "out.jsonl"], "odd.jsonl:3: has the columns `text`; the other rows of this file have `prompt`"),
        (["half", "out"], "half/test.jsonl:1: `text` is empty; fill it in or delete the row"),
        (["tools.jsonl", "out.jsonl"], "tools.jsonl:1: has a column `tools`, which is not read here and would be"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(
    invoke: Invoke, folder: Path, listing: Callable[[Path], dict[str, str]], args: list[str], said: str
) -> None:
    pair = {"prompt": "Hi", "completion": "Hello"}
    write("in.jsonl", pair)
    write("taken.jsonl", pair)
    write("splits/train.jsonl", pair)
    Path("bad.jsonl").write_text('{"text": "one"}\nno\nno\n')
    write("odd.jsonl", pair, pair, {"text": "one"})
    write("half/train.jsonl", pair)
    write("half/test.jsonl", {"text": ""})
    write("tools.jsonl", pair | {"tools": [{"type": "function"}]})
    before = listing(folder)
    code, out, err = invoke("data", "convert", *args)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"error: {said}")
    assert listing(folder) == before


def test_the_library_writes_over_nothing() -> None:
    write("in.jsonl", {"text": "Once"})
    Path("out.jsonl").write_text("mine")
    with pytest.raises(OutputError, match="^out.jsonl: exists already"):
        convert({"all": lambda: read_rows(Path("in.jsonl"))}, DataRecipe(), Path("out.jsonl"))
    assert Path("out.jsonl").read_text() == "mine"


TEXT = st.text(min_size=1).filter(lambda text: text.strip() and "\x00" not in text)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)  # fmt: skip
OTHERS = st.dictionaries(st.text().map(lambda name: f"x {name}"), VALUES, max_size=3)
WEIGHTS = st.sampled_from([{}, {"weight": 0}, {"weight": 1}, {"weight": None}])
CALLS = st.builds(
    lambda name, arguments, more, packed: {
        "tool_calls": [{**more, "function": {"name": name, "arguments": packed(arguments)}}]
    },
    TEXT,
    st.dictionaries(st.text(), VALUES, max_size=2),
    st.sampled_from([{}, {"id": "c1", "type": "function"}]),
    st.sampled_from([lambda value: value, json.dumps]),
)
ASKED = st.builds(lambda text, more: {"role": "user", "content": text, **more}, TEXT, OTHERS)
ANSWERED = st.builds(
    lambda text, weight, more: {"content": text, **more, "role": "assistant", **weight}, TEXT, WEIGHTS, CALLS | OTHERS
)
ROUND = st.tuples(ASKED, ANSWERED)
LAST = st.builds(lambda text: {"role": "assistant", "content": text}, TEXT)
CHATS = st.builds(
    lambda rounds, last, tools: {"messages": [*(m for pair in rounds for m in pair), last], **tools},
    st.lists(ROUND, max_size=3),
    LAST,
    st.sampled_from([{}, {"tools": None}, {"tools": [{"type": "function"}]}]),
)
SPOKEN = st.builds(
    lambda asked, answered: {"conversations": [{"from": "human", "value": asked}, {"from": "gpt", "value": answered}]},
    TEXT,
    TEXT,
)
ALPACA = st.fixed_dictionaries({"instruction": TEXT, "output": TEXT}, optional={"input": TEXT | st.none()})
SHAPES = st.one_of(
    CHATS,
    SPOKEN,
    ALPACA,
    st.fixed_dictionaries({"prompt": TEXT, "completion": TEXT}),
    st.fixed_dictionaries({"text": TEXT}),
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(SHAPES, OTHERS)
def test_a_round_trip_loses_nothing(folder: Path, row: dict[str, Any], others: dict[str, Any]) -> None:
    for path in folder.iterdir():
        path.unlink()
    write("in.jsonl", {**others, **row})
    for source, out in (("in", "out"), ("out", "again")):
        convert({"all": lambda: read_rows(Path(f"{source}.jsonl"))}, DataRecipe(), Path(f"{out}.jsonl"))  # noqa: B023
    assert Path("again.jsonl").read_bytes() == Path("out.jsonl").read_bytes()
    (found,) = (json.loads(line) for line in Path("out.jsonl").read_text(encoding="utf-8").split("\n") if line)
    assert {name: found[name] for name in others} == others
    written = json.dumps(found, ensure_ascii=False)
    for text in texts_of(row):
        assert json.dumps(text, ensure_ascii=False)[1:-1] in written


def texts_of(row: dict[str, Any]) -> list[str]:
    """The texts of a row that must be found again."""
    if "messages" in row:
        return [message["content"] for message in row["messages"]]
    if "conversations" in row:
        return [item["value"] for item in row["conversations"]]
    return [text for text in row.values() if text is not None and text.strip()]


def test_progress_counts_every_row() -> None:
    write("in.jsonl", *({"text": f"number {n}"} for n in range(5)))
    seen: list[tuple[str, int, int]] = []
    convert(
        {"all": lambda: read_rows(Path("in.jsonl"))},
        DataRecipe(),
        Path("out.jsonl"),
        lambda *each: seen.append(each),
    )
    assert seen == [("all", done, 5) for done in range(1, 6)]


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("org/name", ("org/name", None, None)),
        ("org/name:train_sft", ("org/name", None, "train_sft")),
        ("openai/gsm8k/main:test[:10%]", ("openai/gsm8k", "main", "test[:10%]")),
    ],
)
def test_parts_of_a_name(name: str, parts: tuple[str, str | None, str | None]) -> None:
    assert parts_of(name) == parts
    with pytest.raises(DataError, match="^name: is no name of a data set; write org/name or org/name:split"):
        parts_of("name")


def test_without_the_library(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError):
        fetch("org/name")
    assert invoke("data", "convert", "org/name", "out") == (
        2,
        "",
        "error: org/name: needs the library `datasets`; install it with `pip install 'mlxtune[datasets]'`\n",
    )


def test_other_commands_say_how_to_fetch(invoke: Invoke) -> None:
    assert invoke("data", "check", "org/name") == (
        2,
        "",
        "error: org/name: no such file or folder; check its name; a data set of the hub is fetched first, by `mlxtune "
        "data convert org/name FOLDER`\n",
    )


@pytest.fixture
def datasets(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The library, with its cache in the test's folder."""
    if importlib.util.find_spec("datasets") is None:
        pytest.skip("needs the library `datasets`, an optional extra")
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    return datasets


@pytest.mark.interop
@pytest.mark.filterwarnings("default")
def test_a_data_set_of_the_hub(datasets: Any) -> None:
    pair = {"prompt": "Hi", "completion": "Hello", "id": 1}
    write("set/train.jsonl", pair, pair | {"id": 2})
    write("set/validation.jsonl", pair)
    found = fetch("set")
    assert {split: [row.value for row in rows] for split, rows in found.items()} == {
        "train": [pair, pair | {"id": 2}],
        "valid": [pair],
    }
    assert found["train"][1].where == "set:train:2"
    convert({split: lambda rows=rows: rows for split, rows in found.items()}, DataRecipe(), Path("out"))
    assert read("out/train.jsonl")[1] == {"messages": [USER, ANSWER], "id": 2}
    write("one/train.jsonl", pair)
    assert list(fetch("one")) == ["all"]


@pytest.mark.interop
@pytest.mark.filterwarnings("default")
def test_what_the_hub_does_not_give(datasets: Any) -> None:
    with pytest.raises(HubError, match="^nobody/nothing: cannot be fetched: .*; check the name, the network"):
        fetch("nobody/nothing")
    Path("set").mkdir()
    with pytest.raises((HubError, DataError), match="^set: cannot be"):
        fetch("set")
