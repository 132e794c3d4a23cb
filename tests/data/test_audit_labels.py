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


def test_labels_are_counted_and_odd_ones_named(tmp_path: Path) -> None:
    rows = [row(f"a question about {chr(97 + n % 26) * 3} {chr(97 + n // 26) * 4}", "spam") for n in range(66)]
    rows += [row("one more", "ham"), row("two more", "Spam"), row("three more", "hamm"), row("four more", "???")]
    path = write(tmp_path / "a.jsonl", *rows)
    found = audit({"all": path}, DataRecipe(), r"^(\w+)")
    assert found.stats["labels"] == {"spam": 66, "Spam": 1, "ham": 1, "hamm": 1}
    assert [(f.kind, f.severity, f.count, f.detail) for f in found.findings] == [
        ("label", "warning", 1, "no label in the answer"),
        ("label", "warning", 1, "the label 'Spam' looks like 'spam'"),
        ("label", "warning", 3, "labels with fewer than 5 rows: 'Spam' (1), 'ham' (1), 'hamm' (1)"),
        ("label", "warning", 1, "'spam' has 66 rows, 'hamm' 1: 66 times as many"),
    ]
    assert found.findings[0].where == (f"{path}:70",)


@pytest.mark.parametrize(
    ("labels", "alike"),
    [
        (("refund_request", "refund-request"), True),
        (("refund_request", "refund_requests"), True),
        (("late_delivery", "late_delivrey"), True),
        (("level_1", "level_2"), False),
        (("level_10", "level_110"), False),
        (("positive", "negative"), False),
        (("yes", "no"), False),
        (("cancel_order", "change_order"), False),
    ],
)
def test_look_alike_labels(tmp_path: Path, labels: tuple[str, str], alike: bool) -> None:
    first, second = labels
    rows = [row(f"say {chr(97 + n) * 3}", first if n < 14 else second) for n in range(26)]
    findings = audit({"all": write(tmp_path / "a.jsonl", *rows)}, DataRecipe(), "(.+)").findings
    assert [f.detail for f in findings] == ([f"the label {second!r} looks like {first!r}"] if alike else [])


def test_a_pattern_that_finds_nothing_is_said(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", row("one"), row("two"))
    (finding,) = audit({"all": path}, DataRecipe(), r"(\d+)").findings
    assert (finding.kind, finding.count, finding.detail) == ("label", 2, r"'(\\d+)' finds no label in any answer")


def test_a_label_with_white_space_or_capitals_of_its_own_is_named(tmp_path: Path) -> None:
    answers = ["refund"] * 40 + ["Refund "] * 2 + ["refund\n"] + ["late"] * 37
    path = write(tmp_path / "a.jsonl", *[row(f"say {n * 7919} {chr(97 + n % 26)}", a) for n, a in enumerate(answers)])
    found = audit({"all": path}, DataRecipe(), None, fast=True)
    assert [(f.kind, f.count, f.detail) for f in found.findings if "looks like" in f.detail] == [
        ("label", 2, "the label 'Refund ' looks like 'refund'"),
        ("label", 1, "the label 'refund\\n' looks like 'refund'"),
    ]


def test_a_space_before_every_label_is_a_style(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", *[row(f"say {n * 7919}", [" late", " refund"][n % 2]) for n in range(40)])
    assert audit({"all": path}, DataRecipe(), None, fast=True).findings == ()


def test_two_spellings_of_a_label_do_not_contradict_each_other(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", row("the same", "Refund"), row("the same", "refund"), row("the same", "late"))
    findings = audit({"all": path}, DataRecipe(), "(.+)").findings
    assert [(f.kind, f.count) for f in findings if f.kind != "label"] == [("contradiction", 1), ("duplicate", 1)]


def test_labels_that_a_split_lacks(tmp_path: Path) -> None:
    def rows(*names: str) -> list[dict[str, str]]:
        return [row(f"{name} {chr(97 + n) * 4} {name[::-1]}", name) for name in names for n in range(6)]

    train = write(tmp_path / "train.jsonl", *rows("late", "refund", "lost"))
    test = write(
        tmp_path / "test.jsonl", *[row(each["prompt"] + " at all", each["completion"]) for each in rows("late", "odd")]
    )
    findings = audit({"train": train, "test": test}, DataRecipe(), "(.+)", fast=True).findings
    assert [(f.severity, f.count, f.detail) for f in findings] == [
        ("warning", 6, "labels of test that train does not have: 'odd' (6)"),
        ("info", 12, "labels of train that test does not have: 'refund' (6), 'lost' (6)"),
    ]
    assert findings[0].where == tuple(f"{test}:{line}" for line in range(7, 13))


def test_classes_are_counted_where_they_are_learned(tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", *[row(f"{chr(97 + n) * 4} train", "late") for n in range(6)])
    test = write(tmp_path / "test.jsonl", row("one of a kind", "late"))
    assert audit({"train": train, "test": test}, DataRecipe(), "(.+)").findings == ()


def test_the_ceiling_counts_the_most_frequent_label_of_equal_prompts(tmp_path: Path) -> None:
    rows = [row("a", "x"), row("A!", "x"), row("a", "y"), row("b", "y"), row("c", "x"), row("C", "y")]
    found = audit({"all": write(tmp_path / "a.jsonl", *rows)}, DataRecipe(), "(.+)")
    assert found.stats["accuracy_ceiling"] == 4 / 6
    (contrary,) = [f for f in found.findings if f.kind == "contradiction"]
    assert contrary.count == 2 and "no model gets above 66.7%" in contrary.detail
