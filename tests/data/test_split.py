import random
from collections import Counter
from typing import Any

import pytest

from mlxtune.data.files import Row, read_rows, resolve
from mlxtune.data.formats import answer_text, prompt_text, to_example
from mlxtune.data.similar import jaccard, shingles
from mlxtune.data.split import Pairs, split
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
    parts = split(made(100), DataRecipe(test=0.2, valid=0.1), 0, None)
    assert list(parts) == ["train", "valid", "test"]
    assert sizes(parts) == {"train": 70, "valid": 10, "test": 20}
    assert sorted(lines(parts["train"]) + lines(parts["valid"]) + lines(parts["test"])) == list(range(1, 101))
    for part in parts.values():
        assert lines(part) == sorted(lines(part))


@pytest.mark.parametrize("seed", range(5))
def test_each_label_has_its_share(seed: int) -> None:
    parts = split(made(200, labels="aaab"), DataRecipe(test=0.2, valid=0.1), seed, LABEL)
    counts = {name: Counter(answer_text(example) for _, example in part) for name, part in parts.items()}
    assert counts == {"train": {"a": 105, "b": 35}, "valid": {"a": 15, "b": 5}, "test": {"a": 30, "b": 10}}


def test_a_rare_label_is_in_every_part_where_it_has_enough_rows() -> None:
    rare = made(3, seed=1, labels="r")
    parts = split(made(97) + rare, DataRecipe(test=0.1, valid=0.1), 0, LABEL)
    assert {name: sum(answer_text(example) == "r" for _, example in part) for name, part in parts.items()} == {
        "train": 1,
        "valid": 1,
        "test": 1,
    }


def test_a_label_with_too_few_rows_does_not_stop_the_split() -> None:
    parts = split(made(98) + made(2, seed=1, labels="r"), DataRecipe(test=0.1, valid=0.1), 0, LABEL)
    assert sizes(parts) == {"train": 80, "valid": 10, "test": 10}


@pytest.mark.parametrize("seed", range(5))
def test_groups_stay_whole_and_shares_are_within_a_group(seed: int) -> None:
    rows = made(203, seed=seed, group=7)
    parts = split(rows, DataRecipe(test=0.2, valid=0.1, group_by="g"), seed, LABEL)
    owners = [{row.value["g"] for row, _ in part} for part in parts.values()]
    assert owners[0] & owners[1] == owners[0] & owners[2] == owners[1] & owners[2] == set()
    assert abs(len(parts["test"]) - 0.2 * 203) <= 7
    assert abs(len(parts["valid"]) - 0.1 * 203) <= 7
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
        assert sizes(parts) == {"train": 54, "valid": 18, "test": 18}


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


def test_the_seed_decides_and_the_order_of_rows_does_not() -> None:
    rows = made(60, labels="abc")
    data = DataRecipe(test=0.2, valid=0.1)
    first = split(rows, data, 0, LABEL)
    assert split(rows, data, 0, LABEL) == first
    assert split(rows, data, 1, LABEL)["test"] != first["test"]
    shuffled = random.Random(3).sample(rows, len(rows))
    again = split(shuffled, data, 0, LABEL)
    assert {name: sorted(lines(part)) for name, part in again.items()} == {n: lines(p) for n, p in first.items()}
    assert lines(again["train"]) == [row.line for row, _ in shuffled if row.line in set(lines(first["train"]))]


def test_a_share_of_0_is_an_empty_part() -> None:
    rows = made(20)
    assert sizes(split(rows, DataRecipe(test=0, valid=0), 0, None)) == {"train": 20, "valid": 0, "test": 0}
    assert sizes(split(rows, DataRecipe(test=0.2, valid=0), 0, None)) == {"train": 16, "valid": 0, "test": 4}
    assert sizes(split(rows, DataRecipe(test=0, valid=0.2), 0, None)) == {"train": 16, "valid": 4, "test": 0}


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
    assert str(caught.value) == "rows.jsonl:1: has no column `g`, which data.group_by names"


def test_rows_that_ask_nothing_are_told_apart_by_what_they_say() -> None:
    values = [{"messages": [{"role": "assistant", "content": f"poem {word}"}]} for word in WORDS[:20]]
    assert sizes(split(pairs_of(values), DataRecipe(test=0.1, valid=0.1), 0, None)) == {
        "train": 16,
        "valid": 2,
        "test": 2,
    }


@pytest.mark.parametrize("group_by", ["cluster", None])
def test_the_tickets_split_without_a_leak_and_with_every_intent(group_by: str | None) -> None:
    rows = [(row, to_example(row, DataRecipe())) for row in read_rows(resolve("tickets"))]
    parts = split(rows, DataRecipe(test=0.12, valid=0.08, group_by=group_by), 0, None)
    intents = {name: Counter(row.value["cluster"][:-3] for row, _ in part) for name, part in parts.items()}
    assert {len(each) for each in intents.values()} == {9}
    assert abs(len(parts["test"]) - 0.12 * len(rows)) <= 9
    assert abs(len(parts["valid"]) - 0.08 * len(rows)) <= 9
    train = [shingles(prompt_text(example)) for _, example in parts["train"]]
    held_out = [shingles(prompt_text(example)) for name in ("valid", "test") for _, example in parts[name]]
    nearest = max(jaccard(one, other) for one in held_out for other in train)
    assert nearest < (0.5 if group_by else 0.8)
