"""`mlxtune data preview`: rows as a model sees them, marked; as JSON; rows that training would refuse."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Invoke = Callable[..., tuple[int, str, str]]
WriteRows = Callable[..., Path]


def chat(*contents: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[n % 2], "content": content} for n, content in enumerate(contents)]}


def test_what_is_learned_is_marked(invoke: Invoke, write_rows: WriteRows, tmp_path: Path) -> None:
    file = write_rows(
        tmp_path / "chats.jsonl", rows=[chat("hi", "hello", "and?", "no"), chat("bye", "so long"), chat("x", "y")]
    )
    assert invoke("data", "preview", file, "--model", "tiny", "-n", 2) == (
        0,
        f"{file}:1  26 tokens, 5 learned\n"
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n⟦hello<|im_end|>⟧\n"
        "<|im_start|>user\nand?<|im_end|>\n<|im_start|>assistant\n⟦no<|im_end|>⟧\n"
        f"\n{file}:2  14 tokens, 3 learned\n"
        "<|im_start|>user\nbye<|im_end|>\n<|im_start|>assistant\n⟦so long<|im_end|>⟧\n",
        "",
    )  # fmt: skip


def test_json_has_every_token(invoke: Invoke, write_rows: WriteRows, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "chats.jsonl", 5)
    code, out, err = invoke("data", "preview", file, "--model", "tiny", "--json")
    assert (code, err) == (0, "")
    found = [json.loads(line) for line in out.splitlines()]
    assert [each["line"] for each in found] == [1, 2, 3]
    for each in found:
        assert each.keys() == {"line", "text", "tokens", "trained", "notes"}
        assert len(each["tokens"]) == len(each["trained"])
        assert each["text"].startswith("<|im_start|>user\n")
        assert each["notes"] == []


def test_what_is_cut_is_said(invoke: Invoke, write_rows: WriteRows, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "chats.jsonl", rows=[chat("one two three four five six " * 9, "seven")])
    args = ("data", "preview", file, "--model", "tiny", "--max-seq-length", 30)
    code, out, _ = invoke(*args, "--set", "data.too_long=truncate")
    assert code == 0
    assert f"{file}:1  30 tokens, 3 learned\n" in out
    assert out.endswith("<|im_start|>assistant\n⟦seven<|im_end|>⟧\n  55 tokens cut from the left of the prompt\n")
    code, out, _ = invoke(*args, "--set", "data.too_long=drop")
    assert (code, out) == (0, f"{file}:1\n  left out: 1 too long, left out\n")


def test_a_row_that_training_would_refuse(invoke: Invoke, write_rows: WriteRows, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "chats.jsonl", rows=[chat("a", "b"), chat("what is <|im_end|>?", "a mark")])
    code, out, err = invoke("data", "preview", file, "--model", "tiny")
    assert (code, err) == (2, "")
    reason = "refused: holds the text '<|im_end|>', which this tokenizer reads as a control token; delete it"
    assert out.endswith(f"\n{file}:2\n  {reason}\n")
    code, out, _ = invoke("data", "preview", file, "--model", "tiny", "--json")
    assert code == 2
    assert json.loads(out.splitlines()[1]) == {"line": 2, "text": None, "tokens": [], "trained": [], "notes": [reason]}


def test_what_a_terminal_would_obey_is_spelt_out(invoke: Invoke, write_rows: WriteRows, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "chats.jsonl", rows=[chat("a\x1b[31m", "b")])
    out = invoke("data", "preview", file, "--model", "tiny")[1]
    assert "\x1b" not in out
    assert "a\\x1b[31m" in out


def test_a_model_without_a_template_gets_the_plain_one(
    invoke: Invoke, write_rows: WriteRows, tmp_path: Path, stories: Path
) -> None:
    file = write_rows(tmp_path / "chats.jsonl", rows=[chat("a", "b")])
    out = invoke("data", "preview", file, "--model", stories)[1]
    assert "### User:\na\n\n### Assistant:\n⟦b</s>⟧" in out


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["nowhere.jsonl"], "nowhere.jsonl: no such file or folder"),
        ([], "data.path: is not set"),
        (["tickets", "-n", "0"], "Invalid value for '-n'"),
    ],
)
def test_wrong_input(invoke: Invoke, args: list[str], line: str) -> None:
    code, out, err = invoke("data", "preview", *args, "--model", "tiny")
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {line}")
