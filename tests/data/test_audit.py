import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from mlxtune.data.audit import Finding, audit
from mlxtune.data.files import resolve
from mlxtune.data.load import read_examples
from mlxtune.data.similar import near_pairs
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
            "prompt_characters": {
                **{"min": 12, "median": 12, "p95": 15, "max": 15},
                "histogram": [{"from": n, "rows": rows} for n, rows in ((12, 1), (13, 0), (14, 0), (15, 1))],
            },
            "answer_characters": {
                **{"min": 8, "median": 8, "p95": 10, "max": 10},
                "histogram": [{"from": n, "rows": rows} for n, rows in ((8, 1), (9, 0), (10, 1))],
            },
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
        ("has the columns `a`; the other rows of this file have `prompt` + `completion`", ["5"]),
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
    bad = [row(n) for n in range(100, 130)]  # type: ignore[arg-type]
    path = write(tmp_path / "a.jsonl", row("fine"), *["no json"] * 30, *bad)
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


def test_the_format_of_a_file_is_that_of_the_rows_that_are_kept(tmp_path: Path) -> None:
    others = [{"text": f"row {n}", "lang": "de"} for n in range(3)]
    path = write(tmp_path / "a.jsonl", *others, {**row("one"), "lang": "en"})
    data = DataRecipe(keep={"lang": ["en"]})
    assert audit({"all": path}, data, None).findings == ()
    assert len(read_examples(path, data)) == 1


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
    assert (other.kind, other.severity, other.where) == ("contradiction", "info", (f"{path}:3",))


def test_near_duplicates_name_the_row_and_the_similarity(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", row(LONG, "one"), row("else", "two"), row(LONG.replace("old", "tall"), "three"))
    (near,) = audit({"all": path}, DataRecipe(), None).findings
    similarity = near_pairs([LONG, LONG.replace("old", "tall")])[0].similarity
    assert near.to_dict() == {
        "kind": "near_duplicate",
        "severity": "info",
        "count": 1,
        "where": [f"{path}:3"],
        "detail": "nearly the same as an earlier row",
        "advice": "keep them on one side of the split, as mlxtune does; delete those that add nothing",
        "notes": [f"like {path}:1 ({similarity:.2f})"],
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
    found = audit({"all": path}, DataRecipe(), r"^(\w+)")
    contrary, nearly = found.findings[:2]
    assert (contrary.kind, contrary.severity, contrary.where) == ("contradiction", "warning", (f"{path}:2",))
    assert contrary.notes == (f"'refund', but {path}:1 says 'late'",)
    # of three equal prompts one has another label: four of five rows can be right
    assert contrary.detail.endswith("no model gets above 80.0%")
    assert found.stats["accuracy_ceiling"] == 0.8
    assert (nearly.kind, nearly.severity, nearly.where) == ("contradiction", "warning", (f"{path}:5",))
    assert nearly.notes == (f"'refund', but {path}:4 says 'late'",)


def test_leaks_are_prompts_of_another_split(tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", row("first question"), row("the same"), row(LONG))
    valid = write(tmp_path / "valid.jsonl", row("second question"), row("The same?"))
    test = write(tmp_path / "test.jsonl", row(LONG.replace("old", "tall")), row("third"), row("second question!"))
    found = audit({"train": train, "valid": valid, "test": test}, DataRecipe(), None)
    assert [file["rows"] for file in found.files] == [3, 2, 3]
    same, nearly = found.findings
    assert [(leak.kind, leak.severity) for leak in found.findings] == [("leak", "warning")] * 2
    assert same.where == (f"{valid}:2", f"{test}:3") and same.notes == (f"as {train}:2", f"as {valid}:1")
    similarity = near_pairs([LONG, LONG.replace("old", "tall")])[0].similarity
    assert nearly.where == (f"{test}:1",) and nearly.notes == (f"like {train}:3 ({similarity:.2f})",)
    assert (same.detail, nearly.detail) == ("the same prompt as in another split", "nearly a prompt of another split")


def test_the_context_of_a_question_belongs_to_it(tmp_path: Path) -> None:
    def chat(system: str, answer: str) -> dict[str, Any]:
        said = (("system", system), ("user", "It is fine."), ("assistant", answer))
        return {"messages": [{"role": role, "content": content} for role, content in said]}

    path = write(tmp_path / "a.jsonl", chat("Topic?", "weather"), chat("Mood?", "good"), chat("Mood?", "bad"))
    contrary, *_ = audit({"all": path}, DataRecipe(), "(.+)").findings
    assert (contrary.kind, contrary.notes) == ("contradiction", (f"'bad', but {path}:2 says 'good'",))


def test_the_most_frequent_label_of_a_prompt_is_taken_for_right(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", row("what", "odd"), row("what", "usual"), row("What?", "usual"))
    contrary = audit({"all": path}, DataRecipe(), "(.+)").findings[0]
    assert contrary.notes == (f"'odd', but {path}:2 says 'usual'",)


def test_a_word_that_tells_the_labels_apart_makes_no_contradiction(tmp_path: Path) -> None:
    things = ["street", "village", "second", "quiet", "lovely", "former", "wooden", "temporary"]
    pins = [row(f"can I change the pin at a {thing} machine", "pin") for thing in things]
    homes = [row(f"is my {thing} address what you write to", "address") for thing in things]
    pair = [row("please tell me how I change my pin", "pin"), row("please tell me how I change my address", "address")]
    slip = [row("please tell me how I chnage my pin", "address")]
    path = write(tmp_path / "a.jsonl", *pins, *homes, *pair, *slip)
    findings = audit({"all": path}, DataRecipe(), "(.+)").findings
    contrary = [f for f in findings if f.kind == "contradiction"]
    assert [f.where for f in contrary] == [(f"{path}:19",)]
    assert contrary[0].notes == (f"'address', but {path}:17 says 'pin'",)


def test_an_equal_prompt_with_nearly_the_same_answer_is_a_near_duplicate(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", row("Where is it?", LONG), row("Where is it?", LONG.replace("old", "tall")))
    (near,) = audit({"all": path}, DataRecipe(), None).findings
    assert (near.kind, near.notes) == ("near_duplicate", (f"as {path}:1, with nearly the same answer",))


def test_fast_leaves_out_what_is_only_near(tmp_path: Path) -> None:
    rows = row(LONG), row(LONG.replace("old", "tall")), row("twice"), row("twice")
    found = audit({"all": write(tmp_path / "a.jsonl", *rows)}, DataRecipe(), None, fast=True)
    assert kinds(found.findings) == [("duplicate", "warning", 1)]


def test_as_many_places_as_asked_for_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", *[row("again")] * 30)
    for places, named in ((2, 2), (20, 20), (1000, 29)):
        (same,) = audit({"all": path}, DataRecipe(), None, places=places).findings
        assert (same.count, len(same.where), len(same.notes)) == (29, named, named)


def test_the_tickets_have_the_noise_that_they_are_given() -> None:
    found = audit({"all": resolve("tickets")}, DataRecipe(), None)
    assert not found.has("error")
    counts: Counter[str] = Counter()
    for each in found.findings:
        counts[each.entity or each.kind] += each.count
    assert set(counts) == {"contradiction", "duplicate", "near_duplicate", "email", "phone"}
    assert (counts["contradiction"], counts["duplicate"]) == (7, 6)
    assert 20 <= counts["near_duplicate"] <= 60
    assert len(found.stats["labels"]) == 9
