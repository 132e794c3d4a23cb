import json
from pathlib import Path
from typing import Any

import pytest

from mlxtune.data.audit import Finding, audit
from mlxtune.data.files import resolve
from mlxtune.errors import DataError, InputError, RecipeError
from mlxtune.recipe import DataRecipe

LONG = "the quick brown fox jumps over the lazy dog and then sleeps under an old oak"


def write(path: Path, *rows: Any) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def row(prompt: str, answer: str = "an answer") -> dict[str, str]:
    return {"prompt": prompt, "completion": answer}


def kinds(findings: tuple[Finding, ...]) -> list[tuple[str, str, int]]:
    return [(each.kind, each.severity, each.count) for each in findings]


def test_clean_rows_have_no_findings(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", row("What is a tree?", "A plant."), row("And a stone?", "A mineral."))
    assert audit({"all": path}, DataRecipe(), None).to_dict() == {
        "files": [{"split": "all", "path": str(path), "rows": 2}],
        "rows": 2,
        "findings": [],
        "stats": {
            "prompt_characters": {"min": 12, "median": 12, "max": 15},
            "answer_characters": {"min": 8, "median": 8, "max": 10},
        },
    }


def test_every_malformed_row_in_one_pass(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.jsonl", row("fine one"), "{", "no json", [1], {"a": 1}, row("  "), row(" "), row("fine two")
    )
    found = audit({"all": path}, DataRecipe(), None)
    assert found.rows == 2 and found.has("error")
    assert [(f.detail, [where.rsplit(":")[-1] for where in f.where]) for f in found.findings] == [
        ("`prompt` is empty", ["6", "7"]),
        ("not valid JSON: Expecting property name enclosed in double quotes", ["2"]),
        ("not valid JSON: Expecting value", ["3"]),
        ("is a JSON list, not an object", ["4"]),
        ("has the columns `a`; expected `messages`, or `prompt` + `completion`, or `text`", ["5"]),
    ]
    assert {f.severity for f in found.findings} == {"error"}
    assert found.findings[0].to_dict() == {
        "kind": "malformed",
        "severity": "error",
        "count": 2,
        "where": [f"{path}:6", f"{path}:7"],
        "detail": "`prompt` is empty",
        "advice": "fill it in or delete the row",
    }


def test_many_malformed_rows_are_counted_and_the_first_20_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", row("fine"), *["no json"] * 30, *[{"text": n} for n in range(30)])
    findings = audit({"all": path}, DataRecipe(), None).findings
    assert sum(f.count for f in findings) == 60
    assert [(f.count, len(f.where)) for f in findings[:2]] == [(30, 20), (21, 20)]
    assert findings[1].detail == "for other reasons"


def test_a_file_without_rows_is_an_error(tmp_path: Path) -> None:
    train, empty = write(tmp_path / "train.jsonl", row("fine")), write(tmp_path / "test.jsonl")
    found = audit({"train": train, "test": empty}, DataRecipe(), None)
    assert [(f.detail, f.where) for f in found.findings] == [("has no rows", (str(empty),))]
    kept = audit({"train": train}, DataRecipe(keep={"prompt": ["other"]}), None)
    assert [(f.detail, f.where) for f in kept.findings] == [("has no row that data.keep keeps", (str(train),))]


def test_a_mistake_of_the_recipe_is_raised_not_reported(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"t": "x", "l": "y"})
    with pytest.raises(RecipeError, match=r"data.prompt, data.completion: '\{\{ t' is no valid template"):
        audit({"all": path}, DataRecipe(prompt="{{ t", completion="{{ l }}"), None)
    with pytest.raises(DataError, match="cannot be read"):
        audit({"all": tmp_path / "b.jsonl"}, DataRecipe(), None)
    with pytest.raises(InputError, match="has no group"):
        audit({"all": path}, DataRecipe(prompt="{{ t }}", completion="{{ l }}"), "x")


def test_only_kept_rows_are_audited(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {**row("one"), "lang": "en"}, {**row("ONE!"), "lang": "de"})
    assert kinds(audit({"all": path}, DataRecipe(), None).findings) == [("duplicate", "warning", 1)]
    found = audit({"all": path}, DataRecipe(keep={"lang": ["en"]}), None)
    assert (found.rows, found.findings) == (1, ())


def test_duplicates_name_the_row_that_they_repeat(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.jsonl",
        row("Where is it?", "Here."),
        row("where is  it", "here"),
        row("Where is it?", "There."),
        row("Where is it?", "Here."),
    )
    same, other = audit({"all": path}, DataRecipe(), None).findings
    assert (same.kind, same.severity, same.count) == ("duplicate", "warning", 2)
    assert same.where == (f"{path}:2", f"{path}:4") and same.notes == (f"as {path}:1", f"as {path}:1")
    assert (other.kind, other.severity, other.where) == ("duplicate", "info", (f"{path}:3",))


def test_near_duplicates_name_the_row_and_the_similarity(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", row(LONG, "one"), row("else", "two"), row(LONG.replace("old", "tall"), "three"))
    (near,) = audit({"all": path}, DataRecipe(), None).findings
    # 16 words of which two are `the`: 15 and 15 pairs; one word and two pairs differ: 27 shared of 33
    assert near.to_dict() == {
        "kind": "near_duplicate",
        "severity": "info",
        "count": 1,
        "where": [f"{path}:3"],
        "detail": "nearly the same prompt as an earlier row",
        "advice": "keep them on one side of the split, as mlxtune does; delete those that add nothing",
        "notes": [f"like {path}:1 (0.82)"],
    }


def test_contradictions_are_equal_or_near_prompts_with_other_labels(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.jsonl",
        row("My parcel is late.", "late\nSorry."),
        row("my parcel is late", "refund\nDone."),
        row("My parcel is late!", "late\nSorry again."),
        row(LONG, "late\nSorry."),
        row(LONG.replace("old", "tall"), "refund\nDone."),
    )
    contrary, same = audit({"all": path}, DataRecipe(), r"^(\w+)").findings[:2]
    assert (contrary.kind, contrary.severity, contrary.count) == ("contradiction", "warning", 2)
    assert contrary.where == (f"{path}:2", f"{path}:5")
    assert contrary.notes == (f"'refund', but {path}:1 says 'late'", f"'refund', but {path}:4 says 'late'")
    assert (same.kind, same.where, same.notes) == ("duplicate", (f"{path}:3",), (f"as {path}:1",))


def test_leaks_are_prompts_of_another_split(tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", row("first question"), row("the same"), row(LONG))
    valid = write(tmp_path / "valid.jsonl", row("second question"), row("The same?"))
    test = write(tmp_path / "test.jsonl", row(LONG.replace("old", "tall")), row("third"), row("second question!"))
    found = audit({"train": train, "valid": valid, "test": test}, DataRecipe(), None)
    assert [file["rows"] for file in found.files] == [3, 2, 3]
    (leak,) = found.findings
    assert (leak.kind, leak.severity, leak.count) == ("leak", "warning", 3)
    assert leak.where == (f"{valid}:2", f"{test}:1", f"{test}:3")
    assert leak.notes == (f"as {train}:2", f"like {train}:3 (0.82)", f"as {valid}:1")
    assert leak.detail == "a prompt of another split again: 2 the same, 1 nearly"


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


def test_personal_data_by_entity(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.jsonl",
        row("Write to a@example.com and b@example.com", "Done."),
        row("Who is it?", "Ask c@example.com, pay with 4111 1111 1111 1111."),
        {
            "messages": [
                {"role": "system", "content": "Call 202-555-0142."},
                {"role": "user", "content": "Order 48213 of 2024-05-12"},
                {"role": "assistant", "content": "Yes."},
            ]
        },
        {"text": "DE89 3704 0044 0532 0130 00"},
    )
    findings = audit({"all": path}, DataRecipe(), None).findings
    assert [(f.kind, f.entity, f.count, f.detail) for f in findings] == [
        ("pii", "email", 2, "e-mail addresses (email)"),
        ("pii", "phone", 1, "phone numbers (phone)"),
        ("pii", "card", 1, "payment cards (card)"),
        ("pii", "iban", 1, "IBANs (iban)"),
    ]
    assert findings[0].to_dict()["entity"] == "email"
    assert findings[0].where == (f"{path}:1", f"{path}:2") and findings[0].notes == ("", "in the answer")


def test_odd_lengths(tmp_path: Path) -> None:
    rows = [row(f"a question about {chr(97 + n) * 3}", f"about {chr(97 + n) * 3}") for n in range(20)]
    path = write(tmp_path / "a.jsonl", *rows, row("x", "one"), row("which", "y"), row("long", "word " * 300))
    tiny, long = audit({"all": path}, DataRecipe(), None).findings
    assert (tiny.kind, tiny.severity, tiny.where) == ("length", "warning", (f"{path}:21", f"{path}:22"))
    assert tiny.notes == ("prompt", "answer")
    assert (long.kind, long.severity, long.where) == ("length", "info", (f"{path}:23",))
    assert long.notes == ("1,500 characters",)


def test_one_character_is_a_fine_label(tmp_path: Path) -> None:
    rows = [row(f"is it {chr(97 + n) * 3} or not", "01"[n % 2]) for n in range(22)]
    found = audit({"all": write(tmp_path / "a.jsonl", *rows)}, DataRecipe(), None)
    assert found.findings == () and found.stats["labels"] == {"0": 11, "1": 11}


def test_the_tickets_have_the_noise_that_they_are_given() -> None:
    found = audit({"all": resolve("tickets")}, DataRecipe(), None)
    assert not found.has("error")
    counts = {each.entity or each.kind: each.count for each in found.findings}
    assert set(counts) == {"contradiction", "duplicate", "near_duplicate", "email", "phone"}
    assert (counts["contradiction"], counts["duplicate"], counts["near_duplicate"]) == (7, 6, 24)
    assert len(found.stats["labels"]) == 9
