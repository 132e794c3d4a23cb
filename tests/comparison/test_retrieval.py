"""BM25 against the formula in float64, its order, what is never found, and how documents become passages."""

import math
from pathlib import Path

import numpy as np
import pytest

from mlxtune.comparison import retrieval
from mlxtune.comparison.retrieval import Index, Passage
from mlxtune.data.files import Row
from mlxtune.data.formats import Chat, Completion, Example, Text
from mlxtune.errors import DataError

TEXTS = [
    "The fox saw the hen and the hen saw the fox.",
    "A lamp for the desk",
    "The hen lays eggs, said the farmer of the valley to the fox",
    "Lamp, lamp and lamp!",
    "...",
]


def bm25(texts: list[str], question: str, k1: float = 1.5, b: float = 0.75) -> list[float]:
    """Robertson's BM25 with Lucene's idf, log(1 + (N - n + 0.5) / (n + 0.5)), and no factor k1 + 1."""
    words = [retrieval.terms(text) for text in texts]
    mean = sum(map(len, words)) / len(words)
    scores = []
    for document in words:
        total = 0.0
        for term in retrieval.terms(question):
            having = sum(term in each for each in words)
            idf = math.log(1 + (len(words) - having + 0.5) / (having + 0.5))
            count = document.count(term)
            total += idf * count / (count + k1 * (1 - b + b * len(document) / mean)) if count else 0.0
        scores.append(total)
    return scores


@pytest.mark.parametrize("question", ["the fox and the hen", "lamp", "eggs in the valley", "HEN?"])
def test_the_order_is_that_of_the_formula(question: str) -> None:
    scores = bm25(TEXTS, question)
    wanted = [place for place in np.argsort([-each for each in scores], kind="stable").tolist() if scores[place] > 0]
    index = Index([Passage(f"d:{number}", text) for number, text in enumerate(TEXTS)])
    assert index.search(question, 9) == wanted
    assert index.search(question, 1) == wanted[:1]


def test_equal_scores_keep_their_order() -> None:
    index = Index([Passage(str(number), "a lamp") for number in range(50)])
    assert index.search("lamp", 50) == list(range(50))


@pytest.mark.parametrize("question", ["zebra", "", "?!", "zebra unicorn"])
def test_nothing_in_common(question: str) -> None:
    assert Index([Passage("1", text) for text in TEXTS]).search(question, 3) == []


@pytest.mark.parametrize("texts", [[], ["..."], ["", "!"]])
def test_no_words_at_all(texts: list[str]) -> None:
    assert Index([Passage("1", text) for text in texts]).search("lamp", 3) == []


def test_a_row_never_finds_itself() -> None:
    rows: list[tuple[Row, Example]] = [
        (Row("f", 1, {}), Completion("Where is my lamp?", "lost")),
        (Row("f", 2, {}), Completion("Where is my lamp?", "late")),
    ]
    index = Index(retrieval.of_rows(rows))
    own = retrieval.normalise(retrieval.row_text(rows[0][1]))
    assert index.search("Where is my lamp?", 2, without={own}) == [1]


def test_rows_as_passages() -> None:
    chat = Chat([{"role": "user", "content": " Hi "}, {"role": "assistant", "content": "Hello"}])
    rows: list[tuple[Row, Example]] = [(Row("f", 1, {}), Text("story")), (Row("f", 2, {}), chat)]
    assert retrieval.of_rows(rows) == [Passage("f:2", "Hi\nHello", " Hi ")]


def test_questions_alone_are_compared_where_asked() -> None:
    passages = [Passage("1", "what is it\nlamp", "what is it"), Passage("2", "a lamp\nno", "a lamp")]
    assert sorted(Index(passages).search("lamp", 2)) == [0, 1]
    assert Index(passages, questions=True).search("lamp", 2) == [1]


def test_words() -> None:
    assert retrieval.terms("Where's THE Straße, no. 42? 東京へ naïve") == [
        *("wheres", "the", "strasse", "no", "42", "東", "京", "へ", "naïve"),
    ]


def test_documents(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "one.md").write_text("# Returns\n\nWithin 30 days.\n\n# Shipping\n\nTwo days.\n")
    (tmp_path / "a.TXT").write_bytes(b"\xef\xbb\xbfFirst\r\n\r\nSecond")
    (tmp_path / "c.py").write_text("import os")
    (tmp_path / "link.txt").symlink_to(tmp_path / "a.TXT")
    assert retrieval.of_folder(str(tmp_path)) == [
        Passage(f"{tmp_path}/a.TXT#1", "First\n\nSecond"),
        Passage(f"{tmp_path}/b/one.md#1", "# Returns\n\nWithin 30 days."),
        Passage(f"{tmp_path}/b/one.md#2", "# Shipping\n\nTwo days."),
    ]


def test_passages_are_short_and_lose_nothing() -> None:
    text = "\n\n".join(" ".join(f"w{number}x{part}" for part in range(number)) for number in range(1, 120, 7))
    found = retrieval.split(text, 100)
    assert max(map(len, found)) <= 100
    assert " ".join(found).split() == text.split()
    assert retrieval.split("a" * 250, 100) == ["a" * 100, "a" * 100, "a" * 50]
    assert retrieval.split(" \n\n\n ") == []


def test_folders_that_are_no_use(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a folder"):
        retrieval.of_folder(str(tmp_path / "absent"))
    with pytest.raises(DataError, match="has no text"):
        retrieval.of_folder(str(tmp_path))
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"a\.txt: is not UTF-8"):
        retrieval.of_folder(str(tmp_path))
