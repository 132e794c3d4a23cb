"""A corpus of malformed files: each is refused with its name, its line where it has lines, and what to do.

Every file goes through the real command, so that nothing between a file and the terminal lets one through.
"""

import contextlib
import gzip
import io
import json
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mlxtune.cli import main
from mlxtune.data import load
from mlxtune.errors import DataError
from mlxtune.recipe import DataRecipe

Check = Callable[[str], tuple[int, str]]
GOOD = '{"prompt": "Where is it?", "completion": "On its way."}'
USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello"}


@pytest.fixture
def check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[[str], tuple[int, str]]]:
    """Runs `mlxtune data check` on a file of the working folder; returns its exit code and all that it prints."""
    monkeypatch.chdir(tmp_path)
    handler = signal.getsignal(signal.SIGTERM)

    def call(name: str) -> tuple[int, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main(["data", "check", name])
        return int(caught.value.code or 0), "".join(capsys.readouterr())

    yield call
    signal.signal(signal.SIGTERM, handler)


def lines(*rows: Any) -> bytes:
    """JSONL of rows, or of lines as they are."""
    return "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows).encode() + b"\n"


def chat(*messages: Any, **columns: Any) -> bytes:
    """Three good rows and, in line 2, the conversation in question."""
    return lines(*([{"messages": [USER, ANSWER]}] * 1), {"messages": list(messages), **columns}, *GOOD_CHATS)


def answer(**keys: Any) -> dict[str, Any]:
    return {**ANSWER, **keys}


def call(**function: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": function}]}


def conversation(*items: Any) -> bytes:
    return lines({"conversations": list(items)})


def parquet(columns: dict[str, Any], **options: Any) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.table(columns), out, **options)
    return out.getvalue()


def bad_utf8_parquet() -> bytes:
    """A Parquet file whose third text is no UTF-8."""
    texts = pa.array([b"fine", b"good", b"caf\xe9"], pa.binary())
    return parquet({"text": pa.Array.from_buffers(pa.string(), 3, texts.buffers())})


def twice_named_parquet() -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], ["text", "text"]), out)
    return out.getvalue()


def deep_parquet() -> bytes:
    """A Parquet file whose footer is 20,000 lists, each in the one before."""
    footer = b"\x19" * 20_000
    return b"PAR1" + footer + len(footer).to_bytes(4, "little") + b"PAR1"


def corrupt(data: bytes, at: int, count: int) -> bytes:
    return data[:at] + b"\xff" * count + data[at + count :]


GOOD_CHATS = [{"messages": [{**USER, "content": word}, ANSWER]} for word in ("Who?", "How?")]
PARQUET = parquet({"text": [f"text number {n}" for n in range(500)]})
PACKED = gzip.compress(lines(*([GOOD] * 50), *(json.dumps({"prompt": str(n), "completion": "x"}) for n in range(500))))
CSV = b"prompt,completion\n"

