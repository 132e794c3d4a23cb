import random
import time

import pytest

from mlxtune.data import similar
from mlxtune.data.similar import (
    Pair,
    forms,
    grams,
    jaccard,
    near_pairs,
    neighbours,
    normalise,
    shingles,
    templates,
)

FIFTEEN = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen"


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("Where is  my PARCEL?\n", "where is my parcel"),
        ("don't, won’t", "dont wont"),
        ("order #48213.", "order #48213"),
        ("What is 3 + 4?", "what is 3 + 4"),
        ("1.5 is not 15", "1 5 is not 15"),
        ("ＦＵＬＬ width", "full width"),
        ("Straße", "strasse"),
        ("?!", "?!"),
        ("", ""),
    ],
)
def test_normalise_drops_case_punctuation_and_spacing_only(text: str, plain: str) -> None:
    assert normalise(text) == plain
    assert normalise(plain) == plain


def test_signs_make_different_questions() -> None:
    assert normalise("What is 3 + 4?") != normalise("What is 3 - 4?")


def test_shingles_are_words_and_neighbours_with_digits_as_0() -> None:
    assert shingles("Order 17, NOW!") == {"order", "0", "now", "order 0", "0 now"}
    assert shingles("HB-48213") == {"hb", "0", "hb 0"}
    assert shingles("今日は") == {"今", "日", "は", "今 日", "日 は"}
    assert shingles("?!") == frozenset()


def test_jaccard_by_hand() -> None:
    assert jaccard(frozenset("abc"), frozenset("bcd")) == 2 / 4
    assert jaccard(frozenset("ab"), frozenset("ab")) == 1
    assert jaccard(frozenset("ab"), frozenset("cd")) == 0
    assert jaccard(frozenset(), frozenset()) == 0


def test_grams_are_four_letters_in_a_row() -> None:
    assert grams("to go") == {" to ", "to g", "o go", " go "}
    assert grams("a") == {" a "}
    assert grams("") == {"  "}


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("Where is order 48213?", "where is order 0"),
        ("On 1/2/2024 I paid for what never came", "on 0/0/0 i paid for what never came"),
        ("今日は", "今 日 は"),
        ("?!", "?!"),
        ("", ""),
    ],
)
def test_the_form_that_is_compared(text: str, form: str) -> None:
    assert forms([text]) == [form]


def test_numbers_that_are_the_question_stay_apart() -> None:
    (one, other, again) = forms(["What is 1234 + 7?", "What is 1235 + 7?", "what is 1234 + 7"])
    assert one == again != other
    assert len(one) == len("what is # + #")  # a number counts as one letter
    assert len(grams(one) & grams(other)) == len(grams(one)) - 4


def test_a_typo_by_hand() -> None:
    # " where is my parcel " has 20 letters, so 17 grams; one wrong letter in the middle changes four
    assert near_pairs(["Where is my parcel?", "Where is my percel?"]) == [Pair(0, 1, 13 / 21)]
    assert near_pairs(["Where is my parcel?", "Where is my percel?"], threshold=13 / 21) == [Pair(0, 1, 13 / 21)]
    assert near_pairs(["Where is my parcel?", "Where is my percel?"], threshold=0.62) == []


@pytest.mark.parametrize(
    "changed",
    [
        "i was charged twice for my last tranfser and need help",
        "i was billed twice for my last transfer and need help",
        "i was charged twice for my very last transfer and need help",
        "i was charged twice for my transfer and need help",
        "hello i was charged twice for my last transfer and need help",
        "i need help and was charged twice for my last transfer",
    ],
)
def test_small_changes_of_a_short_question_are_near(changed: str) -> None:
    assert len(near_pairs(["I was charged twice for my last transfer and need help", changed])) == 1


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("How do I freeze my card?", "How do I top up my account?"),
        ("My card was stolen yesterday", "My card payment was declined"),
        ("What is 3 + 4?", "What is 3 - 4?"),
        ("What is 3 + 4?", "What is 5 + 6?"),
    ],
)
def test_different_questions_are_not(one: str, other: str) -> None:
    assert near_pairs([one, other]) == []


def test_long_texts_of_one_language_are_not_near() -> None:
    rng = random.Random(0)
    vocabulary = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 7))) for _ in range(3000)]
    weights = [1 / (1 + place) for place in range(3000)]
    texts = [" ".join(rng.choices(vocabulary, weights, k=2500)) for _ in range(6)]
    assert near_pairs(texts) == []


def test_numbers_do_not_tell_two_texts_apart() -> None:
    texts = ["Where is order 48213?", "Where is the cat?", "where is order 77"]
    assert near_pairs(texts) == [Pair(0, 2, 1.0)]


def test_equal_texts_count_once_and_equal_forms_once_for_others() -> None:
    texts = ["Where is order 1?", "WHERE IS ORDER 1", "where is order 2", "where is order 3!", "where is my order 4"]
    near = jaccard(grams("where is order 0"), grams("where is my order 0"))
    assert near >= 0.6
    assert near_pairs(texts) == [Pair(0, 2, 1.0), Pair(0, 3, 1.0), Pair(0, 4, near)]
    assert neighbours(texts).first == [0, 0, 0, 0, 4]


