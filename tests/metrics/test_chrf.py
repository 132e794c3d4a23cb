import random
from collections import Counter

import pytest

from mlxtune.errors import DataError
from mlxtune.metrics.chrf import chrf
from mlxtune.metrics.intervals import mean_share


def by_counting(answer: str, expected: str) -> float:
    """chrF2 of texts of six characters and more: the mean of precision and recall over runs of 1 to 6 characters."""
    answer, expected = "".join(answer.split()), "".join(expected.split())
    precisions, recalls = [], []
    for size in range(1, 7):
        given = Counter(answer[i : i + size] for i in range(len(answer) - size + 1))
        wanted = Counter(expected[i : i + size] for i in range(len(expected) - size + 1))
        common = (given & wanted).total()
        precisions.append(common / given.total())
        recalls.append(common / wanted.total())
    precision, recall = sum(precisions) / 6, sum(recalls) / 6
    return 5 * precision * recall / (4 * precision + recall) if common or precision else 0.0


def test_the_score_is_the_mean_of_what_counting_gives() -> None:
    answers = ["the parcel is late", "no refund today", "exactly this"]
    expected = ["your parcel is very late", "a refund was made today", "exactly this"]
    values = [by_counting(*texts) for texts in zip(answers, expected, strict=True)]
    found = chrf(answers, expected)
    assert found.value == pytest.approx(sum(values) / 3, rel=1e-9)
    assert values[2] == 1
    assert (found.metric, found.unit, found.n, found.better) == ("chrf", "share", 3, "higher")
    groups = [1, 1, 2]
    score = mean_share("chrf", values, groups=groups)
    grouped = chrf(answers, expected, groups)
    assert (grouped.ci_low, grouped.ci_high) == pytest.approx((score.ci_low, score.ci_high), rel=1e-9)


def test_empty_answers_score_nothing() -> None:
    assert chrf(["", " "], ["a", "b"]).value == 0


def test_no_rows_are_refused() -> None:
    with pytest.raises(DataError, match="there are no rows to score"):
        chrf([], [])
    with pytest.raises(ValueError, match="zip"):
        chrf(["a"], ["a", "b"])


def test_counting_agrees_on_random_texts() -> None:
    draw = random.Random(0)
    for _ in range(50):
        answer, expected = ("".join(draw.choices("ab c", k=draw.randint(20, 60))) for _ in range(2))
        assert chrf([answer], [expected]).value == pytest.approx(by_counting(answer, expected), rel=1e-9)
