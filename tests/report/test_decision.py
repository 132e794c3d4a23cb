"""The verdict of a comparison: each rule and its borders, on figures worked out by hand."""

from typing import Any

import pytest

from mlxtune.report.decision import best, decide


def candidate(
    name: str,
    value: float,
    *,
    kind: str = "untuned",
    low: float | None = None,
    metric: str = "accuracy",
    difference: tuple[float, float, float, float] | None = None,
    needed: int | None = None,
    prompt_tokens: float = 30.0,
    n: int = 100,
) -> dict[str, Any]:
    """A candidate of `n` rows; `difference` is value, low, high and adjusted p against the best untuned one."""
    share = metric != "loss"
    score = {
        "metric": metric,
        "value": value,
        "unit": "share" if share else "nats per token",
        "ci_low": max(0.0, value - 0.08) if low is None else low,
        "ci_high": min(1.0, value + 0.08) if share else value + 0.08,
        "n": n,
        "better": "higher" if share else "lower",
    }
    found = None
    if difference is not None:
        names = ("value", "ci_low", "ci_high", "p_adjusted")
        found = {"rows_needed": needed, **dict(zip(names, difference, strict=True))}
    cost = {"prompt_tokens": prompt_tokens}
    return {"name": name, "kind": kind, "scores": [score], "difference": found, "cost": cost}


def forgetting(rise: float) -> dict[str, Any]:
    return {"anchor": "tickets", "base_loss": 2.0, "tuned_loss": 2.0 + rise, "budget": 0.1}


BASE = candidate("base", 0.1, difference=(-0.5, -0.6, -0.4, 0.0001))
PROMPT = candidate("prompt", 0.6)


def test_tuning_is_clearly_better() -> None:
    tuned = candidate("tuned", 0.9, kind="tuned", difference=(0.3, 0.2, 0.4, 0.0004))
    assert decide([BASE, PROMPT, tuned], "accuracy", None) == {
        "decision": "tune",
        "sentence": "Tuning is worth it on 100 held-out rows: accuracy 90 % (82-98) by the tuned model, 60 % (52-68) "
        "by the base model with a prompt, a difference of +30.0 points (95 % interval +20.0 to +40.0).",
        "reasons": ["p < 0.001 after adjusting for 2 comparisons, below 0.05"],
        "rows_needed": None,
    }


@pytest.mark.parametrize(
    ("p", "decision"), [(0.0499, "tune"), (0.05, "cannot_tell"), (0.2, "cannot_tell"), (1.0, "cannot_tell")]
)
def test_clear_is_below_the_level(p: float, decision: str) -> None:
    tuned = candidate("tuned", 0.7, kind="tuned", difference=(0.1, 0.0, 0.2, p), needed=240)
    assert decide([PROMPT, tuned], "accuracy", None)["decision"] == decision


def test_what_was_forgotten_is_said_in_the_same_sentence() -> None:
    tuned = candidate("tuned", 0.9, kind="tuned", difference=(0.3, 0.2, 0.4, 0.0004))
    within = decide([PROMPT, tuned], "accuracy", forgetting(0.08))
    assert "forgotten" not in within["sentence"]
    assert within["reasons"][-1] == ("the loss on the anchor rose by 0.08 nats per token, within the budget of 0.100")
    beyond = decide([PROMPT, tuned], "accuracy", forgetting(0.42))
    assert beyond["decision"] == "tune"
    forgot = "the loss on the anchor rose by 0.420 nats per token, more than the budget of 0.100"
    assert beyond["sentence"].endswith("(95 % interval +20.0 to +40.0), but more was forgotten than the budget allows.")
    assert beyond["reasons"][-1] == forgot
    better = decide([PROMPT, tuned], "accuracy", forgetting(-0.3))
    assert better["reasons"][-1] == "the loss on the anchor fell by 0.300 nats per token, within the budget of 0.100"


