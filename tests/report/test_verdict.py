from typing import Any

import pytest

from mlxtune.metrics.intervals import wilson
from mlxtune.report.score import Score
from mlxtune.report.verdict import compare, headline, verdict

Scores = dict[str, Score]


def share(metric: str, right: int, n: int = 96) -> Scores:
    low, high = wilson(right, n)
    made = Score(metric=metric, value=right / n, unit="share", ci_low=low, ci_high=high, n=n, better="higher")
    return {metric: made}


def loss(value: float, spread: float = 0.1, n: int = 96) -> Scores:
    ends = {"ci_low": value - spread, "ci_high": value + spread}
    return {"loss": Score(metric="loss", value=value, unit="nats per token", n=n, better="lower", **ends)}


def say(base: Scores, tuned: Scores, fused: Scores | None = None, kept: Any = "no fuse", **training: Any) -> str:
    fuse = None if kept == "no fuse" else {"kept": kept}
    outcome, sentences = verdict(base, tuned, fused or {}, fuse, training or None)
    return f"{outcome}: {sentences}"


def test_compare_needs_intervals_apart_and_knows_the_good_way() -> None:
    assert compare(loss(2.0)["loss"], loss(1.0)["loss"]) == "better"
    assert compare(loss(1.0)["loss"], loss(2.0)["loss"]) == "worse"
    assert compare(loss(1.0)["loss"], loss(1.15)["loss"]) == "unclear"
    assert compare(loss(1.0)["loss"], loss(1.2)["loss"]) == "unclear"  # ends that touch overlap
    assert compare(share("accuracy", 10)["accuracy"], share("accuracy", 90)["accuracy"]) == "better"
    assert compare(share("accuracy", 90)["accuracy"], share("accuracy", 10)["accuracy"]) == "worse"


def test_one_row_tells_nothing() -> None:
    assert compare(loss(2.0, spread=0, n=1)["loss"], loss(1.0, spread=0, n=1)["loss"]) == "unclear"
    assert say(loss(2.0, spread=0, n=1), loss(1.0, spread=0, n=1)) == (
        "unclear: No clear difference: held-out loss was 2.000 before and 1.000 nats per token after tuning on "
        "1 held-out row, too few to tell."
    )


def test_a_clear_gain_that_fusing_kept() -> None:
    base, tuned = share("accuracy", 0) | loss(2.7), share("accuracy", 88) | loss(0.3)
    assert say(base, tuned, tuned, kept=0.983) == (
        "better: Tuning took accuracy from 0 % to 91.7 % (95 % interval 84-96 %) on 96 held-out rows. "
        "The fused model kept 98.3 % of the gain in loss."
    )


def test_a_fused_model_that_answers_otherwise_says_so() -> None:
    base, tuned = share("accuracy", 0), share("accuracy", 88)
    assert say(base, tuned, share("accuracy", 87), kept=1.02).endswith(
        "The fused model kept all of the gain in loss; its accuracy is 90.6 %."
    )
    assert say(base, tuned, share("accuracy", 30), kept=0.55).endswith(
        "The fused model kept only 55 % of the gain in loss; "
        "its accuracy is 31.2 %, clearly worse than with the adapter."
    )
    assert say(base, tuned, tuned, kept=-0.2).endswith("The fused model kept nothing of the gain in loss.")


def test_overlapping_intervals_are_no_clear_difference() -> None:
    assert say(share("accuracy", 10, 20), share("accuracy", 12, 20)) == (
        "unclear: No clear difference: accuracy was 50 % before and 60 % after tuning on 20 held-out rows, "
        "and the 95 % intervals overlap (30-70 % and 39-78 %)."
    )


def test_no_difference_in_accuracy_but_a_clear_one_in_loss_says_both() -> None:
    told = say(share("accuracy", 10, 20) | loss(2.0), share("accuracy", 12, 20) | loss(1.0))
    assert told.startswith("unclear: No clear difference: accuracy")
    assert told.endswith("The held-out loss did fall clearly, from 2.000 to 1.000 nats per token.")


