"""Predictions of two candidates on the same rows: how far they differ, and which rows changed. Knows no models.

A prediction is a line of an evaluation's JSONL as a mapping. Rows are the same where file name and line are: the folder
before them depends on where a command was called. Rows that only one of the two has are left out of a difference.
"""

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import PurePath
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from mlxtune.metrics.intervals import group_numbers, mean_share
from mlxtune.metrics.loss import loss
from mlxtune.metrics.perplexity import perplexity
from mlxtune.metrics.significance import holm, paired, rows_needed, rows_needed_for
from mlxtune.report.decision import LEVEL
from mlxtune.report.score import Score
from mlxtune.report.verdict import UNCLEAR, compare

Numbers = npt.NDArray[np.float64]
Prediction = Mapping[str, Any]
Key = tuple[str, int]  # a row's file name and line, and which of its samples
RIGHT = {"accuracy": "right", "exact_match": "exact"}  # metric: what says of a prediction whether it is right
SHOWN_FLIPS = 5  # of each kind
LONGEST_TEXT = 2000  # characters of a text in an example


def keyed(predictions: Sequence[Prediction]) -> dict[Key, Prediction]:
    """The predictions by their rows; the samples of one row are numbered in their order."""
    seen = Counter[str]()
    found = {}
    for each in predictions:
        name = place(each["where"])
        found[name, seen[name]] = each
        seen[name] += 1
    return found


def place(where: str) -> str:
    """File name and line of a row, without the folder."""
    return PurePath(where).name


def without(predictions: Sequence[Prediction], wheres: Collection[str]) -> list[Prediction]:
    """The predictions of other rows than these."""
    places = {place(each) for each in wheres}
    return [each for each in predictions if place(each["where"]) not in places]


def metric_of(candidates: Sequence[tuple[str, Sequence[Score]]]) -> str | None:
    """The metric that candidates, each a kind and its scores, are compared by; None without an untuned and a tuned one.

    Accuracy where labels are compared; else exact match, if it clearly tells any two apart; else the loss. It is one
    that an untuned and a tuned candidate have.
    """
    scores = {
        kind: [{score.metric: score for score in each} for name, each in candidates if name == kind]
        for kind in ("untuned", "tuned")
    }

    def both(metric: str) -> bool:
        return all(any(metric in each for each in scores[kind]) for kind in scores)

    if both("accuracy"):
        return "accuracy"
    exact = [each["exact_match"] for kind in scores for each in scores[kind] if "exact_match" in each]
    tells = any(compare(one, other) != UNCLEAR for one in exact for other in exact)
    if both("exact_match") and (tells or not both("loss")):
        return "exact_match"
    return "loss" if both("loss") else None


def difference(
    before: Sequence[Prediction], after: Sequence[Prediction], metric: str, level: float = LEVEL
) -> dict[str, Any] | None:
    """The mean of after - before by a metric, with interval, p, the common rows, and the rows that would show it.

    Losses are weighted by tokens; rows of one group are not taken as independent. `level` is that of "would show it".
    None where no row has both.
    """
    pairs = _pairs(before, after, metric)
    if not pairs:
        return None
    old, new = [_value(one, metric) for one, _ in pairs], [_value(other, metric) for _, other in pairs]
    groups = _groups([one for one, _ in pairs])
    weights = None if metric in RIGHT else [float(one["tokens"]) for one, _ in pairs]
    found = paired(old, new, groups, weights=weights)
    if weights is None and groups is None:
        fixed, broken = (sum(b - a == change for a, b in zip(old, new, strict=True)) for change in (1, -1))
        needed = rows_needed(fixed, broken, len(pairs), level)
    else:
        needed = _needed(
            np.subtract(new, old), np.ones(len(pairs)) if weights is None else np.array(weights), groups, level
        )
    return {
        "metric": metric,
        "value": found.value,
        "ci_low": found.ci_low,
        "ci_high": found.ci_high,
        "p": found.p,
        "n": len(pairs),
        "rows_needed": needed,
    }


def _needed(apart: Numbers, weights: Numbers, groups: Sequence[str] | None, level: float) -> int | None:
    """The rows that would show the weighted mean m of differences d (N,), in groups as large as these.

    What N groups of weight w and mean d say is what N rows m + w (d - m) / mean w would: their deviation is that of a
    ratio of two sums. Source: W. G. Cochran, "Sampling Techniques" (1977), section 2.11.
    """
    place = np.arange(len(apart)) if groups is None else group_numbers(groups)
    sums, weight = np.bincount(place, apart * weights), np.bincount(place, weights)
    mean = sums.sum() / weight.sum()
    needed = rows_needed_for([0.0] * len(sums), (mean + (sums - weight * mean) / weight.mean()).tolist(), level)
    return None if needed is None else math.ceil(needed * len(apart) / len(sums))


