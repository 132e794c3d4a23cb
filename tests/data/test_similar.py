import random
import time

import pytest

from mlxtune.data.similar import Pair, connected, groups, jaccard, near_pairs, normalise, shingles

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


def test_one_changed_word_of_fifteen_is_near() -> None:
    # 15 words and 14 pairs each; one word and two pairs differ: 26 shared of 32
    changed = FIFTEEN.replace("seven", "7th")
    assert near_pairs([FIFTEEN, changed]) == [Pair(0, 1, 26 / 32)]
    assert near_pairs([FIFTEEN, changed], threshold=26 / 32) == [Pair(0, 1, 26 / 32)]
    assert near_pairs([FIFTEEN, changed], threshold=0.82) == []


def test_one_changed_word_of_nine_is_not_near() -> None:
    # 9 words and 8 pairs each; 14 shared of 20
    texts = ["a b c d e f g h i", "a b c d X f g h i"]
    assert near_pairs(texts) == []
    assert near_pairs(texts, threshold=0.7) == [Pair(0, 1, 0.7)]


def test_numbers_do_not_tell_two_texts_apart() -> None:
    texts = ["Where is order 48213?", "Where is the cat?", "where is order 77"]
    assert near_pairs(texts) == [Pair(0, 2, 1.0)]


def test_equal_texts_count_once() -> None:
    changed = FIFTEEN.replace("seven", "7th")
    assert near_pairs([FIFTEEN, FIFTEEN.upper(), changed, f"{changed}."]) == [Pair(0, 2, 26 / 32)]


def test_a_common_instruction_does_not_make_rows_alike() -> None:
    instruction = "You sort support tickets. Answer with one label and nothing else. The ticket is:"
    words = [f"word{letter}" for letter in "abcdefghijklmnopqrst"]
    texts = [f"{instruction} {first} {second}" for first, second in zip(words[::2], words[1::2], strict=True)]
    assert jaccard(shingles(texts[0]), shingles(texts[1])) >= 0.74
    assert near_pairs(texts, threshold=0.7) == []
    assert len(near_pairs(texts[:8], threshold=0.7)) == 28  # shingles of eight texts are not yet common


def test_sums_are_not_all_alike() -> None:
    texts = [f"What is {a} + {b}?" for a in range(10) for b in range(10)]
    assert near_pairs(texts) == []
    assert groups(texts) == list(range(100))


def _by_brute_force(texts: list[str], threshold: float) -> list[Pair]:
    """The definition, every pair: alike with all shingles, and half as much without those that a tenth has."""
    sets = [shingles(text) for text in texts]
    common = {s for each in sets for s in each if sum(s in other for other in sets) > max(8, 0.1 * len(texts))}
    found = []
    for a in range(len(texts)):
        for b in range(a + 1, len(texts)):
            similarity = jaccard(sets[a], sets[b])
            if similarity >= threshold and jaccard(sets[a] - common, sets[b] - common) >= threshold / 2:
                found.append(Pair(a, b, similarity))
    return found


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.8, 0.95, 1.0])
@pytest.mark.parametrize("seed", range(4))
def test_the_index_finds_what_brute_force_finds(seed: int, threshold: float) -> None:
    rng = random.Random(seed)
    vocabulary = [f"{a}{b}" for a in "abcdefghij" for b in "klmno"]
    weights = [1 / (1 + place) for place in range(len(vocabulary))]
    texts = [" ".join(rng.choices(vocabulary, weights, k=rng.randint(1, 25))) for _ in range(60)]
    for original in rng.sample(texts, 40):
        words = original.split()
        words[rng.randrange(len(words))] = rng.choice(vocabulary)
        texts.append(" ".join(words))
    texts = list(dict.fromkeys([*texts, "yes no yes no", "yes no yes no yes"]))
    expected = _by_brute_force(texts, threshold)
    assert expected
    assert near_pairs(texts, threshold) == expected


def test_groups_are_transitive() -> None:
    second = FIFTEEN.replace("seven", "7th")
    third = second.replace("ten", "10th")
    assert jaccard(shingles(FIFTEEN), shingles(third)) < 0.8
    assert groups(["other", FIFTEEN, third, second, FIFTEEN.title()]) == [0, 1, 1, 1, 1]


def test_connected_names_a_group_by_its_first_member() -> None:
    assert connected(6, [(4, 5), (5, 2), (3, 1)]) == [0, 1, 2, 1, 2, 2]
    assert connected(0, []) == []


def test_a_thousand_rows_take_under_two_seconds() -> None:
    rng = random.Random(0)
    vocabulary = [f"word{place}" for place in range(2000)]
    weights = [1 / (1 + place) for place in range(2000)]
    texts = [" ".join(rng.choices(vocabulary, weights, k=rng.randint(8, 30))) for _ in range(1000)]
    started = time.process_time()
    near_pairs(texts)
    assert time.process_time() - started < 2