@pytest.mark.parametrize(("high", "decision"), [(0.049, "prompt"), (0.05, "prompt"), (0.051, "cannot_tell")])
def test_no_more_than_the_margin_is_left_to_gain(high: float, decision: str) -> None:
    tuned = candidate("tuned", 0.6, kind="tuned", difference=(0.0, -0.05, high, 1.0))
    assert decide([PROMPT, tuned], "accuracy", None)["decision"] == decision


def test_a_prompt_is_enough() -> None:
    few = candidate("few_shot", 0.8, prompt_tokens=300)
    tuned = candidate("tuned", 0.7, kind="tuned", difference=(-0.1, -0.2, -0.01, 0.03))
    found = decide([BASE, few, tuned], "accuracy", None)
    assert found["decision"] == "prompt"
    assert found["sentence"] == (
        "No need to tune: the base model with examples in its prompt is enough: accuracy 70 % (62-78) by the tuned "
        "model, 80 % (72-88) by the base model with examples in its prompt, a difference of -10.0 points "
        "(95 % interval -20.0 to -1.0)."
    )
    assert found["reasons"] == [
        "p = 0.030 after adjusting for 2 comparisons, below 0.05",
        "the interval leaves tuning 0 points to gain, no more than the 5 points that count",
        "the base model with examples in its prompt reads 300 tokens a row, the tuned model 30",
    ]


def test_the_base_alone_may_be_enough() -> None:
    tuned = candidate("tuned", 0.6, kind="tuned", difference=(0.0, -0.02, 0.02, 1.0))
    found = decide([candidate("base", 0.6), tuned], "accuracy", None)
    assert (found["decision"], found["sentence"][:24]) == ("prompt", "No tuning is needed: acc")


def held(candidate: dict[str, Any], value: float, high: float) -> dict[str, Any]:
    """A candidate that is right in so many rows when it may say nothing but labels."""
    own = candidate["scores"][0]
    labels = {**own, "metric": "label_accuracy", "value": value, "ci_low": value - 0.05, "ci_high": high}
    return {**candidate, "scores": [own, labels]}


@pytest.mark.parametrize(
    ("value", "high", "decision"),
    [(0.5, 0.58, "tune"), (0.7, 0.819, "tune"), (0.7, 0.82, "cannot_tell"), (0.9, 0.95, "prompt"), (0.95, 1, "prompt")],
)
def test_the_base_may_be_held_to_the_labels(value: float, high: float, decision: str) -> None:
    """It says none of the labels by itself, but asked which is likeliest it may be as good as the tuned model."""
    base = held(candidate("base", 0.0), value, high)
    tuned = held(candidate("tuned", 0.9, kind="tuned", low=0.82, difference=(0.9, 0.8, 0.95, 1e-9)), 0.9, 0.95)
    found = decide([base, tuned], "accuracy", None)
    assert found["decision"] == decision
    assert any(
        "held to the labels by their probabilities, the base model as it is" in each for each in found["reasons"]
    )


@pytest.mark.parametrize(
    ("value", "low", "decision"),
    [(0.95, 0.9, "prompt"), (0.949, 0.9, "cannot_tell"), (0.95, 0.899, "cannot_tell"), (1.0, 0.7, "cannot_tell")],
)
def test_near_the_ceiling(value: float, low: float, decision: str) -> None:
    """With all of ten rows right the interval still begins at 72 %: that is not near the ceiling."""
    tuned = candidate("tuned", value, kind="tuned", difference=(0.0, -0.2, 0.2, 1.0))
    found = decide([candidate("prompt", value, low=low), tuned], "accuracy", None)
    assert found["decision"] == decision


def test_a_clear_gain_counts_near_the_ceiling_too() -> None:
    tuned = candidate("tuned", 1.0, kind="tuned", difference=(0.04, 0.01, 0.07, 0.01))
    assert decide([candidate("prompt", 0.96, low=0.93), tuned], "accuracy", None)["decision"] == "tune"


