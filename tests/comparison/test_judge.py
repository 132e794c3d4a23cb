"""A judge that says what it is told to: orders, ties, and what is no verdict."""

import pytest

from mlxtune.comparison import judge
from mlxtune.comparison.judge import Pair
from mlxtune.errors import DataError


def pair(number: int, first: str = "old", second: str = "new") -> Pair:
    where = f"data/test.jsonl:{number}"
    return Pair(
        where=where,
        prompt=f"question {number}",
        expected="right",
        first=f"{first} {number}",
        second=f"{second} {number}",
    )


def test_each_pair_is_asked_about_in_both_orders() -> None:
    asked: list[list[dict[str, str]]] = []

    def ask(conversations: list[list[dict[str, str]]], most: int) -> list[str]:
        asked.extend(conversations)
        assert most == judge.VERDICT_TOKENS
        return ["tie"] * len(conversations)

    assert judge.verdicts([pair(1)], ask) == [("tie", "tie")]
    texts = [conversation[0]["content"] for conversation in asked]
    assert "<answer A>\nold 1\n</answer A>\n\n<answer B>\nnew 1\n</answer B>" in texts[0]
    assert "<answer A>\nnew 1\n</answer A>\n\n<answer B>\nold 1\n</answer B>" in texts[1]
    assert all(
        "<request>\nquestion 1\n</request>\n\n<a good answer>\nright\n</a good answer>" in text for text in texts
    )


def test_wins_ties_and_losses() -> None:
    said = ["B", "A"] * 6 + ["A", "B"] * 2 + ["A", "A"] * 3 + ["tie", "A"] + ["tie", "tie"]
    orders = judge.verdicts([pair(number) for number in range(13)], lambda conversations, most: said)
    assert [orders[place] for place in (0, 6, 8, 11)] == [
        *(("second", "second"), ("first", "first"), ("first", "second"), ("tie", "second")),
    ]
    found = judge.summed_up(orders)
    assert (found.wins, found.ties, found.losses, found.swayed) == (6, 5, 2, 3)
    assert found.score.value == pytest.approx((6 + 2.5) / 13)
    assert 0 <= found.score.ci_low < found.score.value < found.score.ci_high <= 1
    assert found.to_dict()["score"]["n"] == 13


def test_a_judge_that_always_says_a_finds_nothing() -> None:
    pairs = [pair(number) for number in range(9)]
    found = judge.summed_up(judge.verdicts(pairs, lambda conversations, most: ["A"] * len(conversations)))
    assert (found.wins, found.ties, found.losses, found.swayed) == (0, 9, 0, 9)
    assert found.score.value == 0.5


@pytest.mark.parametrize(
    ("said", "verdict"),
    [
        *(("A", "first"), ("b", "second"), (" **B** is better", "second"), ("Tie.", "tie"), ("(A)", "first")),
        *(("Answer A", "tie"), ("Apples", "tie"), ("", "tie"), ("neither", "tie"), ("AB", "tie")),
    ],
)
def test_a_verdict_is_the_first_word(said: str, verdict: str) -> None:
    assert judge.read(said) == verdict


def test_long_texts_are_cut() -> None:
    asked = judge.conversation(pair(1, first="x" * 10_000), swapped=False)[0]["content"]
    assert "x" * 4000 + " […]" in asked
    assert "x" * 4001 not in asked


def test_an_unknown_good_answer_is_not_shown() -> None:
    asked = judge.conversation(Pair(where="a:1", prompt="q", expected=None, first="a", second="b"), swapped=False)[0][
        "content"
    ]
    assert "good answer>" not in asked


def test_nothing_to_judge() -> None:
    with pytest.raises(DataError, match="no answers"):
        judge.summed_up([])


def test_the_rows_that_both_answered() -> None:
    def line(row: int, answer: str | None) -> dict[str, str | None]:
        return {"where": f"test:{row}", "prompt": f"q{row}", "expected": "e", "answer": answer}

    before = [line(row, None if row == 3 else "old") for row in range(250)]
    after = [line(row, None if row == 5 else "new") for row in range(2, 260)]
    found = judge.pairs_of(before, after)
    assert len(found) == 100
    assert found[0] == Pair(where="test:2", prompt="q2", expected="e", first="old", second="new")
    assert [each.where for each in found[1:3]] == ["test:6", "test:8"]  # of 246 rows each 2.46th, but for 3 and 5
    assert [each.where for each in judge.pairs_of(before[:6], after)] == ["test:2", "test:4"]


def test_verdicts_that_were_kept() -> None:
    assert judge.as_verdicts(["first", "tie"]) == ("first", "tie")
    for words in ([], ["first"], ["first", "A"], ["tie"] * 3):
        with pytest.raises(DataError, match="are no two verdicts"):
            judge.as_verdicts(words)
