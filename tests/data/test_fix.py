import json
from pathlib import Path
from typing import Any

import pytest

from mlxtune.data.audit import Table, audit, read
from mlxtune.data.files import check_target
from mlxtune.data.fix import Change, fix, redact_map
from mlxtune.data.fix import write as write_fixed
from mlxtune.data.formats import Completion, Example
from mlxtune.errors import DataError, OutputError
from mlxtune.recipe import DataRecipe


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def row(prompt: str, answer: str = "an answer") -> dict[str, str]:
    return {"prompt": prompt, "completion": answer}


def table(label: str | None = None, data: DataRecipe | None = None, **files: Path) -> Table:
    return read(files, data or DataRecipe(), label)


def hide(example: Example) -> tuple[Example, dict[str, str]]:
    """Hides the name Bob."""
    assert isinstance(example, Completion)
    if "Bob" not in example.prompt:
        return example, {}
    return Completion(example.prompt.replace("Bob", "[NAME_1]"), example.completion), {"[NAME_1]": "Bob"}


def test_copies_are_left_out_and_labels_spelt_one_way(tmp_path: Path) -> None:
    source = write(
        tmp_path / "a.jsonl",
        *(row(prompt, "refund") for prompt in ("one", "two")),
        row("three", "Refund "),
        row("One!", "refund"),
        row("one", "Refund"),
        row("one", "late"),
    )
    before = source.read_bytes()
    fixed = fix(table("(?s)(.*)", all=source))
    assert fixed.rows == {
        "all": [row("one", "refund"), row("two", "refund"), row("three", "refund"), row("one", "late")]
    }
    assert fixed.changes == (
        Change("label respelt: 'Refund ' → 'refund'", 1, (f"{source}:3",)),
        Change("label respelt: 'Refund' → 'refund'", 1, (f"{source}:5",)),
        Change("left out: duplicate", 2, (f"{source}:4", f"{source}:5")),
    )
    assert (fixed.read, fixed.count) == (6, 4)
    out = tmp_path / "clean.jsonl"
    assert write_fixed(fixed, out) == [out]
    assert [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()] == fixed.rows["all"]
    assert source.read_bytes() == before
    left = audit({"all": out}, DataRecipe(), "(?s)(.*)").findings
    assert [f.kind for f in left if f.kind != "label"] == ["contradiction"]  # no label is chosen for the user
    assert fix(table("(?s)(.*)", all=out)).changes == ()


def test_only_the_label_in_an_answer_is_changed(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", row("1", "late\nSorry."), row("2", "late\nOh."), row("3", "Late\nLate again."))
    fixed = fix(table(r"\A(\w+)", all=source))
    assert fixed.rows["all"][2] == row("3", "late\nLate again.")


def test_labels_that_only_look_alike_stay(tmp_path: Path) -> None:
    rows = [row(f"{n} {'x' * n}", "refund_request" if n else "refund_requests") for n in range(5)]
    fixed = fix(table("(.+)", all=write(tmp_path / "a.jsonl", *rows)))
    assert (fixed.rows["all"], fixed.changes) == (rows, ())


def test_the_label_of_a_conversation(tmp_path: Path) -> None:
    def chat(question: str, label: str) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": label}]}

    source = write(tmp_path / "a.jsonl", chat("one", "late"), chat("two", "late"), chat("three", "LATE"))
    assert fix(table("(.+)", all=source)).rows["all"] == [chat(each, "late") for each in ("one", "two", "three")]


def test_the_label_of_a_tool_call_stays(tmp_path: Path) -> None:
    def chat(question: str, name: str) -> dict[str, Any]:
        call = {"function": {"name": name, "arguments": {}}}
        answer = {"role": "assistant", "content": "", "tool_calls": [call]}
        return {"messages": [{"role": "user", "content": question}, answer]}

    rows = [chat("one", "find"), chat("two", "find"), chat("three", "Find")]
    fixed = fix(table(r'"name":"(\w+)"', all=write(tmp_path / "a.jsonl", *rows)))
    assert (fixed.rows["all"], fixed.changes) == (rows, ())


def test_splits_become_a_folder_and_keep_what_they_share(tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", row("one"), row("one"), row("two"))
    test = write(tmp_path / "test.jsonl", row("one"))
    fixed = fix(table(train=train, test=test))
    out = tmp_path / "out"
    assert write_fixed(fixed, out) == [out / "train.jsonl", out / "test.jsonl"]
    assert sorted(path.name for path in out.iterdir()) == ["test.jsonl", "train.jsonl"]
    assert fixed.rows == {"train": [row("one"), row("two")], "test": [row("one")]}


def test_malformed_rows_are_left_out_and_said(tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text('{"prompt": "one", "completion": "two"}\nno json\n', encoding="utf-8")
    fixed = fix(table(all=source))
    assert (fixed.read, fixed.count) == (2, 1)
    assert fixed.changes == (Change("left out: malformed", 1, (f"{source}:2",)),)
    source.write_text("no json\n", encoding="utf-8")
    with pytest.raises(DataError, match="not valid JSON"):
        fix(table(all=source))


def test_personal_data_is_replaced_and_the_map_names_rows_of_the_copy(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", row("one"), row("one"), row("it is Bob"), row("two"))
    fixed = fix(table(all=source), redact=hide)
    assert fixed.rows["all"] == [row("one"), row("it is [NAME_1]"), row("two")]
    assert fixed.changes[1:] == (Change("personal data replaced", 1, (f"{source}:3",)),)
    assert redact_map(fixed, tmp_path / "b.jsonl") == {f"{tmp_path / 'b.jsonl'}:2": {"[NAME_1]": "Bob"}}
    splits = fix(table(train=source), redact=hide)
    assert redact_map(splits, tmp_path / "b") == {f"{tmp_path / 'b' / 'train.jsonl'}:2": {"[NAME_1]": "Bob"}}


def test_the_column_to_group_by_stays(tmp_path: Path) -> None:
    rows = [{**row(f"say {n}"), "who": who, "other": n} for n, who in enumerate(["Bob", "Eve", "Bob"])]
    found = table(all=write(tmp_path / "a.jsonl", *rows))
    assert [each["who"] for each in fix(found, "who").rows["all"]] == ["Bob", "Eve", "Bob"]
    assert [each["who"] for each in fix(found, "who", hide).rows["all"]] == [1, 2, 1]
    assert all("other" not in each for each in fix(found, "who").rows["all"])


def test_a_column_to_group_by_that_is_the_prompt(tmp_path: Path) -> None:
    found = table(all=write(tmp_path / "a.jsonl", row("it is Bob"), row("two")))
    assert fix(found, "prompt", hide).rows["all"] == [row("it is [NAME_1]"), row("two")]
    assert fix(found, "prompt").rows["all"] == [row("it is Bob"), row("two")]


def test_a_target_that_will_not_do(tmp_path: Path) -> None:
    taken = write(tmp_path / "a.jsonl", row("one"))
    with pytest.raises(OutputError, match="exists already; choose another --fix"):
        check_target(taken, "--fix", folder=False)
    with pytest.raises(OutputError, match="b.csv: one file of rows is written as JSONL; let OUT end in .jsonl"):
        check_target(tmp_path / "b.csv", "--fix", folder=False)
    with pytest.raises(OutputError, match="b.jsonl: several splits are written as a folder; let OUT not end in"):
        check_target(tmp_path / "b.jsonl", "--fix", folder=True)
    check_target(tmp_path / "b", "--fix", folder=True)
    with pytest.raises(OutputError, match="exists already"):
        write_fixed(fix(table(all=taken)), taken)