def test_a_common_instruction_does_not_make_rows_alike() -> None:
    instruction = "You sort support tickets. Answer with one label and nothing else. The ticket is:"
    words = [f"word{a}{b}" for a in "abcdef" for b in "ghijkl"]
    texts = [f"{instruction} {first} {second}" for first, second in zip(words[::2], words[1::2], strict=True)]
    assert jaccard(grams(normalise(texts[0])), grams(normalise(texts[1]))) >= 0.6
    plain = normalise(instruction)
    assert templates([normalise(text) for text in texts]) == ([plain], [])
    assert near_pairs(texts) == []
    assert len(near_pairs(texts[:15])) == 105  # fifteen are too few to tell
    assert near_pairs([*texts, "Wordai, wordaj!"]) == [Pair(1, 18, 1.0)]


def test_templates_before_and_behind_and_more_than_one() -> None:
    payloads = [f"payload{letter} of{letter}" for letter in "abcdefghijklmnop"]
    texts = [f"summarise the following ticket {each}" for each in payloads]
    texts += [f"translate to french {each}" for each in payloads]
    texts += [f"{each} which of our intents does this ticket have" for each in payloads]
    assert templates(texts) == (
        ["summarise the following ticket", "translate to french"],
        ["which of our intents does this ticket have"],
    )
    assert forms(texts) == payloads * 3
    # less than 40 % of the text
    assert templates([f"ask {each} {each}" for each in payloads]) == ([], [])


def test_only_the_first_texts_tell_the_template() -> None:
    rng = random.Random(0)
    first = ["".join(rng.choices("abcdefghijklmnop", k=20)) for _ in range(64)]
    later = [f"translate this word to french {each}" for each in first[:20]]
    assert forms([*first, *later])[-1] == later[-1]
    assert forms([*later, *first])[0] == first[0]


def test_sums_are_not_all_alike() -> None:
    texts = [f"What is {a} + {b}?" for a in range(10) for b in range(10)]
    assert near_pairs(texts) == []
    assert neighbours(texts).first == list(range(100))


def _by_brute_force(texts: list[str], threshold: float) -> list[Pair]:
    """The definition: every pair of different forms, and each other text of a form with its first."""
    seen: dict[str, int] = {}
    found = []
    for place, form in enumerate(forms(texts)):
        if form in seen:
            found.append(Pair(seen[form], place, 1.0))
            continue
        for other, earlier in seen.items():
            similarity = jaccard(grams(form), grams(other))
            if similarity >= threshold:
                found.append(Pair(earlier, place, similarity))
        seen[form] = place
    return sorted(found, key=lambda pair: (pair.first, pair.second))


def _random_texts(seed: int) -> list[str]:
    rng = random.Random(seed)
    vocabulary = [f"{a}{b}" for a in ("ca", "order", "mi", "parc", "w") for b in ("", "el", "ing", "ht", "s", "rd")]
    weights = [1 / (1 + place) for place in range(len(vocabulary))]
    texts = [" ".join(rng.choices(vocabulary, weights, k=rng.randint(1, 25))) for _ in range(60)]
    for original in rng.sample(texts, 40):
        words = original.split()
        words[rng.randrange(len(words))] = rng.choice(vocabulary)
        texts.append(" ".join(words))
    return list(dict.fromkeys([*texts, "yes no yes no", "yes no yes no yes", "", "a", "b"]))


@pytest.mark.parametrize("threshold", [0.2, 0.3, 0.5, 0.6, 0.8, 0.95, 1.0])
@pytest.mark.parametrize("seed", range(4))
def test_the_index_finds_what_brute_force_finds(seed: int, threshold: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(similar, "CROWD", 1000)
    texts = _random_texts(seed)
    expected = _by_brute_force(texts, threshold)
    assert expected
    assert near_pairs(texts, threshold) == expected


def test_texts_that_follow_change_nothing_before_them() -> None:
    texts = _random_texts(0)
    whole = near_pairs(texts)
    for count in (40, 60, 99):
        assert near_pairs(texts[:count]) == [pair for pair in whole if pair.second < count]


def test_a_crowd_is_not_compared_each_with_each() -> None:
    rng = random.Random(0)
    different = ["".join(rng.choices("abcdefghijklmnop", k=20)) for _ in range(64)]
    letters = "abcdefghijklmnopqrstuvwxyz"
    crowd = [f"please tell me where my parcel number {a}{b} is now" for a in letters for b in letters]
    rng.shuffle(crowd)
    found = near_pairs([*different, *crowd])
    assert len(crowd) <= len(found) < len(crowd) * 80  # of 228,150 pairs
    assert {pair.second for pair in found} == set(range(65, 64 + len(crowd)))  # none is lost


def test_a_thousand_rows_take_under_two_seconds() -> None:
    rng = random.Random(0)
    vocabulary = [f"word{place}" for place in range(2000)]
    weights = [1 / (1 + place) for place in range(2000)]
    texts = [" ".join(rng.choices(vocabulary, weights, k=rng.randint(8, 30))) for _ in range(1000)]
    started = time.process_time()
    near_pairs(texts)
    assert time.process_time() - started < 2
