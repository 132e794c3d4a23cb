import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxtune.errors import DataError
from mlxtune.metrics.intervals import mean_share
from mlxtune.metrics.rouge_l import f_measure, rouge_l


def test_the_hand_worked_case() -> None:
    # "the cat on the mat" of 6 given and 5 expected words: 2 · 5/6 · 1 / (5/6 + 1)
    assert f_measure("The cat sat on the mat.", "the cat, on THE mat") == pytest.approx(10 / 11, rel=1e-12)
    assert f_measure("mat the on", "on the mat") == pytest.approx(1 / 3)
    assert f_measure("same", "same") == 1


@pytest.mark.parametrize("texts", [("", "a"), ("a", ""), ("", ""), ("?!", "?!"), ("a", "b")])
def test_texts_without_a_common_word_score_nothing(texts: tuple[str, str]) -> None:
    assert f_measure(*texts) == 0


def test_letters_of_any_script_are_letters() -> None:
    assert f_measure("Größe: groß", "GRÖSSE groß") == 0.5
    assert f_measure("snake_case", "snake case") == 1


def test_the_score_is_the_mean_over_rows() -> None:
    answers, expected = ["a b", "c", "x"], ["a b", "c d e", "y"]
    assert rouge_l(answers, expected) == mean_share("rouge_l", [1, 0.5, 0])
    groups = ["g", "g", "h"]
    assert rouge_l(answers, expected, groups) == mean_share("rouge_l", [1, 0.5, 0], groups=groups)


def test_no_rows_are_refused() -> None:
    with pytest.raises(DataError, match="there are no rows to score"):
        rouge_l([], [])
    with pytest.raises(ValueError, match="zip"):
        rouge_l(["a"], ["a", "b"])


@given(st.lists(st.sampled_from("abcd"), max_size=80), st.lists(st.sampled_from("abcd"), max_size=80))
def test_the_common_part_is_that_of_the_textbooks_table(one: list[str], other: list[str]) -> None:
    row = [0] * (len(other) + 1)
    for word in one:
        before = row
        row = [0]
        for place, each in enumerate(other):
            row.append(before[place] + 1 if word == each else max(before[place + 1], row[place]))
    common = row[-1]
    assert f_measure(" ".join(one), " ".join(other)) == pytest.approx(2 * common / max(1, len(one) + len(other)))


@pytest.mark.interop
def test_scores_are_those_of_rouge_score() -> None:
    module = pytest.importorskip("rouge_score.rouge_scorer")
    scorer = module.RougeScorer(["rougeL"])
    draw = random.Random(0)
    words = ["the", "Cat", "sat.", "on", "mat;", "and-or", "x_1", "\n", "..", "It's", "42", "e.g."]
    for _ in range(300):
        answer, expected = (" ".join(draw.choices(words, k=draw.randint(0, 40))) for _ in range(2))
        wanted = scorer.score(expected, answer)["rougeL"].fmeasure
        assert f_measure(answer, expected) == pytest.approx(wanted, abs=1e-12)
