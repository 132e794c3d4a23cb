"""Differences of predictions on the same rows against scipy and hand-worked cases, and the rows that changed."""

from typing import Any

import numpy as np
import pytest

from mlxtune.comparison import contrast
from mlxtune.metrics.exact_match import exact_match
from mlxtune.metrics.intervals import share
from mlxtune.metrics.loss import loss
from mlxtune.metrics.significance import rows_needed


def line(
    row: int, *, right: bool | None = None, nats: float | None = 1.0, tokens: int = 2, **more: Any
) -> dict[str, Any]:
    found = {
        "where": f"somewhere/data/test.jsonl:{row}",
        "prompt": f"question {row}",
        "expected": "yes",
        "answer": None if right is None else "yes" if right else "no",
        "loss": nats,
        "tokens": tokens,
        "exact": right,
        "right": right,
    }
    return found | more


def rights(pattern: str) -> list[dict[str, Any]]:
    return [line(row, right=each == "1") for row, each in enumerate(pattern, start=1)]


def test_shares_of_rows_by_hand() -> None:
    """Three fixed, one broken of eight: 2/8, and two-sided p of 1 or fewer of 4 coins: 2 · (1 + 4) / 16."""
    found = contrast.difference(rights("00011110"), rights("11101110"), "accuracy")
    assert found is not None
    assert (found["metric"], found["value"], found["n"]) == ("accuracy", 0.25, 8)
    assert found["p"] == pytest.approx(10 / 16)
    assert found["ci_low"] < 0.25 < found["ci_high"]
    assert found["rows_needed"] > 8


def test_losses_are_weighted_by_tokens() -> None:
    draw = np.random.default_rng(0)
    tokens = draw.integers(1, 9, 40).tolist()
    old, new = draw.normal(2, 0.5, 40).tolist(), draw.normal(1.5, 0.5, 40).tolist()
    before = [line(row, nats=old[row], tokens=tokens[row]) for row in range(40)]
    after = [line(row, nats=new[row], tokens=tokens[row]) for row in range(40)]
    found = contrast.difference(before, after, "loss")
    assert found is not None
    wanted = np.average(np.array(new) - np.array(old), weights=tokens)
    assert found["value"] == pytest.approx(wanted, rel=1e-12)
    assert found["p"] < 0.01


def test_the_rows_needed_by_a_loss_are_those_of_its_weighted_mean() -> None:
    """The plain mean of -0.1 / 3 would ask for many more than that of -1.6 / 6 by tokens."""
    apart, tokens = [-0.5, 0.2, 0.2] * 20, [4, 1, 1] * 20
    before = [line(row, nats=2.0, tokens=tokens[row]) for row in range(60)]
    after = [line(row, nats=2.0 + apart[row], tokens=tokens[row]) for row in range(60)]
    found = contrast.difference(before, after, "loss")
    assert found is not None
    mean = (4 * -0.5 + 2 * 0.2) / 6
    spread = np.std([weight * (each - mean) / 2 for each, weight in zip(apart, tokens, strict=True)], ddof=1)
    assert found["value"] == pytest.approx(mean, rel=1e-12)
    assert found["rows_needed"] == int(np.ceil(((1.959964 + 0.841621) * spread / mean) ** 2))
    # all rows better by the same: no spread, whatever they weigh
    after = [line(row, nats=1.5, tokens=tokens[row]) for row in range(60)]
    found = contrast.difference(before, after, "loss")
    assert found is not None
    assert found["rows_needed"] is None


def test_rows_that_say_the_same_in_groups_are_needed_in_groups() -> None:
    """Each row three times over says no more than once: three times the rows that `rows_needed_for` asks for."""
    before, after = rights("000011110000" * 3), rights("011011100010" * 3)
    copies = [
        [{**each, "where": f"data/test.jsonl:{3 * row + copy}", "group": str(row)} for row, each in enumerate(some)
         for copy in range(3)]
        for some in (before, after)
    ]  # fmt: skip
    found = contrast.difference(*copies, "accuracy")
    assert found is not None
    apart = [float(b["right"]) - float(a["right"]) for a, b in zip(before, after, strict=True)]
    alone = ((1.959964 + 0.841621) * np.std(apart, ddof=1) / np.mean(apart)) ** 2
    assert found["rows_needed"] == 3 * int(np.ceil(alone))


def test_more_candidates_need_more_rows() -> None:
    before, after = rights("000011110000" * 3), rights("011011100010" * 3)
    for others in (0, 1, 5):
        given = {"base": before, "tuned": after, **{f"other{i}": after for i in range(others)}}
        found = contrast.differences(given, "base", "accuracy")["tuned"]
        assert found is not None
        assert found["rows_needed"] == rows_needed(9, 3, 36, 0.05 / (others + 1))
    silent = [{**each, "right": None} for each in after]  # one that no row compares
    found = contrast.differences({"base": before, "tuned": after, "silent": silent}, "base", "accuracy")
    assert found["silent"] is None and found["tuned"] is not None
    assert found["tuned"]["rows_needed"] == rows_needed(9, 3, 36)