def test_retrieval_is_clearly_better_than_all() -> None:
    base = candidate("base", 0.1, difference=(-0.7, -0.8, -0.6, 0.0001))
    few = candidate("few_shot", 0.3, difference=(-0.5, -0.6, -0.4, 0.0001))
    retrieval = candidate("retrieval", 0.8)
    tuned = candidate("tuned", 0.3, kind="tuned", difference=(-0.5, -0.6, -0.4, 0.0002))
    found = decide([base, few, retrieval, tuned], "accuracy", None)
    assert found["decision"] == "retrieve"
    assert found["sentence"].startswith("Retrieval suits these rows better than tuning: accuracy 30 % (22-38) by the ")


@pytest.mark.parametrize(("p", "decision"), [(0.049, "retrieve"), (0.05, "prompt")])
def test_retrieval_must_beat_the_other_prompts(p: float, decision: str) -> None:
    few = candidate("few_shot", 0.7, difference=(-0.1, -0.2, 0.0, p))
    tuned = candidate("tuned", 0.3, kind="tuned", difference=(-0.5, -0.6, -0.4, 0.0002))
    assert decide([few, candidate("retrieval", 0.8), tuned], "accuracy", None)["decision"] == decision


def test_retrieval_that_tuning_may_still_beat() -> None:
    few = candidate("few_shot", 0.3, difference=(-0.5, -0.6, -0.4, 0.0001))
    tuned = candidate("tuned", 0.82, kind="tuned", difference=(0.02, -0.1, 0.14, 1.0), needed=1500)
    assert decide([few, candidate("retrieval", 0.8), tuned], "accuracy", None)["decision"] == "cannot_tell"


def test_how_many_rows_would_show_a_gain() -> None:
    tuned = candidate("tuned", 0.66, kind="tuned", difference=(0.06, -0.03, 0.15, 0.2), needed=412)
    found = decide([PROMPT, tuned], "accuracy", None)
    assert (found["decision"], found["rows_needed"]) == ("cannot_tell", 412)
    assert found["sentence"] == (
        "Cannot tell yet on 100 rows: accuracy 66 % (58-74) by the tuned model, 60 % (52-68) by the base model with a "
        "prompt, a difference of +6.0 points (95 % interval -3.0 to +15.0); label about 320 more rows."
    )
    assert found["reasons"] == [
        "p = 0.200, not below 0.05",
        "the interval leaves tuning 15 points to gain, more than the 5 points that count",
    ]


def test_few_rows_can_show_nothing_however_clear() -> None:
    """All of five rows speak for tuning: p is 2/32, of six 2/64. With two comparisons it takes seven: 2 · 2/128."""
    tuned = candidate("tuned", 0.9, kind="tuned", n=5, difference=(0.8, 0.3, 1.0, 0.0625), needed=3)
    alone = decide([candidate("base", 0.1, n=5), tuned], "accuracy", None)
    assert alone["rows_needed"] == 6
    assert alone["sentence"].startswith("Cannot tell yet on 5 rows: ")
    assert alone["sentence"].endswith("; label about 1 more row.")
    few = candidate("few_shot", 0.05, n=5, difference=(-0.05, -0.2, 0.1, 1.0))
    assert decide([candidate("base", 0.1, n=5), few, tuned], "accuracy", None)["rows_needed"] == 7


def test_how_many_rows_would_show_that_there_is_none() -> None:
    """Half an interval of 20 points must fit into the margin of 5: sixteen times the rows."""
    tuned = candidate("tuned", 0.6, kind="tuned", difference=(0.0, -0.2, 0.2, 1.0))
    assert decide([PROMPT, tuned], "accuracy", None)["rows_needed"] == 1600
    worse = candidate("tuned", 0.55, kind="tuned", difference=(-0.05, -0.25, 0.15, 0.6))
    assert decide([PROMPT, worse], "accuracy", None)["rows_needed"] == 400


def test_nobody_does_the_task() -> None:
    tuned = candidate("tuned", 0.04, kind="tuned", difference=(0.04, 0.001, 0.08, 0.04))
    found = decide([candidate("base", 0.0), tuned], "accuracy", None)
    assert (found["decision"], found["rows_needed"]) == ("cannot_tell", None)
    assert "neither the base model as it is nor the tuned model does these rows" in found["sentence"]


