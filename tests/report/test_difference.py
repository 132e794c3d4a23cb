from hypothesis import given
from hypothesis import strategies as st

from mlxtune.report.difference import MOST_WORDS, marked


def test_words_of_only_one_text_are_marked() -> None:
    before, after = marked("queue: billing please", "queue: outage please!")
    assert before == [("queue: ", True), ("billing", False), (" please", True)]
    assert after == [("queue: ", True), ("outage", False), (" please", True), ("!", False)]


def test_texts_that_share_little_are_not_marked() -> None:
    assert marked("one two three four", "quite another answer") == (
        [("one two three four", True)],
        [("quite another answer", True)],
    )


def test_long_texts_are_not_compared() -> None:
    text = "a " * MOST_WORDS
    assert marked(text, text + "b") == ([(text, True)], [(text + "b", True)])


@given(st.text(max_size=60), st.text(max_size=60))
def test_the_pieces_are_the_texts(before: str, after: str) -> None:
    first, second = marked(before, after)
    assert "".join(text for text, _ in first) == before
    assert "".join(text for text, _ in second) == after
