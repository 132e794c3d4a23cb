import pytest

from mlxtune.errors import DataError
from mlxtune.metrics.intervals import share
from mlxtune.metrics.refusals import PHRASES, is_refusal, refusals


@pytest.mark.parametrize("phrase", PHRASES)
def test_each_phrase_at_the_beginning(phrase: str) -> None:
    assert is_refusal(f"{phrase.capitalize()} something.")
    assert is_refusal(f"I'm sorry, but {phrase} something.")
    assert not is_refusal(f"Thank you for writing. {phrase.capitalize()} something.")


@pytest.mark.parametrize(
    "answer",
    [
        "I’m unable to help with that.",
        "**I cannot** share that.",
        "Unfortunately, I can't do that.",
        "As an AI language model, I do not have access to your account.",
        "No. I won't.",
        "I am very sorry; however I am not able to say.",
        '"Sorry, I can\'t."',
        "I apologize, but\n I cannot see it.",
    ],
)
def test_openings_are_passed_over(answer: str) -> None:
    assert is_refusal(answer)


@pytest.mark.parametrize(
    "answer",
    ["", "Sorry for the delay: your parcel is on its way.", "I'm afraid so.", "No.", "I can help.", "Sorry " * 10_000,
     "Icannot", "We cannot ship abroad.", "i can"],
)  # fmt: skip
def test_what_is_no_refusal(answer: str) -> None:
    assert not is_refusal(answer)


def test_the_score_is_a_share() -> None:
    assert refusals(["I cannot do that.", "Done.", "Yes."]) == share("refusals", 1, 3, better="lower")
    with pytest.raises(DataError, match="there are no rows to score"):
        refusals([])
