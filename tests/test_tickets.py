import importlib.util
import json
import random
import re
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from mlxtune.data.files import resolve
from mlxtune.data.similar import near_pairs, normalise

SCRIPT = Path(__file__).parents[1] / "scripts" / "make_tickets.py"
INTENTS = {
    "cancel_order",
    "change_address",
    "damaged_item",
    "invoice_copy",
    "late_delivery",
    "password_reset",
    "payment_failed",
    "refund_request",
    "wrong_item",
}


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_tickets", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_tickets"] = module  # its dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return [json.loads(line) for line in resolve("tickets").read_text(encoding="utf-8").splitlines()]


def ticket(row: dict[str, Any]) -> str:
    return str(row["messages"][0]["content"])


def intent(row: dict[str, Any]) -> str:
    return str(row["messages"][1]["content"]).split("\n")[0]


def test_the_script_writes_the_embedded_file(tmp_path: Path) -> None:
    out = tmp_path / "tickets.jsonl"
    subprocess.run([sys.executable, SCRIPT, "--seed", "0", "--out", out], check=True)
    assert out.read_bytes() == resolve("tickets").read_bytes()


def test_another_seed_gives_other_tickets(script: ModuleType) -> None:
    assert script.render(0) == resolve("tickets").read_text(encoding="utf-8")
    for seed in (1, 2, 3):
        other = script.render(seed)
        assert other != script.render(0)
        assert 760 <= other.count("\n") <= 840


def test_every_intent_has_many_scenarios_of_a_few_rows(rows: list[dict[str, Any]]) -> None:
    assert 760 <= len(rows) <= 840
    clusters: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        assert list(row) == ["messages", "cluster"]
        assert [list(message) for message in row["messages"]] == [["role", "content"]] * 2
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
        clusters[row["cluster"][:-3]].add(row["cluster"])
    assert set(clusters) == INTENTS
    assert min(len(each) for each in clusters.values()) >= 28
    sizes = Counter(row["cluster"] for row in rows)
    assert min(sizes.values()) >= 2 and max(sizes.values()) <= 7
    assert Counter(sizes.values()).most_common(1)[0][0] == 3


def test_tickets_are_short_everyday_english(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        assert 8 <= len(ticket(row).split()) <= 30
        assert not re.search(r"[{}|]", ticket(row))
        assert ticket(row).isascii()


def test_tickets_ask_in_many_ways(rows: list[dict[str, Any]]) -> None:
    texts = [ticket(row) for row in rows]
    assert 0.25 <= sum("?" in text for text in texts) / len(texts) <= 0.6
    assert sum(len(text.split()) <= 12 for text in texts) >= 0.05 * len(texts)
    assert sum(len(text.split()) >= 20 for text in texts) >= 0.3 * len(texts)
    starts = Counter(" ".join(normalise(text).split()[:3]) for text in texts)
    assert starts.most_common(1)[0][1] <= 0.08 * len(texts)


def test_replies_are_in_one_house_style(rows: list[dict[str, Any]]) -> None:
    replies: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        label, reply = row["messages"][1]["content"].split("\n")
        replies[label].add(reply)
        assert len(reply.split()) <= 22
        assert len(re.findall(r"[.](?= |$)", reply)) == 2
    assert set(replies) == INTENTS
    assert max(len(each) for each in replies.values()) <= 2


def test_the_reply_asks_for_an_order_number_exactly_where_none_is_given(rows: list[dict[str, Any]]) -> None:
    asking = re.compile("send us your order number|try the payment once more")
    for row in rows:
        if intent(row) != "password_reset":
            given = re.search(r"\b\d{5}\b", ticket(row)) is not None
            assert given != (asking.search(row["messages"][1]["content"]) is not None), ticket(row)


def test_scenarios_are_unlike_each_other(rows: list[dict[str, Any]]) -> None:
    near = near_pairs([ticket(row) for row in rows], threshold=0.6)
    assert near
    assert {
        rows[pair.first]["cluster"] for pair in near if rows[pair.first]["cluster"] != rows[pair.second]["cluster"]
    } == set()


def test_the_noise_of_real_files(rows: list[dict[str, Any]]) -> None:
    texts = [ticket(row) for row in rows]
    assert len(texts) - len({normalise(text) for text in texts}) >= 6  # duplicates, and contradictions word for word
    assert 20 <= len(near_pairs(texts)) <= 40
    contradictions = [row for row in rows if not row["cluster"].startswith(intent(row))]
    assert len(contradictions) == 7
    careless = sum(text == text.lower() for text in texts)
    assert 0.08 <= careless / len(texts) <= 0.15
    contacts = sum(re.search(r"@example\.com|\b555-01\d\d\b", text) is not None for text in texts)
    assert 0.03 <= contacts / len(texts) <= 0.06
    assert not re.search(r"@(?!example\.com)", " ".join(texts))


def test_typos_are_slips_of_one_letter(script: ModuleType) -> None:
    for seed in range(50):
        typed = script.with_typos("please send another parcel", random.Random(seed)).split()
        changed = [(a, b) for a, b in zip(["please", "send", "another", "parcel"], typed, strict=True) if a != b]
        assert len(changed) <= 2 and "send" in typed
        for a, b in changed:
            assert abs(len(a) - len(b)) <= 1 and a[0] == b[0] and a[-1] == b[-1]


def test_about_one_ticket_in_ten_has_a_typo(script: ModuleType, rows: list[dict[str, Any]]) -> None:
    material = (SCRIPT.parent / "tickets.txt").read_text(encoding="utf-8") + " ".join(
        script.OPENINGS
        + script.CLOSINGS
        + script.CONTACTS_BY
        + script.ITEMS
        + script.DAYS
        + script.SPANS
        + script.STREETS
    )
    known = set(re.findall(r"[a-z]+", material.lower()))
    odd = [
        row for row in rows if set(re.findall(r"[a-z]+", ticket(row).lower())) - known - {"order", "customer", "com"}
    ]
    assert 0.07 <= len(odd) / len(rows) <= 0.15