def test_rows_are_the_same_by_file_name_and_line() -> None:
    before = [line(1, right=False), line(2, right=False), line(3, right=False)]
    after = [line(3, right=True, where="/other/place/data/test.jsonl:3"), line(9, right=True)]
    found = contrast.difference(before, after, "exact_match")
    assert found is not None
    assert (found["value"], found["n"]) == (1.0, 1)


def test_several_samples_of_a_row_are_paired_in_order() -> None:
    before = [line(1, right=False), line(1, right=True)]
    after = [line(1, right=True), line(1, right=True)]
    found = contrast.difference(before, after, "accuracy")
    assert found is not None
    assert (found["value"], found["n"]) == (0.5, 2)


def test_nothing_in_common() -> None:
    assert contrast.difference([line(1, right=True)], [line(2, right=True)], "accuracy") is None
    assert contrast.difference([line(1)], [line(1)], "accuracy") is None
    assert contrast.difference([line(1)], [line(1, nats=None)], "loss") is None


def test_several_comparisons_are_adjusted_by_holm() -> None:
    base, one, two = rights("0" * 12), rights("1" * 8 + "0" * 4), rights("1" * 3 + "0" * 9)
    found = contrast.differences({"one": one, "base": base, "two": two}, "base", "accuracy")
    assert found["base"] is None
    first, second = found["one"], found["two"]
    assert first is not None
    assert second is not None
    assert first["against"] == "base"
    assert first["p"] == pytest.approx(2 / 2**8)
    assert first["p_adjusted"] == pytest.approx(2 * 2 / 2**8)
    assert (second["p"], second["p_adjusted"]) == (0.25, 0.25)


def test_flips_with_examples_taken_evenly() -> None:
    before, after = rights("0" * 20 + "1" * 3 + "1"), rights("1" * 20 + "0" * 3 + "1")
    found = contrast.flips(before, after, ("base", "tuned"), "accuracy")
    assert found is not None
    assert (found["from"], found["to"], found["fixed"], found["broken"]) == ("base", "tuned", 20, 3)
    shown = [(each["kind"], int(each["where"].rpartition(":")[2])) for each in found["examples"]]
    assert shown == [("fixed", row) for row in (1, 5, 9, 13, 17)] + [("broken", row) for row in (21, 22, 23)]
    first = found["examples"][0]
    assert (first["prompt"], first["before"], first["after"]) == ("question 1", "no", "yes")


def test_long_texts_of_flips_are_cut() -> None:
    before, after = [line(1, right=False, prompt="a" * 9000 + "?")], [line(1, right=True, prompt="a" * 9000 + "?")]
    found = contrast.flips(before, after, ("a", "b"), "exact_match")
    assert found is not None
    prompt = found["examples"][0]["prompt"]
    assert len(prompt) < 2010
    assert prompt.endswith("a?")


def test_without_answers_nothing_flips() -> None:
    assert contrast.flips([line(1)], [line(1)], ("a", "b"), "loss") is None


def test_rows_of_another_run_are_found_by_what_they_say() -> None:
    before = [line(7, right=False, prompt="b"), line(8, right=True, prompt="a"), line(9, right=True, prompt="a")]
    after = [line(1, right=True, prompt="a"), line(2, right=True, prompt="b"), line(3, right=True, prompt="c")]
    found = contrast.same_rows(before, after)
    assert [(one["where"][-1], other["where"][-1]) for one, other in found] == [("8", "1"), ("7", "2")]


def test_scores_from_predictions_alone() -> None:
    predictions = [line(1, right=True, nats=0.5, tokens=4), line(2, right=False, nats=2.0, tokens=2)]
    found = {score.metric: score for score in contrast.rescored(predictions)}
    assert list(found) == ["loss", "perplexity", "exact_match", "accuracy"]
    assert found["loss"] == loss([2.0, 4.0], [4, 2])
    assert found["accuracy"] == share("accuracy", 1, 2)
    assert found["exact_match"] == exact_match(["yes", "no"], ["yes", "yes"])
    assert contrast.rescored([]) == []
    assert [score.metric for score in contrast.rescored([line(1, right=True, nats=None)])] == [
        "exact_match",
        "accuracy",
    ]


def test_the_metric_that_all_are_compared_by() -> None:
    def scored(exact: int, loss_too: bool = True) -> list[Any]:
        found = [share("exact_match", exact, 100)]
        return [*found, loss([2.0] * 9, [1] * 9)] if loss_too else found

    labels = [("untuned", [share("accuracy", 1, 9)]), ("tuned", [share("accuracy", 1, 9), share("exact_match", 9, 9)])]
    assert contrast.metric_of(labels) == "accuracy"
    assert contrast.metric_of([("untuned", scored(0)), ("tuned", scored(60))]) == "exact_match"
    assert contrast.metric_of([("untuned", scored(0)), ("tuned", scored(1))]) == "loss"
    assert contrast.metric_of([("untuned", scored(0)), ("untuned", scored(60)), ("tuned", scored(1))]) == "exact_match"
    assert contrast.metric_of([("untuned", scored(0, False)), ("tuned", scored(1))]) == "exact_match"
    assert contrast.metric_of([("untuned", scored(0))]) is None
    assert contrast.metric_of([]) is None


def test_predictions_of_other_rows() -> None:
    predictions = [line(1), line(2), line(2)]
    assert contrast.without(predictions, ["elsewhere/data/test.jsonl:2"]) == [predictions[0]]
