"""Was tuning worth it? One paragraph from the scores of base, tuned and fused. Knows scores, not files.

A difference counts as clear only where the two 95 % intervals do not overlap. That is stricter than a test at 5 %:
it rather says "no clear difference" too often than promises a gain that more rows would take back.
"""

from typing import Any

from mlxtune.report.score import Score
from mlxtune.report.words import interval, metric_name, percent, value

BETTER, WORSE, UNCLEAR, UNKNOWN = "better", "worse", "unclear", "unknown"


def compare(before: Score, after: Score) -> str:
    """`better`, `worse`, or `unclear` where the intervals overlap, or where one row is all there is."""
    if _says_nothing(before, after) or (before.ci_low <= after.ci_high and after.ci_low <= before.ci_high):
        return UNCLEAR
    rose = after.value > before.value
    return BETTER if rose == (after.better == "higher") else WORSE


def _says_nothing(*scores: Score) -> bool:
    """Whether an interval has no width, as that of a single row or group: it says nothing of others."""
    return any(score.ci_low == score.ci_high for score in scores)


def headline(before: dict[str, Score], after: dict[str, Score]) -> str | None:
    """The metric that the verdict is about: accuracy where labels are scored, else exact match, else the loss.

    Answers in free words seldom match exactly; exact match that says nothing leaves the word to the loss.
    """
    both = before.keys() & after.keys()
    if "accuracy" in both:
        return "accuracy"
    if "exact_match" in both and (
        "loss" not in both or compare(before["exact_match"], after["exact_match"]) != UNCLEAR
    ):
        return "exact_match"
    return "loss" if "loss" in both else None


def verdict(
    base: dict[str, Score],
    tuned: dict[str, Score],
    fused: dict[str, Score],
    fuse: dict[str, Any] | None,
    training: dict[str, Any] | None,
) -> tuple[str, str]:
    """The outcome (`better`, `worse`, `unclear`, `unknown`) and the sentences that say it."""
    after = tuned or fused
    metric = headline(base, after)
    if metric is None:
        return UNKNOWN, "There is nothing to compare yet: the base and the tuned model have not both been evaluated."
    first, last = base[metric], after[metric]
    if first.n != last.n:
        return UNKNOWN, (
            f"The base model was scored on {first.n:,} rows and the tuned one on {last.n:,}, "
            "so the two cannot be compared; evaluate both on the same rows."
        )
    outcome = compare(first, last)
    sentences = [_change(metric, first, last, outcome), *_beside(metric, base, after, outcome)]
    if training is not None and training["best_step"] == 0 and training["best_valid_loss"] is not None:
        sentences.append("No update of the training improved the validation loss, so the adapter changes nothing.")
    by_loss = compare(base["loss"], after["loss"]) if "loss" in base and "loss" in after else UNKNOWN
    gained = outcome == BETTER or (outcome == UNCLEAR and by_loss == BETTER)
    sentences += _fusing(metric, tuned, fused, fuse, gained)
    return outcome, " ".join(sentences)


def _change(metric: str, first: Score, last: Score, outcome: str) -> str:
    name = metric_name(metric)
    rows = f"{last.n:,} held-out {'row' if last.n == 1 else 'rows'}"
    unit = f" {last.unit}" if last.unit not in ("", "share") else ""
    sign = " %" if last.unit == "share" else ""
    if outcome == BETTER:
        return (
            f"Tuning took {name} from {value(first)} to {value(last)}{unit} "
            f"(95 % interval {interval(last)}{sign}) on {rows}."
        )
    if outcome == WORSE:
        return (
            f"Tuning made the model worse: {name} went from {value(first)} to {value(last)}{unit} "
            f"(95 % interval {interval(last)}{sign}) on {rows}."
        )
    told = f"No clear difference: {name} was {value(first)} before and {value(last)}{unit} after tuning on {rows}, "
    if _says_nothing(first, last):
        return f"{told}too few to tell."
    return f"{told}and the 95 % intervals overlap ({interval(first)}{sign} and {interval(last)}{sign})."


def _beside(metric: str, base: dict[str, Score], after: dict[str, Score], outcome: str) -> list[str]:
    """What the other metrics say where they do not say the same."""
    sentences = []
    if metric == "loss" and "exact_match" in base and "exact_match" in after:
        before, now = base["exact_match"], after["exact_match"]
        sentences.append(f"Exact match shows no clear difference ({value(before)} before, {value(now)} after).")
    if metric != "loss" and "loss" in base and "loss" in after:
        before, now = base["loss"], after["loss"]
        by_loss = compare(before, now)
        moved = f"from {value(before)} to {value(now)} nats per token"
        if outcome == UNCLEAR and by_loss == BETTER:
            sentences.append(f"The held-out loss did fall clearly, {moved}.")
        elif outcome != WORSE and by_loss == WORSE:
            sentences.append(f"The held-out loss rose, though, {moved}.")
    return sentences


def _fusing(
    metric: str, tuned: dict[str, Score], fused: dict[str, Score], fuse: dict[str, Any] | None, gained: bool
) -> list[str]:
    """What fusing did; where nothing was clearly gained, not how much of it was kept."""
    if fuse is None:
        return []
    kept = fuse["kept"]
    if kept is None:
        sentence = "Fusing was not measured against a gain, since the adapter brought none in loss"
    elif not gained:
        sentence = ""
    elif kept <= 0:
        sentence = "The fused model kept nothing of the gain in loss"
    elif kept >= 0.9995:
        sentence = "The fused model kept all of the gain in loss"
    else:
        only = "only " if kept < 0.9 else ""
        sentence = f"The fused model kept {only}{percent(round(kept, 3))} of the gain in loss"
    if metric in tuned and metric in fused and value(fused[metric]) != value(tuned[metric]):
        lost = ", clearly worse than with the adapter" if compare(tuned[metric], fused[metric]) == WORSE else ""
        its = f"; its {metric_name(metric)}" if sentence else f"The fused model's {metric_name(metric)}"
        sentence += f"{its} is {value(fused[metric])}{lost}"
    return [f"{sentence}."] if sentence else []
