"""Rows of a recipe by split: what is read, kept, split off, and a run's own rows."""

import io
import json
import sys
from pathlib import Path

import pytest

from mlxtune.data import load
from mlxtune.data.formats import Completion
from mlxtune.errors import DataError, RecipeError
from mlxtune.recipe import DataRecipe


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pairs(count: int, start: int = 0) -> list[dict[str, str]]:
    words = ["apple", "river", "candle", "engine", "marble", "forest", "window", "copper", "violin", "harbor"]
    return [
        {"prompt": f"{words[n % 10]} {words[(n * 7 + 3) % 10]} number {n}", "completion": words[n % 10]}
        for n in range(start, start + count)
    ]


def test_what_a_folder_has_no_file_for_is_split_off_its_train_file(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", pairs(40))
    write(tmp_path / "test.jsonl", pairs(5, start=100))
    splits = load.load_splits(DataRecipe(path=str(tmp_path), valid=0.25), 0, None)
    assert len(splits["test"]) == 5
    assert len(splits["train"]) + len(splits["valid"]) == 40
    assert 5 <= len(splits["valid"]) <= 15
    write(tmp_path / "val.jsonl", pairs(3, start=200))
    splits = load.load_splits(DataRecipe(path=str(tmp_path)), 0, None)
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 40, "valid": 3, "test": 5}


def test_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="data.path: is not set"):
        load.load_splits(DataRecipe(), 0, None)
    write(tmp_path / "test.jsonl", pairs(5))
    with pytest.raises(DataError, match="has no train file"):
        load.load_splits(DataRecipe(path=str(tmp_path)), 0, None)


def test_a_runs_own_rows_are_not_filled_in_again(tmp_path: Path) -> None:
    data = DataRecipe(prompt="Q: {{ question }}", completion="{{ kind }}", keep={"kind": ["a"]})
    raw = write(tmp_path / "raw.jsonl", [{"question": "x", "kind": "a"}, {"question": "y", "kind": "b"}])
    assert [example for _, example in load.read_examples(raw, data)] == [Completion("Q: x", "a")]
    own = write(tmp_path / "run" / "data" / "test.jsonl", [{"prompt": "Q: x", "completion": "a"}])
    with pytest.raises(DataError, match="has no column `kind`"):  # a folder named data is no run
        load.read_examples(own, data)
    (tmp_path / "run" / "recipe.yaml").write_text("model: tiny\n")
    assert [example for _, example in load.read_examples(own, data)] == [Completion("Q: x", "a")]


def test_the_first_malformed_row_is_raised_with_the_number_of_others(tmp_path: Path) -> None:
    odd = [{"text": "one"}, {"prompt": "x", "completion": ""}]
    path = write(tmp_path / "a.jsonl", [*pairs(3), *odd])
    with pytest.raises(DataError) as caught:
        load.read_examples(path, DataRecipe())
    assert str(caught.value) == (
        f"{path}:4: has the columns `text`; the other rows of this file have `prompt` + `completion` "
        "(and 1 more such row); write all rows of a file in one format"
    )


def test_what_is_piped_in_is_a_file_of_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = "".join(json.dumps(row) + "\n" for row in pairs(40)).encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(rows)))
    assert load.files_of(DataRecipe(path="-")) == {"all": Path("-")}
    splits = load.load_splits(DataRecipe(path="-"), 0, None)
    assert sum(map(len, splits.values())) == 40
    assert all(row.file == "stdin" for part in splits.values() for row, _ in part)


def test_an_anchor_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "empty.txt").write_text(" \n")
    for name, said in (
        ("gone.txt", "cannot be read: No such file"),
        ("latin.txt", "is not UTF-8"),
        ("empty.txt", "has no"),
    ):
        with pytest.raises(DataError, match=f"{name}: {said}"):
            load.anchor_text(str(tmp_path / name))
    with pytest.raises(DataError, match=r"^~no_such_user/a.txt: cannot be read: Could not determine home"):
        load.anchor_text("~no_such_user/a.txt")


def test_columns_may_be_named_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,category\nWhere is it?,late\n")
    found = load.read_examples(path, DataRecipe(prompt="text", completion="category"))
    assert [example for _, example in found] == [Completion("Where is it?", "late")]
