"""Test rows near training rows, each named with the nearest one."""

from mlxtune.comparison import contamination
from mlxtune.data.files import Row
from mlxtune.data.formats import Completion, Example


def rows(file: str, *texts: str) -> list[tuple[Row, Example]]:
    return [(Row(file, line, {}), Completion(text, "x")) for line, text in enumerate(texts, start=1)]


TRAIN = rows(
    "train",
    "Where is the parcel that I ordered last week?",
    "Where is the parcel that I ordered last month?",
    "How do I cancel a subscription?",
)


def test_equal_and_near_rows_are_named_with_the_nearest() -> None:
    test = rows(
        "test",
        "Which colours does the lamp have?",
        "where is the PARCEL that i ordered last week",
        "How do I cancel my subscription?",
        "Where is the parcel that I ordered last month",
    )
    found = contamination.near(TRAIN, test)
    assert [(each.test, each.train) for each in found] == [
        ("test:2", "train:1"),
        ("test:3", "train:3"),
        ("test:4", "train:2"),
    ]
    assert [found[0].similarity, found[2].similarity] == [1.0, 1.0]
    assert 0.6 <= found[1].similarity < 1


def test_test_rows_alike_among_themselves_are_none_of_it() -> None:
    assert contamination.near(TRAIN, rows("test", "Is the shop open?", "Is the shop open?")) == []


def test_the_nearest_of_several() -> None:
    test = rows("test", "Where is the parcel that I ordered last months?")
    assert [each.train for each in contamination.near(TRAIN, test)] == ["train:2"]


def test_nothing_to_compare() -> None:
    assert contamination.near([], TRAIN) == []
    assert contamination.near(TRAIN, []) == []


def test_the_scores_without_the_rows_that_are_near() -> None:
    test = rows("test", "Which colours does the lamp have?", "How do I cancel my subscription?")
    line = {"loss": None, "tokens": 0, "exact": None}
    given = {"tuned": [{**line, "where": f"elsewhere/test:{row}", "right": row == 2} for row in (1, 2)]}
    found = contamination.measured(TRAIN, test, given)
    assert found is not None
    assert (found["count"], [each["test"] for each in found["near"]]) == (1, ["test:2"])
    (without,) = found["without"]
    assert (without["name"], [(each["metric"], each["value"], each["n"]) for each in without["scores"]]) == (
        "tuned",
        [("accuracy", 0.0, 1)],
    )
    assert contamination.measured([], test, given) is None
    assert contamination.measured(TRAIN, test[:1], given) == {"count": 0, "near": [], "without": []}