def test_a_gain_in_accuracy_with_a_worse_loss_says_both() -> None:
    told = say(share("accuracy", 10) | loss(1.0), share("accuracy", 80) | loss(2.0))
    assert told.startswith("better: Tuning took accuracy from 10.4 %")
    assert told.endswith("The held-out loss rose, though, from 1.000 to 2.000 nats per token.")


def test_a_loss_is_called_worse() -> None:
    assert say(share("accuracy", 90), share("accuracy", 40)) == (
        "worse: Tuning made the model worse: accuracy went from 93.8 % to 41.7 % "
        "(95 % interval 32-52 %) on 96 held-out rows."
    )


def test_free_answers_are_judged_by_loss_and_still_tell_exact_match() -> None:
    assert say(share("exact_match", 0) | loss(2.0), share("exact_match", 2) | loss(1.0)) == (
        "better: Tuning took held-out loss from 2.000 to 1.000 nats per token (95 % interval 0.900-1.100) "
        "on 96 held-out rows. Exact match shows no clear difference (0 % before, 2.1 % after)."
    )


def test_exact_match_leads_where_it_is_clear() -> None:
    assert headline(share("exact_match", 0) | loss(2.0), share("exact_match", 50) | loss(1.0)) == "exact_match"


def test_accuracy_leads_even_where_it_says_nothing() -> None:
    before, after = share("accuracy", 5) | loss(2.0), share("accuracy", 6) | loss(1.0)
    assert headline(before, after) == "accuracy"


def test_plain_text_has_only_a_loss() -> None:
    assert say(loss(2.0, n=1), loss(1.0, n=1)) == (
        "better: Tuning took held-out loss from 2.000 to 1.000 nats per token (95 % interval 0.900-1.100) "
        "on 1 held-out row."
    )


@pytest.mark.parametrize(("base", "tuned"), [({}, {}), (loss(2.0), {}), ({}, loss(2.0))])
def test_half_a_run_has_nothing_to_compare(base: Scores, tuned: Scores) -> None:
    assert say(base, tuned) == (
        "unknown: There is nothing to compare yet: the base and the tuned model have not both been evaluated."
    )


def test_other_rows_are_not_compared() -> None:
    assert say(loss(2.0, n=90), loss(1.0, n=96)) == (
        "unknown: The base model was scored on 90 rows and the tuned one on 96, "
        "so the two cannot be compared; evaluate both on the same rows."
    )


def test_training_that_never_helped_is_told() -> None:
    told = say(loss(2.0), loss(2.0), kept=None, best_step=0, best_valid_loss=2.0)
    assert told.startswith("unclear: No clear difference")
    assert "No update of the training improved the validation loss, so the adapter changes nothing." in told
    # without validation the last step is taken, and step 0 means nothing
    assert "No update" not in say(loss(2.0), loss(2.0), best_step=0, best_valid_loss=None)


def test_a_fused_model_alone_stands_in_for_the_tuned_one() -> None:
    assert say(loss(2.0), {}, loss(1.0)).startswith("better: Tuning took held-out loss from 2.000 to 1.000")


def test_what_fusing_kept_is_told_only_where_something_was_gained() -> None:
    base, worse = share("accuracy", 88) | loss(2.7), share("accuracy", 10) | loss(0.3)
    told = say(base, worse, worse, kept=1.0)
    assert told.startswith("worse: Tuning made the model worse") and "kept" not in told
    assert say(base, worse, share("accuracy", 9), kept=1.0).endswith(" The fused model's accuracy is 9.4 %.")
    # an unclear accuracy beside a loss that fell clearly is a gain; an unclear loss is none
    assert say(base, share("accuracy", 88) | loss(0.3), kept=1.0).endswith("kept all of the gain in loss.")
    assert "kept" not in say(loss(2.0), loss(1.95), kept=1.0)
