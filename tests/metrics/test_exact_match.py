import pytest

from mlxtune.errors import DataError
from mlxtune.metrics.exact_match import exact_match, exact_match_normalized, is_exact, normalized
from mlxtune.metrics.intervals import mean_share, share, wilson
from mlxtune.report.score import Score


def test_only_surrounding_white_space_is_forgiven() -> None:
    answers = ["yes", " yes\n", "Yes", "yes.", "y es", ""]
    low, high = wilson(2, 6)
    assert exact_match(answers, ["yes"] * 6) == Score(
        metric="exact_match", value=2 / 6, unit="share", ci_low=low, ci_high=high, n=6, better="higher"
    )


def test_the_expected_text_may_have_white_space_around_it() -> None:
    assert is_exact("no", " no ")
    assert not is_exact("no\nno", "no no")


def test_no_rows_are_refused() -> None:
    with pytest.raises(DataError, match="there are no rows to score"):
        exact_match([], [])


def test_lengths_must_agree() -> None:
    with pytest.raises(ValueError, match="zip"):
        exact_match(["a", "b"], ["a"])


def test_rows_of_a_group_count_as_one() -> None:
    answers, groups = ["a", "a", "b", "b"], [1, 1, 2, 2]
    assert exact_match(answers, ["a"] * 4, groups) == mean_share("exact_match", [1, 1, 0, 0], groups=groups)


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("  Yes,\n it   is. ", "yes, it is"),
        ("STRASSE!", "strasse"),
        ("Straße", "strasse"),
        ("Ｙｅｓ！", "yes"),
        ("はい。", "はい"),
        ("wait...", "wait"),
        ("3.5", "3.5"),
        ("...", "..."),
        ("", ""),
    ],
)
def test_case_spacing_and_final_punctuation_are_forgiven(text: str, plain: str) -> None:
    assert normalized(text) == plain


def test_normalized_texts_are_compared() -> None:
    answers, expected = ["Yes.", "no", "A  b", "x y", "-3"], ["yes", "No!", "a b", "xy", "3"]
    assert exact_match_normalized(answers, expected) == share("exact_match_normalized", 3, 5)
    groups = [1, 1, 2, 2, 2]
    assert exact_match_normalized(answers, expected, groups) == mean_share(
        "exact_match_normalized", [1, 1, 1, 0, 0], groups=groups
    )
    with pytest.raises(DataError, match="there are no rows to score"):
        exact_match_normalized([], [])