def differences(
    candidates: Mapping[str, Sequence[Prediction]], against: str, metric: str
) -> dict[str, dict[str, Any] | None]:
    """The difference of each candidate from the one named `against`, with p-values adjusted for all of them (Holm).

    The rows that would show one are those for the smallest of the p-values, the strictest of all.
    """
    others = [each for name, each in candidates.items() if name != against]
    level = LEVEL / max(1, sum(bool(_pairs(candidates[against], each, metric)) for each in others))
    found = {
        name: difference(candidates[against], each, metric, level) if name != against else None
        for name, each in candidates.items()
    }
    measured = [each for each in found.values() if each is not None]
    adjusted = dict(zip(map(id, measured), holm([each["p"] for each in measured]), strict=True))
    return {
        name: None if each is None else {"against": against, **each, "p_adjusted": adjusted[id(each)]}
        for name, each in found.items()
    }


def flips(
    before: Sequence[Prediction], after: Sequence[Prediction], names: tuple[str, str], metric: str
) -> dict[str, Any] | None:
    """The rows that became right (fixed) and wrong (broken) from one candidate to another, with examples of each.

    Where the metric is a loss, right means the exact text. None where no answers are compared. Examples are taken
    evenly through the file.
    """
    measure = metric if metric in RIGHT else "exact_match"
    pairs = _pairs(before, after, measure)
    if not pairs:
        return None
    fixed = [pair for pair in pairs if _value(pair[0], measure) < _value(pair[1], measure)]
    broken = [pair for pair in pairs if _value(pair[0], measure) > _value(pair[1], measure)]
    shown = [("fixed", pair) for pair in evenly(fixed)] + [("broken", pair) for pair in evenly(broken)]
    return {
        "from": names[0],
        "to": names[1],
        "fixed": len(fixed),
        "broken": len(broken),
        "examples": [_example(kind, *pair) for kind, pair in shown],
    }


def evenly(items: Sequence[Any], count: int = SHOWN_FLIPS) -> list[Any]:
    """Up to `count` of them, from the first on at equal distances."""
    count = min(count, len(items))
    return [items[number * len(items) // count] for number in range(count)]


def same_rows(before: Sequence[Prediction], after: Sequence[Prediction]) -> list[tuple[Prediction, Prediction]]:
    """The predictions of two runs whose rows ask and expect the same, wherever they stand; each is used once."""
    asked: dict[tuple[str, str | None], list[Prediction]] = {}
    for each in before:
        asked.setdefault((each["prompt"], each["expected"]), []).append(each)
    found = []
    for each in after:
        same = asked.get((each["prompt"], each["expected"]))
        if same:
            found.append((same.pop(0), each))
    return found


def flips_since(
    before: Sequence[Prediction], now: Sequence[Prediction], name: str, metric: str
) -> dict[str, Any] | None:
    """The flips from an earlier run's predictions, which are named as the rows of this one, to the tuned model."""
    pairs = same_rows(before, now)
    return flips([one for one, _ in pairs], [other for _, other in pairs], (name, "tuned"), metric)


def rescored(predictions: Sequence[Prediction]) -> list[Score]:
    """The scores that follow from predictions alone: loss, perplexity, exact match, accuracy; none without rows."""
    found = []
    told = [each for each in predictions if each["loss"] is not None]
    if told:
        nats, tokens = [each["loss"] * each["tokens"] for each in told], [each["tokens"] for each in told]
        found += [loss(nats, tokens, groups=_groups(told)), perplexity(nats, tokens, groups=_groups(told))]
    for metric in ("exact_match", "accuracy"):
        given = [each for each in predictions if each[RIGHT[metric]] is not None]
        if given:
            found.append(mean_share(metric, [bool(each[RIGHT[metric]]) for each in given], groups=_groups(given)))
    return found


def _groups(predictions: Sequence[Prediction]) -> list[str] | None:
    """The group of each row: the one that it names, else its place; None where every row is alone."""
    groups = [each["where"] if each.get("group") is None else each["group"] for each in predictions]
    return groups if len(set(groups)) < len(groups) else None


def _pairs(
    before: Sequence[Prediction], after: Sequence[Prediction], metric: str
) -> list[tuple[Prediction, Prediction]]:
    field = RIGHT.get(metric, "loss")
    old, new = keyed(before), keyed(after)
    common = [(old[key], new[key]) for key in old if key in new]
    return [(one, other) for one, other in common if one[field] is not None and other[field] is not None]


def _value(prediction: Prediction, metric: str) -> float:
    return float(prediction[RIGHT.get(metric, "loss")])


def _example(kind: Literal["fixed", "broken"] | str, before: Prediction, after: Prediction) -> dict[str, Any]:
    return {
        "where": after["where"],
        "prompt": _cut(after["prompt"]),
        "expected": _cut(after["expected"]),
        "before": _cut(before["answer"]),
        "after": _cut(after["answer"]),
        "kind": kind,
    }


def _cut(text: str | None) -> str | None:
    """A text that is not too long for a report; its end, with the question, stays."""
    if text is None or len(text) <= LONGEST_TEXT:
        return text
    return f"{text[: LONGEST_TEXT // 2]} […] {text[-LONGEST_TEXT // 2 :]}"
