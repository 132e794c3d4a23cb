import random
from collections import Counter, defaultdict
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxtune.data.files import Row, read_rows, resolve
from mlxtune.data.formats import answer_text, prompt_text, to_example
from mlxtune.data.similar import forms, grams, jaccard, near_pairs, neighbours
from mlxtune.data.split import PARTS, Pairs, assign, compared, leaked, split
from mlxtune.errors import DataError
from mlxtune.recipe import DataRecipe

WORDS = [f"{a}{b}{c}" for a in "bdfgklm" for b in "aeiou" for c in "nrst"]
LABEL = r"^(\w+)"


def pairs_of(values: list[dict[str, Any]]) -> Pairs:
    rows = [Row("rows.jsonl", line, value) for line, value in enumerate(values, start=1)]
    return [(row, to_example(row, DataRecipe())) for row in rows]


def made(count: int, seed: int = 0, labels: str = "ab", group: int = 1) -> Pairs:
    """Rows with unlike prompts, labels in turn, and `group` rows in a row with the same column `g`."""
    rng = random.Random(seed)
    return pairs_of(
        [
            {"prompt": " ".join(rng.sample(WORDS, 8)), "completion": labels[n // group % len(labels)], "g": n // group}
            for n in range(count)
        ]
    )


def lines(part: Pairs) -> list[int]:
    return [row.line for row, _ in part]


def sizes(parts: dict[str, Pairs]) -> dict[str, int]:
    return {name: len(part) for name, part in parts.items()}


def test_shares_are_met_and_every_row_is_in_one_part() -> None:
    parts = split(made(300), DataRecipe(test=0.2, valid=0.1), 0, None)
    assert list(parts) == ["train", "valid", "test"]
    assert sizes(parts) == {"train": 210, "valid": 30, "test": 60}
    assert sorted(lines(parts["train"]) + lines(parts["valid"]) + lines(parts["test"])) == list(range(1, 301))
    for part in parts.values():
        assert lines(part) == sorted(lines(part))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("labels", ["aaab", "abcdefghij", "ab"])
def test_each_label_has_its_share_in_any_order_of_rows(seed: int, labels: str) -> None:
    rows = made(400, labels=labels)
    by_label = sorted(rows, key=lambda pair: str(answer_text(pair[1])))
    for ordered in (rows, by_label):
        parts = split(ordered, DataRecipe(test=0.2, valid=0.1), seed, LABEL)
        assert abs(len(parts["test"]) - 80) <= 4 and abs(len(parts["valid"]) - 40) <= 4
        counts = {name: Counter(answer_text(example) for _, example in part) for name, part in parts.items()}
        total = Counter(answer_text(example) for _, example in rows)
        for each, count in total.items():
            assert abs(counts["test"][each] - 0.2 * count) <= 4
            assert abs(counts["valid"][each] - 0.1 * count) <= 4


def test_labels_are_found_without_a_pattern_and_left_alone_if_asked() -> None:
    rows = made(400, labels="aaaaaaaaab")
    data = DataRecipe(test=0.2, valid=0.1)
    assert assign(rows, data, 0, None) == assign(rows, data, 0, LABEL)
    assert assign(rows, data, 0, None, stratify=False) != assign(rows, data, 0, LABEL)


def test_answers_that_are_all_different_are_no_obstacle() -> None:
    rows = made(400, labels="".join(chr(0x4E00 + n) for n in range(400)))
    parts = split(rows, DataRecipe(test=0.2, valid=0.1), 0, None)
    assert abs(len(parts["test"]) - 80) <= 4 and abs(len(parts["valid"]) - 40) <= 4


def test_the_first_row_of_a_label_is_learned_from() -> None:
    rows = made(100) + made(1, seed=1, labels="r")
    assert assign(rows, DataRecipe(test=0.1, valid=0.1), 0, LABEL)[-1] == "train"


@pytest.mark.parametrize("seed", range(5))
def test_groups_stay_whole_and_shares_are_within_a_group(seed: int) -> None:
    rows = made(420, seed=seed, group=7)
    parts = split(rows, DataRecipe(test=0.2, valid=0.1, group_by="g"), seed, LABEL)
    owners = [{row.value["g"] for row, _ in part} for part in parts.values()]
    assert owners[0] & owners[1] == owners[0] & owners[2] == owners[1] & owners[2] == set()
    assert sum(len(each) for each in owners) == 60
    assert abs(len(parts["test"]) - 0.2 * 420) <= 14
    assert abs(len(parts["valid"]) - 0.1 * 420) <= 14
    for part in parts.values():
        assert {answer_text(example) for _, example in part} == {"a", "b"}


def test_equal_and_nearly_equal_prompts_stay_together() -> None:
    rng = random.Random(0)
    values = []
    for number in range(30):
        words = rng.sample(WORDS, 15)
        changed = [*words[:7], "changed", *words[8:]]
        twin = " ".join(words).upper() + "!"
        values += [{"prompt": text, "completion": f"{number}"} for text in (" ".join(words), twin, " ".join(changed))]
    rng.shuffle(values)
    for seed in range(5):
        parts = split(pairs_of(values), DataRecipe(test=0.2, valid=0.2), seed, None)
        owners = [{answer_text(example) for _, example in part} for part in parts.values()]
        assert owners[0] & owners[1] == owners[0] & owners[2] == owners[1] & owners[2] == set()
        assert sum(sizes(parts).values()) == 90
        assert abs(len(parts["test"]) - 18) <= 6 and abs(len(parts["valid"]) - 18) <= 6


def test_a_group_joins_what_prompts_and_column_join() -> None:
    # row 1 and 2 share the column, 2 and 3 the prompt
    values = [
        {"prompt": "one two three", "completion": "x", "g": 1},
        {"prompt": "four five six", "completion": "x", "g": 1},
        {"prompt": "Four, five, six!", "completion": "x", "g": 2},
        {"prompt": "seven eight nine", "completion": "x", "g": 3},
    ]
    parts = split(pairs_of(values), DataRecipe(test=0.25, valid=0, group_by="g"), 0, None)
    assert {name: lines(part) for name, part in parts.items()} == {"train": [1, 2, 3], "valid": [], "test": [4]}


def test_a_row_between_two_parts_is_in_none() -> None:
    values = [
        {"prompt": "one two three", "completion": "x", "g": 1},
        {"prompt": "four five six", "completion": "x", "g": 2},
        {"prompt": "Four, five, six!", "completion": "x", "g": 1},
        {"prompt": "four five six?", "completion": "x", "g": 3},
        {"prompt": "seven eight nine", "completion": "x", "g": 3},
    ]
    data = DataRecipe(test=0.25, valid=0, group_by="g")
    assert assign(pairs_of(values), data, 0, None) == ["train", "test", None, "test", "test"]
    parts = split(pairs_of(values), data, 0, None)
    assert {name: lines(part) for name, part in parts.items()} == {"train": [1], "valid": [], "test": [2, 4, 5]}


def test_near_on_both_sides_is_left_out_and_ties_nothing() -> None:
    ends = ("is it possible to order another card for my partner", "how long does it take until a parcel arrives here")
    between = f"{ends[0]} and {ends[1]}"
    rows = pairs_of([{"prompt": text, "completion": "x"} for text in (*ends, between, between)])
    assert near_pairs([ends[0], ends[1], between], 0.4) and not near_pairs(list(ends), 0.2)
    alike = neighbours(compared(rows), 0.4)
    assert assign(rows, DataRecipe(test=0.2, valid=0), 0, None, alike=alike) == ["train", "test", None, None]


def test_the_seed_decides() -> None:
    rows = made(60, labels="abc")
    data = DataRecipe(test=0.2, valid=0.1)
    first = split(rows, data, 0, LABEL)
    assert split(rows, data, 0, LABEL) == first
    assert split(rows, data, 1, LABEL)["test"] != first["test"]


def test_leaked_are_test_rows_with_a_neighbour_in_train() -> None:
    texts = ["where is my parcel", "Where is my parcel?", "where is my percel", "who pays", "where is my order 1"]
    alike = neighbours([*texts, "where is my order 2"])
    sides = ["train", "test", "test", "test", "train", "test"]
    assert leaked(alike, sides, 0.6) == [1, 2, 5]
    assert leaked(alike, sides, 0.8) == [1, 5]
    assert leaked(alike, ["train"] * 6, 0.6) == []


def test_a_share_of_0_is_an_empty_part() -> None:
    rows = made(300)
    for test, valid in ((0.0, 0.0), (0.2, 0.0), (0.0, 0.2)):
        found = sizes(split(rows, DataRecipe(test=test, valid=valid), 0, None))
        assert abs(found["test"] - 300 * test) <= 2 * (test > 0)
        assert abs(found["valid"] - 300 * valid) <= 2 * (valid > 0)


def test_no_part_that_is_asked_for_is_empty() -> None:
    assert sizes(split(made(3), DataRecipe(test=0.01, valid=0.01), 0, None)) == {"train": 1, "valid": 1, "test": 1}
    assert sizes(split(made(3), DataRecipe(test=0.5, valid=0.4), 0, None)) == {"train": 1, "valid": 1, "test": 1}


def test_too_few_groups_are_counted() -> None:
    values = [{"prompt": "the same", "completion": f"{n}"} for n in range(6)]
    values.append({"prompt": "another", "completion": "x"})
    with pytest.raises(DataError) as caught:
        split(pairs_of(values), DataRecipe(test=0.1, valid=0.1), 0, None)
    assert str(caught.value) == (
        "rows.jsonl: 7 rows in 2 groups that must stay together: too few for train, valid, test; "
        "add rows that ask something else, or bring {train,valid,test}.jsonl of your own"
    )
    with pytest.raises(DataError, match=r"0 rows in 0 groups .* too few for train; "):
        split([], DataRecipe(test=0, valid=0), 0, None)


def test_a_missing_column_names_the_row() -> None:
    rows = made(5) + pairs_of([{"prompt": "p", "completion": "c"}])
    with pytest.raises(DataError) as caught:
        split(rows, DataRecipe(group_by="g"), 0, None)
    assert (
        str(caught.value) == "rows.jsonl:1: has no column `g`, which data.group_by names; it has `prompt`, `completion`"
    )


def test_rows_that_ask_nothing_are_told_apart_by_what_they_say() -> None:
    values = [{"messages": [{"role": "assistant", "content": f"{word} poem {word}"}]} for word in WORDS[:20]]
    assert sum(sizes(split(pairs_of(values), DataRecipe(test=0.1, valid=0.1), 0, None)).values()) == 20


def tickets() -> Pairs:
    return [(row, to_example(row, DataRecipe())) for row in read_rows(resolve("tickets"))]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("group_by", ["cluster", None])
def test_the_tickets_split_without_a_leak_and_with_every_intent(group_by: str | None, seed: int) -> None:
    rows = tickets()
    parts = split(rows, DataRecipe(test=0.12, valid=0.08, group_by=group_by), seed, None)
    intents = {name: Counter(row.value["cluster"][:-3] for row, _ in part) for name, part in parts.items()}
    assert {len(each) for each in intents.values()} == {9}
    assert sum(sizes(parts).values()) == len(rows)
    tolerance = 0.02 if group_by else 0.01
    assert abs(len(parts["test"]) / len(rows) - 0.12) <= tolerance
    assert abs(len(parts["valid"]) / len(rows) - 0.08) <= tolerance
    compare = [grams(form) for form in forms([prompt_text(e) for name in PARTS for _, e in parts[name]])]
    train, held_out = compare[: len(parts["train"])], compare[len(parts["train"]) :]
    assert max(jaccard(one, other) for one in held_out for other in train) < 0.6


WORDINGS = st.lists(
    st.sampled_from(["card", "lost", "parcel", "money back", "help me please", "order"]), min_size=1, max_size=4
)
QUESTIONS = st.builds(
    lambda words, end, answer, key: {"prompt": " ".join([*words, *end]), "completion": answer, "g": key},
    WORDINGS,
    st.sampled_from([(), ("now",), ("today",), ("5",)]),
    st.sampled_from(["a", "b", "c\nbecause"]),
    st.integers(0, 25),
)
FILES = st.lists(QUESTIONS, min_size=1, max_size=60)


def _check(rows: Pairs, sides: list[str | None], group_by: str | None) -> None:
    """No near pair, and no key, on two sides; by the definitions."""
    where = {place: side for place, side in enumerate(sides) if side is not None}
    compare = [grams(form) for form in forms(compared(rows))]
    for one, side in where.items():
        for other, another in where.items():
            assert side == another or jaccard(compare[one], compare[other]) < 0.6
    if group_by is not None:
        owners = defaultdict(set)
        for place, side in where.items():
            owners[rows[place][0].value[group_by]].add(side)
        assert {len(each) for each in owners.values()} <= {1}


@settings(max_examples=150, deadline=None)
@given(FILES, FILES, st.integers(0, 3), st.sampled_from([None, "g"]), st.sampled_from([0.0, 0.1, 0.3]))
def test_nothing_leaks_and_rows_keep_their_part_when_others_follow(
    values: list[dict[str, Any]], more: list[dict[str, Any]], seed: int, group_by: str | None, test: float
) -> None:
    data = DataRecipe(test=test, valid=0.2, group_by=group_by)
    rows, longer = pairs_of(values), pairs_of(values + more)
    try:
        sides = assign(rows, data, seed, LABEL)
    except DataError:
        return
    assert set(sides) <= {"train", "valid", None} | ({"test"} if test else set())
    assert {"train", "valid"} | ({"test"} if test else set()) <= set(sides)
    _check(rows, sides, group_by)
    after = assign(longer, data, seed, LABEL)
    assert after[: len(rows)] == sides
    _check(longer, after, group_by)
    parts = split(longer, data, seed, LABEL)
    assert sorted(line for part in parts.values() for line in lines(part)) == [
        line for line, side in enumerate(after, start=1) if side is not None
    ]


@settings(max_examples=40, deadline=None)
@given(
    st.integers(300, 500), st.integers(0, 1000), st.integers(1, 4), st.sampled_from(["a", "ab", "aaab", "abcdefgh"]),
    st.sampled_from([0.05, 0.1, 0.2, 0.4]), st.sampled_from([0.0, 0.1, 0.3]), st.booleans(),
)  # fmt: skip
def test_shares_hold_for_any_file(
    count: int, seed: int, group: int, labels: str, test: float, valid: float, ordered: bool
) -> None:
    rows = made(count, seed, labels, group)
    if ordered:
        rows.sort(key=lambda pair: str(answer_text(pair[1])))
    parts = split(rows, DataRecipe(test=test, valid=valid, group_by="g"), seed, LABEL)
    assert sum(sizes(parts).values()) == count
    assert abs(len(parts["test"]) / count - test) <= 0.03
    assert abs(len(parts["valid"]) / count - valid) <= 0.03
    for label in set(labels):
        having = {name: sum(answer_text(example) == label for _, example in part) for name, part in parts.items()}
        assert abs(having["test"] / sum(having.values()) - test) <= 0.15