def test_losses_are_better_when_lower() -> None:
    few = candidate("few_shot", 1.2, metric="loss")
    base = candidate("base", 2.0, metric="loss", difference=(0.8, 0.7, 0.9, 0.0001))
    tuned = candidate("tuned", 0.9, metric="loss", kind="tuned", difference=(-0.3, -0.35, -0.25, 0.0004))
    found = decide([base, few, tuned], "loss", None)
    assert found["decision"] == "tune"
    assert "held-out loss 0.900 (0.820-0.980) by the tuned model" in found["sentence"]
    assert "-0.300 nats per token (95 % interval -0.350 to -0.250)" in found["sentence"]
    worse = candidate("tuned", 1.25, metric="loss", kind="tuned", difference=(0.05, -0.02, 0.12, 0.2))
    assert decide([base, few, worse], "loss", None)["decision"] == "prompt"
    open_case = candidate("tuned", 1.15, metric="loss", kind="tuned", difference=(-0.05, -0.12, 0.02, 0.2), needed=300)
    assert decide([base, few, open_case], "loss", None)["rows_needed"] == 300


def test_the_best_of_several_tuned_models_decides() -> None:
    tuned = candidate("tuned", 0.7, kind="tuned", difference=(0.1, -0.05, 0.25, 0.4))
    fused = candidate("fused", 0.8, kind="tuned", difference=(0.2, 0.1, 0.3, 0.01))
    assert "the fused model" in decide([PROMPT, tuned, fused], "accuracy", None)["sentence"]


def test_of_equals_the_first() -> None:
    assert best([candidate("prompt", 0.5), candidate("few_shot", 0.5)], "accuracy", "untuned") == "prompt"
    assert best([candidate("base", 0.5, metric="loss")], "accuracy", "untuned") is None
    losses = [candidate("base", 0.5, metric="loss"), candidate("prompt", 0.4, metric="loss")]
    assert best(losses, "loss", "untuned") == "prompt"


@pytest.mark.parametrize(
    ("candidates", "metric", "lacking"),
    [
        ([BASE, PROMPT], "accuracy", "no tuned model"),
        ([candidate("tuned", 0.9, kind="tuned")], "accuracy", "no untuned model"),
        ([PROMPT, candidate("tuned", 0.9, kind="tuned")], "accuracy", "no common rows"),
        ([PROMPT], None, "no tuned model"),
        ([], "accuracy", "no tuned model"),
    ],
)
def test_nothing_to_compare(candidates: list[dict[str, Any]], metric: str | None, lacking: str) -> None:
    found = decide(candidates, metric, None)
    assert (found["decision"], found["rows_needed"]) == ("cannot_tell", None)
    assert found["sentence"] == f"Cannot tell: {lacking} was scored to compare."


@pytest.mark.parametrize(
    ("n", "difference", "decision", "needed"),
    [
        (5, (-0.01, -0.02, 0.0, 0.0625), "cannot_tell", 6),  # five rows can show nothing, so they settle nothing
        (6, (-0.01, -0.02, 0.0, 0.0625), "prompt", None),
        (1, (-0.03, -0.03, -0.03, 1.0), "cannot_tell", 6),  # one row: no width, and yet it says nothing
        (40, (-0.03, -0.03, -0.03, 1.0), "cannot_tell", 41),  # all rows of one group
        (40, (0.0, 0.0, 0.0, 1.0), "prompt", None),  # an adapter that changes nothing
        (1, (-0.5, -0.5, -0.5, 1.0), "cannot_tell", 6),
    ],
)
def test_what_says_nothing_settles_nothing(
    n: int, difference: tuple[float, float, float, float], decision: str, needed: int | None
) -> None:
    """Losses: less is better, so that the lower end is what tuning may gain."""
    tuned = candidate("tuned", 1.0, kind="tuned", metric="loss", n=n, difference=difference)
    found = decide([candidate("base", 1.03, metric="loss", n=n), tuned], "loss", None)
    assert (found["decision"], found["rows_needed"]) == (decision, needed)


