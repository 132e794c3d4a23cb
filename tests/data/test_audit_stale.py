import json
from pathlib import Path
from typing import Any

import pytest

from mlxtune.data.audit import audit
from mlxtune.recipe import DataRecipe


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def row(prompt: str, answer: str = "an answer") -> dict[str, str]:
    return {"prompt": prompt, "completion": answer}


@pytest.mark.parametrize(
    ("answer", "fact"),
    [
        ("The plan is $49.90 a month.", "price: '$49.90'"),
        ("It costs 20 euros.", "price: '20 euros'"),
        ("That is 1,299 USD with shipping.", "price: '1,299 USD'"),
        ("The sale ends on May 5, 2026.", "date: 'May 5, 2026'"),
        ("Released on 2024-05-12.", "date: '2024-05-12'"),
        ("Book until March 3 at the latest.", "date: 'until March 3'"),
        ("You need Python 3.11 for it.", "version: 'Python 3.11'"),
        ("Fixed in v2.4.", "version: 'v2.4'"),
        ("Please install 1.14.2 first.", "version: '1.14.2'"),
        ("The blue one is out of stock.", "stock: 'out of stock'"),
        ("Only 3 left!", "stock: 'Only 3 left'"),
        ("We are open from 9 am to 5 pm.", "opening hours: 'open from 9 am to 5 pm'"),
    ],
)
def test_facts_that_move(tmp_path: Path, answer: str, fact: str) -> None:
    path = write(tmp_path / "a.jsonl", row("Tell me about it", answer), row("And what of the rest?", "Nothing."))
    (found,) = audit({"all": path}, DataRecipe(), None).findings
    assert (found.kind, found.severity, found.where, found.notes) == ("stale_fact", "info", (f"{path}:1",), (fact,))
    assert found.detail == f"facts that move, in the answer: 1 × {fact.split(':')[0]}"
    assert "retrieval" in found.advice


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        ("What is 12 times 4?", "It is 12*4 = <<12*4=48>>48, so she pays $48."),
        ("What does she pay?", "She pays 3 + 4 = 7, that is $7."),
        ("I paid $20 twice. How much was it once?", "Once it was $20."),
        ("When did it end?", "It ended on September 2, 1945."),
        ("Write a query", "SELECT price FROM items WHERE price > $5 AND day = '2024-05-12'"),
        ("How many?", "There are 5 apples left in the basket."),
        ("What is pi?", "About 3.14."),
        ("And now?", "You may want to order it."),
    ],
)
def test_what_does_not_move(tmp_path: Path, prompt: str, answer: str) -> None:
    path = write(tmp_path / "a.jsonl", row(prompt, answer))
    assert audit({"all": path}, DataRecipe(), None).findings == ()


def test_labels_are_no_facts(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.jsonl", *[row(f"say {n * 7919} so", ["version 1", "out of stock"][n % 2]) for n in range(40)]
    )
    assert audit({"all": path}, DataRecipe(), None, fast=True).findings == ()
