import json
from pathlib import Path
from typing import Any

from mlxtune.data.audit import audit
from mlxtune.recipe import DataRecipe


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def row(prompt: str, answer: str = "an answer") -> dict[str, str]:
    return {"prompt": prompt, "completion": answer}


def test_personal_data_by_entity(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.jsonl",
        row("Write to a@example.com and b@example.com", "Done."),
        row("Who is it?", "Ask c@example.com, pay with 4111 1111 1111 1111."),
        row("Call 202-555-0142. Order 48213 of 2024-05-12", "Yes."),
        row("DE89 3704 0044 0532 0130 00", "No."),
    )
    findings = audit({"all": path}, DataRecipe(), None).findings
    assert [(f.kind, f.entity, f.count, f.detail) for f in findings if f.kind == "pii"] == [
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


def test_personal_data_of_every_message(tmp_path: Path) -> None:
    said = [("system", "Call 202-555-0142."), ("user", "Hello"), ("assistant", "I am a@example.com"), ("user", "Who?")]
    messages = [{"role": role, "content": content} for role, content in [*said, ("assistant", "Yes.")]]
    path = write(tmp_path / "a.jsonl", {"messages": messages})
    findings = audit({"all": path}, DataRecipe(), None).findings
    assert [(f.entity, f.notes) for f in findings if f.kind == "pii"] == [("email", ()), ("phone", ())]


def test_personal_data_of_thoughts_and_tool_calls(tmp_path: Path) -> None:
    def mail(to: str) -> dict[str, Any]:
        return {"role": "assistant", "tool_calls": [{"function": {"name": "mail", "arguments": {"to": to}}}]}

    asked = {"role": "user", "content": "Do it"}
    thought = {"role": "assistant", "content": "Done.", "reasoning_content": "Pay with 4111 1111 1111 1111"}
    path = write(
        tmp_path / "a.jsonl",
        {"messages": [asked, mail("a@example.com"), {"role": "tool", "content": "ok"}, thought]},
        {"messages": [asked, mail("b@example.com")]},
    )
    findings = audit({"all": path}, DataRecipe(), None).findings
    found = [(f.entity, f.where, f.notes) for f in findings if f.kind == "pii"]
    assert found == [
        ("email", (f"{path}:1", f"{path}:2"), ("", "in the answer")),
        ("card", (f"{path}:1",), ("in the answer",)),
    ]


def test_the_histogram_holds_every_row(tmp_path: Path) -> None:
    lengths = [*range(10, 310), 5000]
    path = write(tmp_path / "a.jsonl", *[row("x" * n, "y") for n in lengths])
    spread = audit({"all": path}, DataRecipe(), None, fast=True).stats["prompt_characters"]
    assert (spread["min"], spread["median"], spread["p95"], spread["max"]) == (10, 160, 295, 5000)
    steps = spread["histogram"]
    assert len(steps) <= 16 and sum(step["rows"] for step in steps) == len(lengths)
    widths = {b["from"] - a["from"] for a, b in zip(steps, steps[1:], strict=False)}
    assert len(widths) == 1 and steps[-1]["from"] < 310  # the longest row does not stretch it


def test_a_set_without_answers_has_no_spread_of_them(tmp_path: Path) -> None:
    found = audit({"all": write(tmp_path / "a.jsonl", {"text": "one thing"})}, DataRecipe(), None)
    assert found.stats["answer_characters"] is None