def test_the_tuned_model_may_be_held_to_the_labels_too() -> None:
    base = held(candidate("base", 0.0), 0.65, 0.7)
    tuned = candidate("tuned", 0.6, kind="tuned", low=0.5, difference=(0.6, 0.5, 0.7, 1e-9))
    assert decide([base, held(tuned, 0.6, 0.65)], "accuracy", None)["decision"] == "prompt"
    assert decide([base, held(tuned, 0.95, 1.0)], "accuracy", None)["decision"] == "tune"
    near = decide([base, held(tuned, 0.7, 0.75)], "accuracy", None)
    assert near["decision"] == "cannot_tell"
    assert near["sentence"].endswith("against 70 % (65-75) by the tuned model, held to them too.")


def test_rows_that_a_candidate_could_not_read_count_as_wrong() -> None:
    """Two of two rows right are two of a hundred; of losses there is no such sum, so it comes last."""
    assert best([candidate("base", 0.1), candidate("small", 1.0, n=2)], "accuracy", "untuned") == "base"
    assert best([candidate("base", 0.1), candidate("prompt", 0.8, n=98)], "accuracy", "untuned") == "prompt"
    losses = [candidate("small", 0.5, metric="loss", n=2), candidate("base", 2.0, metric="loss")]
    assert best(losses, "loss", "untuned") == "base"


def near(count: int, **left: tuple[float, int]) -> dict[str, Any]:
    """Test rows near training rows; `left` has each candidate's accuracy on the others, and their number."""
    without = [{"name": name, "scores": candidate(name, value, n=n)["scores"]} for name, (value, n) in left.items()]
    return {"count": count, "near": [], "without": without}


def test_a_gain_must_be_left_without_the_rows_near_training_rows() -> None:
    tuned = candidate("tuned", 0.9, kind="tuned", difference=(0.3, 0.2, 0.4, 0.0004))
    left = decide([PROMPT, tuned], "accuracy", None, near(12, prompt=(0.6, 88), tuned=(0.88, 88)))
    assert left["decision"] == "tune"
    assert left["reasons"][1] == (
        "12 test rows are near training rows; without them accuracy is 88 % (80-96) and 60 % (52-68)"
    )
    gone = decide([PROMPT, tuned], "accuracy", None, near(40, prompt=(0.6, 60), tuned=(0.6, 60)))
    assert gone["decision"] == "cannot_tell"
    assert gone["sentence"] == (
        "Cannot tell yet: accuracy 90 % (82-98) by the tuned model, 60 % (52-68) by the base model with a prompt, "
        "but 40 test rows are near training rows; without them accuracy is 60 % (52-68) and 60 % (52-68); "
        "test on rows that are not in training."
    )
    everything = decide([PROMPT, tuned], "accuracy", None, near(100))
    assert everything["decision"] == "cannot_tell"
    assert "but 100 test rows are near training rows, and no others tell the two apart;" in everything["sentence"]


def test_a_gain_in_loss_must_be_left_too() -> None:
    tuned = candidate("tuned", 1.0, kind="tuned", metric="loss", difference=(-0.5, -0.6, -0.4, 0.0004))
    base = candidate("base", 1.5, metric="loss")

    def left(value: float) -> dict[str, Any]:
        scored = [candidate(name, of, metric="loss") for name, of in (("base", 1.5), ("tuned", value))]
        return {
            "count": 1,
            "near": [],
            "without": [{"name": each["name"], "scores": each["scores"]} for each in scored],
        }

    assert decide([base, tuned], "loss", None, left(1.4))["decision"] == "tune"
    gone = decide([base, tuned], "loss", None, left(1.6))
    assert gone["decision"] == "cannot_tell"
    assert "but 1 test row is near training rows; without them held-out loss is 1.600" in gone["sentence"]
