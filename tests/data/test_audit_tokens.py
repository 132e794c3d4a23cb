import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mlxtune.data.audit import Counting, audit
from mlxtune.data.render import Limit
from mlxtune.model import check
from mlxtune.recipe import DataRecipe
from mlxtune.tokenizer import inner, load_tokenizer


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def row(prompt: str, answer: str = "an answer") -> dict[str, str]:
    return {"prompt": prompt, "completion": answer}


@pytest.fixture(scope="module")
def counting(tiny: Path) -> Counting:
    tokenizer = load_tokenizer(tiny, check(tiny))
    ends = tokenizer.eos_token_ids
    return Counting(model="tiny", tokenizer=inner(tokenizer), ends=ends, data=DataRecipe(), limit=Limit(64))


def test_tokens_are_counted_and_what_does_not_fit_is_forecast(tmp_path: Path, counting: Counting) -> None:
    path = write(
        tmp_path / "a.jsonl", row("Where is it?", "Here."), row("word " * 100, "late"), row("And now?", "There.")
    )
    found = audit({"all": path}, DataRecipe(), None, counting=counting)
    tokens = found.stats["tokens"]
    assert (tokens["model"], tokens["rows"], tokens["max_seq_length"], tokens["too_long"]) == ("tiny", 3, 64, 1)
    assert tokens["row"]["max"] > 100 > 64 > tokens["row"]["median"]
    assert tokens["epoch"]["rows"] == 2
    assert tokens["trained"]["min"] * 2 <= tokens["epoch"]["trained"] < tokens["epoch"]["tokens"] < 64 * 2
    (long,) = found.findings
    assert (long.kind, long.severity, long.where) == ("length", "warning", (f"{path}:2",))
    assert long.detail.startswith("more tokens than train.max_seq_length 64 (33.3%); the longest ")
    assert long.notes == (f"{tokens['row']['max']} tokens",)


@pytest.mark.parametrize(
    ("too_long", "said"), [("error", "refuses"), ("drop", "leaves them out"), ("truncate", "cuts")]
)
def test_the_advice_is_what_the_recipe_does(tmp_path: Path, counting: Counting, too_long: str, said: str) -> None:
    path = write(tmp_path / "a.jsonl", row("word " * 100, "late"))
    found = audit({"all": path}, DataRecipe(), None, counting=replace(counting, data=DataRecipe(too_long=too_long)))
    assert said in found.findings[0].advice and found.stats["tokens"]["epoch"]["rows"] == 0


def test_an_epoch_is_of_the_train_split(tmp_path: Path, counting: Counting) -> None:
    train = write(tmp_path / "train.jsonl", row("one question", "yes"), row("another thing", "no"))
    test = write(tmp_path / "test.jsonl", row("something else", "yes"))
    tokens = audit({"train": train, "test": test}, DataRecipe(), None, counting=counting).stats["tokens"]
    assert (tokens["rows"], tokens["epoch"]["rows"]) == (3, 2)


def test_a_row_that_the_template_cannot_render_is_malformed(tmp_path: Path, counting: Counting) -> None:
    control = next(str(t) for t in counting.tokenizer.added_tokens_decoder.values() if t.special)
    path = write(tmp_path / "a.jsonl", row("fine", "yes"), row(f"say {control} now", "yes"), row("fine too", "no"))
    seen: list[tuple[int, int]] = []
    found = audit({"all": path}, DataRecipe(), None, counting=replace(counting, on_row=lambda *done: seen.append(done)))
    if found.has("error"):
        assert [(f.kind, f.where) for f in found.findings] == [("malformed", (f"{path}:2",))]
        assert found.stats["tokens"]["rows"] == 2
    assert seen == [(3, 3)]