# name: (content, the place that is named, what is said of it)
CORPUS: dict[str, tuple[str, bytes, str, str]] = {
    # encodings
    "UTF-16 with its mark": ("a.jsonl", GOOD.encode("utf-16"), "", "is UTF-16, not UTF-8"),
    "UTF-32 with its mark": ("a.jsonl", GOOD.encode("utf-32"), "", "is UTF-32, not UTF-8"),
    "UTF-16 without a mark": ("a.csv", "text,label\na,b\n".encode("utf-16-le"), "", "holds NUL bytes"),
    "Latin-1": ("a.jsonl", lines(GOOD) + '{"text": "café"}'.encode("latin-1"), ":2", "is not UTF-8"),
    "Latin-1 CSV": ("a.csv", CSV + "who,café\n".encode("latin-1"), ":2", "is not UTF-8"),
    "Latin-1 JSON": ("a.json", '[\n{"text": "café"}]'.encode("latin-1"), ":2", "is not UTF-8"),
    "half a character in an escape": ("a.jsonl", lines(GOOD, r'{"text": "\ud83d"}'), ":2", "half a character"),
    "half a character in UTF-8": ("a.jsonl", lines(GOOD) + b'{"text": "\xed\xa0\xbd"}', ":2", "is not UTF-8"),
    "a cut character at the end": ("a.jsonl", lines(GOOD) + '{"text": "é'.encode()[:-1], ":2", "is not UTF-8"),
    "NUL in a line": ("a.jsonl", lines(GOOD, '{"text": "a\x00b"}'), ":2", "Invalid control character"),
    "NUL as an escape": ("a.jsonl", lines({"text": "one"}, {"text": "a\x00b"}), ":2", "holds a NUL character"),
    "NUL in CSV": ("a.csv", CSV + b"who,a\x00b\n", ":2", "holds a NUL character"),
    "a file of NUL bytes": ("a.jsonl", bytes(4096), "", "holds NUL bytes"),
    "a second byte order mark": ("a.jsonl", lines(GOOD, "\ufeff" + GOOD), ":2", "not valid JSON"),
    # JSON
    "a line cut off": ("a.jsonl", lines(GOOD, GOOD[:-10]), ":2", "Unterminated string"),
    "two objects on a line": ("a.jsonl", lines(GOOD, GOOD + GOOD), ":2", "not valid JSON: Extra data"),
    "single quotes": ("a.jsonl", lines(GOOD, "{'text': 'one'}"), ":2", "property name enclosed in double quotes"),
    "a comma too many": ("a.jsonl", lines(GOOD, '{"text": "one",}'), ":2", "not valid JSON"),
    "NaN": ("a.jsonl", lines(GOOD, '{"text": "one", "score": NaN}'), ":2", "NaN is not a JSON number"),
    "Infinity": ("a.jsonl", lines(GOOD, '{"text": "one", "score": -Infinity}'), ":2", "-Infinity is not a JSON"),
    "a number beyond floats": ("a.jsonl", lines(GOOD, '{"text": "one", "n": 1e999}'), ":2", "1e999 is too large"),
    "a number of 5000 digits": ("a.jsonl", lines(GOOD, f'{{"n": {"9" * 5000}}}'), ":2", "thousands of digits"),
    "a key twice": ("a.jsonl", lines(GOOD, '{"text": "one", "text": "two"}'), ":2", "the key 'text' comes twice"),
    "a key twice, deep": (
        "a.jsonl",
        chat(USER, ANSWER).replace(b'"content": "Hi"', b'"content": "Hi", "content": "Ho"', 1),
        ":1",
        "the key 'content' comes twice",
    ),
    "100 000 open brackets": ("a.jsonl", lines(GOOD, "[" * 100_000), ":2", "lists and objects more than 100 deep"),
    "100 000 objects in each other": ("a.jsonl", lines(GOOD, '{"a":' * 100_000), ":2", "more than 100 deep"),
    "brackets 300 deep": ("a.jsonl", lines(GOOD, '{"text": ' + "[" * 300 + "]" * 300 + "}"), ":2", "100 deep"),
    "brackets in a list file": ("a.json", b"[" * 100_000 + b"]" * 100_000, "", "more than 100 deep"),
    "a line of 17 MB": ("a.jsonl", lines(GOOD, {"text": "x" * (17 << 20)}), ":2", "is a row of 17,825,805 bytes"),
    "a list, not an object": ("a.jsonl", lines(GOOD, '["Where?", "There."]'), ":2", "is a JSON list, not an object"),
    "a text, not an object": ("a.jsonl", lines(GOOD, '"Where?"'), ":2", "is a JSON string, not an object"),
    "null, not an object": ("a.jsonl", lines(GOOD, "null"), ":2", "is a JSON null, not an object"),
    "a list file of an object": ("a.json", b'{"train": [{"text": "one"}]}', "", "is a JSON object, not a list"),
    "a list file of texts": ("a.json", b'[{"text": "one"}, "two"]', ":2", "is a JSON string, not an object"),
    "a list file cut off": ("a.json", b'[\n{"text": "one"},\n{"text": ', ":3", "not valid JSON: Expecting value"),
    "JSONL named JSON": ("a.json", lines(GOOD, GOOD), ":2", "not valid JSON: Extra data"),
    "a JSON list named JSONL": ("a.jsonl", json.dumps([{"text": "one"}], indent=1).encode(), ":1", "not valid JSON"),
    # empty
    "an empty file": ("a.jsonl", b"", "", "has no rows"),
    "blank lines alone": ("a.jsonl", b"\n \r\n\n", "", "has no rows"),
    "a mark alone": ("a.jsonl", b"\xef\xbb\xbf", "", "has no rows"),
    "an empty list": ("a.json", b"[]", "", "has no rows"),
    "an empty list file": ("a.json", b"", "", "has no rows"),
    "a header alone": ("a.csv", CSV, "", "has no rows"),
    "an empty gzip": ("a.jsonl.gz", b"", "", "has no rows"),
    "a gzip of nothing": ("a.jsonl.gz", gzip.compress(b""), "", "has no rows"),
    "a Parquet file of no rows": ("a.parquet", parquet({"text": pa.array([], pa.string())}), "", "has no rows"),
    # CSV
    "a column too many": ("a.csv", CSV + b"who,me\nwho,me,you\n", ":3", "has 3 columns, not the 2 of"),
    "a column too few": ("a.csv", CSV + b"who\n", ":2", "has 1 column, not the 2 of the header"),
    "an open quote": ("a.csv", CSV + b'"who,me\nwhere,there\n', ":2", "not valid CSV: unexpected end of data"),
    "a stray quote": ("a.csv", CSV + b'who,me\n"who" is,me\n', ":3", "not valid CSV"),
    "a column twice": ("a.csv", b"text,text\none,two\n", ":1", "has the column `text` twice"),
    "semicolons": ("a.csv", b"prompt;completion\nwho;me\n", ":1", "has columns separated by semicolons"),
    "tabs": ("a.csv", b"prompt\tcompletion\nwho\tme\n", ":1", "has columns separated by tabs"),
    "an empty cell": ("a.csv", CSV + b"who,\n", ":2", "`completion` is empty"),
    "a cell of 17 MB": ("a.csv", CSV + b"who," + b"x" * (17 << 20) + b"\n", ":2", "field larger than field limit"),
    "no header": ("a.csv", b"Where is it?,late\nMoney back,refund\n", ":2", "has the columns `Where is it?`, `late`"),
    # packed and named wrongly
    "a gzip cut off": ("a.jsonl.gz", PACKED[:-300], "", "is a gzip that ends too early"),
    "a damaged gzip": ("a.jsonl.gz", corrupt(PACKED, 200, 40), "", "is a damaged gzip"),
    "a gzip with a wrong sum": ("a.jsonl.gz", corrupt(PACKED, len(PACKED) - 8, 4), "", "is a damaged gzip"),
    "text named gzip": ("a.jsonl.gz", lines(GOOD), "", "is not compressed with gzip"),
    "gzip named text": ("a.jsonl", PACKED, "", "is compressed with gzip, which its name does not say"),
    "compressed twice": ("a.jsonl.gz", gzip.compress(PACKED), "", "is compressed twice"),
    "a gzip of Latin-1": ("a.jsonl.gz", gzip.compress(b'{"text": "caf\xe9"}'), ":1", "is not UTF-8"),
    "ZIP": ("a.csv", b"PK\x03\x04" + bytes(100), "", "is a ZIP archive, as Excel files are"),
    "Zstandard": ("a.jsonl", b"\x28\xb5\x2f\xfd" + bytes(100), "", "is compressed with Zstandard"),
    "a pointer of Git LFS": (
        "a.jsonl",
        b"version https://git-lfs.github.com/spec/v1\noid x\n",
        "",
        "pointer of Git LFS",
    ),
    "an unknown suffix": ("a.txt", lines(GOOD), "", "has the unknown suffix '.txt'"),
    "no suffix": ("rows", lines(GOOD), "", "has the unknown suffix ''"),
    # Parquet
    "text named Parquet": ("a.parquet", lines(GOOD), "", "is no Parquet file"),
    "Parquet named text": ("a.jsonl", PARQUET, "", "is a Parquet file, not JSONL"),
    "Parquet cut off": ("a.parquet", PARQUET[:-20], "", "is a damaged Parquet file"),
    "Parquet without its middle": ("a.parquet", corrupt(PARQUET, 4, 400), "", "is a damaged Parquet file"),
    "Parquet with a damaged foot": ("a.parquet", corrupt(PARQUET, len(PARQUET) - 120, 60), "", "damaged Parquet file"),
    "four letters of Parquet": ("a.parquet", b"PAR1", "", "is a damaged Parquet file"),
    "Parquet with a foot of lists in lists": ("a.parquet", deep_parquet(), "", "is a damaged Parquet file"),
    "Parquet with text that is none": ("a.parquet", bad_utf8_parquet(), ":3", "holds bytes that are not UTF-8"),
    "Parquet with a column twice": ("a.parquet", twice_named_parquet(), "", "has the column `text` twice"),
    "Parquet with a gap": ("a.parquet", parquet({"text": ["one", None]}), ":2", "`text` is None, not a text"),
    "Parquet of numbers": ("a.parquet", parquet({"text": [1, 2]}), ":1", "`text` is 1, not a text"),
    # formats
    "unknown columns": (
        "a.jsonl",
        lines({"question": "Who?", "answer": "Me."}),
        ":1",
        "`question`, `answer`; expected",
    ),
    "a row of no columns": ("a.jsonl", lines("{}"), ":1", "has the columns none"),
    "two formats": (
        "a.jsonl",
        lines(GOOD, GOOD, {"text": "one"}),
        ":3",
        "has the columns `text`; the other rows of this file have `prompt` + `completion`",
    ),
    "a row without its answer": ("a.jsonl", lines(GOOD, GOOD, {"prompt": "Who?"}), ":3", "has the columns `prompt`"),
    "a completion that is a list": (
        "a.jsonl",
        lines(GOOD, {"prompt": "Who?", "completion": ["Me."]}),
        ":2",
        "`completion` is ['Me.'], not a text",
    ),
    "white space for a text": ("a.jsonl", lines({"text": " \n "}), ":1", "`text` is empty"),
    "Alpaca without an answer": ("a.jsonl", lines({"instruction": "Sum up", "output": ""}), ":1", "`output` is empty"),
    "Alpaca with a number": (
        "a.jsonl",
        lines({"instruction": "Add", "input": 3, "output": "4"}),
        ":1",
        "`input` is 3, not a text",
    ),
    "Alpaca with a history": (
        "a.jsonl",
        lines({"instruction": "And then?", "output": "4", "history": [["a", "b"]]}),
        ":1",
        "has a `history`, which is not read",
    ),
    # messages
    "no messages": ("a.jsonl", chat(), ":2", "`messages` is no list of messages"),
    "messages that are text": ("a.jsonl", lines({"messages": "Hi"}), ":1", "`messages` is no list of messages"),
    "a message that is text": ("a.jsonl", chat("Hi", ANSWER), ":2", "message 1 has the role 'Hi'"),
    "an unknown role": ("a.jsonl", chat({**USER, "role": "human"}, ANSWER), ":2", "message 1 has the role 'human'"),
    "a role that is a list": ("a.jsonl", chat({**USER, "role": ["user"]}, ANSWER), ":2", "has the role ['user']"),
    "no role": ("a.jsonl", chat({"content": "Hi"}, ANSWER), ":2", "message 1 has the role None"),
    "no content": ("a.jsonl", chat({"role": "user"}, ANSWER), ":2", "message 1 has the content None, not a text"),
    "an image": (
        "a.jsonl",
        chat({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, ANSWER),
        ":2",
        "message 1 has a part of the type 'image_url'",
    ),
    "an empty answer": ("a.jsonl", chat(USER, answer(content=" ")), ":2", "message 2, an answer, is empty"),
    "no answer": ("a.jsonl", chat(USER), ":2", "ends with the user"),
    "a question last": ("a.jsonl", chat(USER, ANSWER, USER), ":2", "ends with the user"),
    "a weight of a half": ("a.jsonl", chat(USER, answer(weight=0.5)), ":2", "message 2 has the weight 0.5"),
    "a weight of true": ("a.jsonl", chat(USER, answer(weight=True)), ":2", "message 2 has the weight True"),
    "nothing to learn": ("a.jsonl", chat(USER, answer(weight=0)), ":2", "every answer has the weight 0"),
    "a thought that is a list": ("a.jsonl", chat(USER, answer(reasoning_content=[1])), ":2", "reasoning_content [1]"),
    # tools
    "calls that are text": ("a.jsonl", chat(USER, answer(tool_calls="f()")), ":2", "tool_calls 'f()', not a list"),
    "a call that is text": ("a.jsonl", chat(USER, answer(tool_calls=["f()"])), ":2", "tool call 1, is 'f()'"),
    "a call without a name": ("a.jsonl", chat(USER, call(arguments={})), ":2", "tool call 1, has the name None"),
    "arguments cut off": (
        "a.jsonl",
        chat(USER, call(name="f", arguments='{"city": "Par')),
        ":2",
        'has the arguments \'{"city": "Par\', no JSON object',
    ),
    "arguments with NaN": ("a.jsonl", chat(USER, call(name="f", arguments='{"a": NaN}')), ":2", "no JSON object"),
    "arguments with half a character": (
        "a.jsonl",
        chat(USER, call(name="f", arguments=r'{"a": "\ud83d"}')),
        ":2",
        "no JSON object",
    ),
    "arguments with a key twice": (
        "a.jsonl",
        chat(USER, call(name="f", arguments='{"a": 1, "a": 2}')),
        ":2",
        "no JSON object",
    ),
    "arguments 300 deep": (
        "a.jsonl",
        chat(USER, call(name="f", arguments='{"a": ' + "[" * 300 + "]" * 300 + "}")),
        ":2",
        "no JSON object",
    ),
    "arguments that are a list": ("a.jsonl", chat(USER, call(name="f", arguments=[1])), ":2", "arguments [1], no JSON"),
    "a user who calls": (
        "a.jsonl",
        chat({**call(name="f"), "role": "user"}, ANSWER),
        ":2",
        "of the user, calls a tool",
    ),
    "the old function_call": ("a.jsonl", chat(USER, answer(function_call={"name": "f"})), ":2", "a `function_call`"),
    "a result that is an object": (
        "a.jsonl",
        chat(USER, call(name="f"), {"role": "tool", "content": {"t": 3}}, ANSWER),
        ":2",
        "message 3 has the content {'t': 3}, not a text",
    ),
    "tools that are no list": ("a.jsonl", chat(USER, ANSWER, tools={"name": "f"}), ":2", "`tools` is no list"),
    "tools as broken JSON": ("a.jsonl", chat(USER, ANSWER, tools="[{"), ":2", "`tools` is no list"),
    # ShareGPT
    "no conversation": ("a.jsonl", conversation(), ":1", "`conversations` is no list of messages"),
    "an unknown speaker": (
        "a.jsonl",
        conversation({"from": "alien", "value": "Hi"}),
        ":1",
        "message 1 is from 'alien'",
    ),
    "a value that is a number": (
        "a.jsonl",
        conversation({"from": "human", "value": "Hi"}, {"from": "gpt", "value": 3}),
        ":1",
        "message 2 has the value 3, not a text",
    ),
    "no speaker": ("a.jsonl", conversation({"value": "Hi"}), ":1", "message 1 is from None"),
}


def test_it_is_a_corpus() -> None:
    assert len(CORPUS) >= 40


@pytest.mark.parametrize("case", CORPUS)
def test_it_is_refused_with_its_place_and_advice(check: Check, tmp_path: Path, case: str) -> None:
    name, content, place, said = CORPUS[case]
    (tmp_path / name).write_bytes(content)
    code, printed = check(name)
    assert code == 2
    assert said in printed
    assert f"{name}{place}" in printed
    assert "Traceback" not in printed
    if printed.startswith("error: "):  # the file cannot be read at all: one line
        assert printed.count("\n") == 1
        _, _, advice = printed.partition("; ")
    else:
        _, _, advice = printed.partition("→ ")
    assert len(advice.strip()) > 8
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_a_folder_named_like_a_file(check: Check, tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    code, printed = check(name)
    assert (code, printed) == (
        2,
        f"error: {name}: has no train, valid or test file; name the rows to learn from train.jsonl\n",
    )


def test_every_malformed_row_is_found_in_one_pass(check: Check, tmp_path: Path) -> None:
    other = {"prompt": "Can I pay by card?", "completion": "You can."}
    (tmp_path / "a.jsonl").write_bytes(lines(GOOD, "{", {"text": "one"}, other, '{"prompt": NaN}') + b'{"a": "\xe9"}')
    code, printed = check("a.jsonl")
    assert code == 2
    assert all(f"a.jsonl:{number}" in printed for number in (2, 3, 5, 6))
    assert not any(f"a.jsonl:{number}" in printed for number in (1, 4))


TWINS: dict[str, tuple[str, bytes]] = {
    "a mark, CRLF, blank lines": ("a.jsonl", b"\xef\xbb\xbf" + GOOD.encode() + b"\r\n\r\n\n  \n"),
    "no line break at the end": ("a.jsonl", GOOD.encode()),
    "CRLF CSV with a mark": ("a.csv", b"\xef\xbb\xbfprompt,completion\r\nwho,me\r\n\r\n"),
    "quotes, commas, line breaks in CSV": ("a.csv", CSV + b'"who, ""he""\nsaid","me"\n5" pipe,yes\n'),
    "line separators inside a text": ("a.jsonl", lines(json.dumps({"text": "a\u2028b\u0085c"}, ensure_ascii=False))),
    "whole characters in two escapes": ("a.jsonl", lines(r'{"text": "\ud83d\ude00 \\ud83d"}')),
    "brackets 90 deep": ("a.jsonl", lines('{"text": "one", "meta": ' + "[" * 90 + "]" * 90 + "}")),
    "a text of 5 MB": ("a.jsonl", lines({"text": "x" * (5 << 20)})),
    "a JSON list over lines": ("a.json", json.dumps([json.loads(GOOD)], indent=2).encode()),
    "gzip": ("a.jsonl.gz", PACKED),
    "gzip in two parts": ("a.jsonl.gz", gzip.compress(lines(GOOD)) + gzip.compress(lines(GOOD))),
    "gzip of CSV": ("a.csv.gz", gzip.compress(CSV + b"who,me\n")),
    "Parquet": ("a.parquet", PARQUET),
    "gzip of Parquet": ("a.parquet.gz", gzip.compress(PARQUET)),
    "capital letters": ("A.JSONL.GZ", PACKED),
    "gaps where a row has another format's columns": (
        "a.jsonl",
        lines({**json.loads(GOOD), "messages": None}, {**json.loads(GOOD), "text": None}),
    ),
    "an answer that only calls a tool": ("a.jsonl", chat(USER, call(name="f", arguments='{"city": "Paris"}'))),
}


@pytest.mark.parametrize("case", TWINS)
def test_its_good_twin_passes(check: Check, tmp_path: Path, case: str) -> None:
    name, content = TWINS[case]
    (tmp_path / name).write_bytes(content)
    code, printed = check(name)
    assert code == 0, printed


RICH = [
    json.loads(GOOD),
    {"messages": [USER, call(name="f", arguments="{}"), {"role": "tool", "content": "3"}, answer(weight=1)]},
    {"conversations": [{"from": "human", "value": "Hi é"}, {"from": "gpt", "value": "Hello"}]},
    {"instruction": "Sum up", "input": "x", "output": "y", "n": 1.5},
]
SEEDS = {
    "a.jsonl": lines(*RICH),
    "a.json": json.dumps(RICH).encode(),
    "a.csv": CSV + b'"who, ""he""",me\r\nwhere,there\n',
    "a.jsonl.gz": gzip.compress(lines(*RICH)),
    "a.parquet": parquet({"messages": [[USER, ANSWER]] * 50, "n": list(range(50))}),
}
TOKENS = (b"null", b"[]", b"{}", b"1", b'"x"', b"\x00", b'"', b",", b"\n", b"\xff", b"\\u0000", b"\\ud800", b"1e999")


@pytest.mark.parametrize("name", SEEDS)
def test_damaged_bytes_raise_nothing_else(tmp_path: Path, name: str) -> None:
    draw = random.Random(0)
    path = tmp_path / name
    for _ in range(400):
        data = bytearray(SEEDS[name])
        for _ in range(draw.randint(1, 5)):
            place = draw.randrange(len(data))
            new = draw.choice([draw.randbytes(1), draw.choice(TOKENS), bytes(data[place : place + 20])])
            data[place : place + draw.choice([0, 1, 1, 8])] = new
        path.write_bytes(data)
        with contextlib.suppress(DataError):
            load.read_examples(path, DataRecipe())


def gzip_bomb(path: Path) -> None:
    """4 GB of zeros in 4 MB."""
    path.write_bytes(gzip.compress(bytes(64 << 20)) * 64)


def nested_gzip_bomb(path: Path) -> None:
    """One row of 4 GB."""
    zeros = gzip.compress(b"0" * (64 << 20))
    path.write_bytes(gzip.compress(b'{"text": "') + zeros * 64 + gzip.compress(b'"}\n'))


def rows_bomb(path: Path) -> None:
    """1.2 thousand million rows of one column, a run of equal values."""
    group = pa.table({"text": pa.nulls(100_000_000)})
    with pq.ParquetWriter(path, group.schema) as writer:
        for _ in range(12):
            writer.write_table(group, row_group_size=len(group))


def values_bomb(path: Path) -> None:
    """2,000 rows that share one text of 20 MB: 40 GB in 2 kB."""
    shared = pa.DictionaryArray.from_arrays(pa.array([0] * 2000, pa.int32()), pa.array(["x" * 20_000_000]))
    pq.write_table(pa.table({"text": shared}), path, compression="zstd")


def deltas_bomb(path: Path) -> None:
    """As `values_bomb`, each text written as the same beginning as the one before."""
    table = pa.table({"text": pa.array(["x" * 4_000_000] * 60)})
    options = {"use_dictionary": False, "column_encoding": {"text": "DELTA_BYTE_ARRAY"}}
    pq.write_table(table, path, compression="zstd", write_statistics=False, **options)


MEASURE = """
import resource, sys
from mlxtune.data.files import scan_rows
from mlxtune.errors import DataError
from pathlib import Path
try:
    scan_rows(Path(sys.argv[1]))
except DataError as error:
    print(error)
if sys.platform == "linux":  # what getrusage says there begins with the process that forked this one
    peak = Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]
    print(int(peak) / 1e3)
else:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)
"""


@pytest.mark.parametrize(
    ("name", "make", "expected"),
    [
        ("zeros.jsonl.gz", gzip_bomb, "decodes to more than 0."),
        ("row.jsonl.gz", nested_gzip_bomb, "decodes to more than 0."),
        ("zeros.json.gz", gzip_bomb, "decodes to more than 0."),
        ("rows.parquet", rows_bomb, "decodes to more than 0."),
        ("values.parquet", values_bomb, "decodes to more than 0."),
        ("deltas.parquet", deltas_bomb, "has the column `text` in an encoding whose size cannot be told"),
    ],
)
def test_a_bomb_is_refused_before_it_is_unpacked(
    tmp_path: Path, name: str, make: Callable[[Path], None], expected: str
) -> None:
    path = tmp_path / name
    make(path)
    assert path.stat().st_size < 6e6
    done = subprocess.run([sys.executable, "-c", MEASURE, str(path)], capture_output=True, text=True, timeout=60)
    said, peak = done.stdout.splitlines()
    assert done.stderr == ""
    assert said.startswith(f"{path}: {expected}")
    assert "; look at what it holds" in said or "; write it again" in said
    assert float(peak) < 350, f"{peak} MB"
