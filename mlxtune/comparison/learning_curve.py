"""What more rows would bring: adapters trained on nested parts of the training rows, and a curve through their errors.

The error of a share is 1 - share, of a loss the loss itself. Two forms are fitted by least squares: the power law
error = a · n^-b, and from four sizes on also one with a floor, a · n^-b + c, with a, c >= 0 and 0 <= b <= 3 (Hestness
et al. 2017, "Deep Learning Scaling is Predictable, Empirically", section 3). The floor is kept only where it leaves
less than half of the squared misfit. The interval is the bootstrap's over test rows, the same ones for every size, with
the curve fitted anew each time: what another order of training rows would change is not in it.
"""

import random
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mlxtune.comparison.contrast import RIGHT, Prediction, metric_of, rescored
from mlxtune.comparison.finished import Finished, Rows
from mlxtune.data.similar import neighbours
from mlxtune.data.split import compared
from mlxtune.errors import DataError, InputError
from mlxtune.evaluate import evaluate
from mlxtune.metrics.intervals import group_numbers
from mlxtune.report.score import Score
from mlxtune.report.words import metric_name
from mlxtune.steplog import StepLog
from mlxtune.train import train

Numbers = npt.NDArray[np.float64]
OnProgress = Callable[[str, int, int], None]
STEEPNESS = np.concatenate([[0.0], np.geomspace(0.01, 3.0, 400)])  # of the curves that are tried: b
RESAMPLES = 1000
BATCH = 100  # resamples at once
FLOOR_FROM = 4


@dataclass(frozen=True, slots=True)
class Fit:
    """error(n) = a · (n / scale)^-b + c of K curves, each (K,)."""

    kind: str
    scale: float
    a: Numbers
    b: Numbers
    c: Numbers

    def at(self, rows: float) -> Numbers:
        """The errors (K,) at a number of rows."""
        found: Numbers = self.a * (rows / self.scale) ** -self.b + self.c
        return found


def fit(rows: Sequence[int], errors: Numbers) -> Fit:
    """The curves through errors (K, S) at S sizes; the first chooses whether they have a floor. Needs two sizes."""
    power = _fitted(rows, errors, floor=False)
    if len(rows) < FLOOR_FROM:
        return power
    floored = _fitted(rows, errors, floor=True)
    misfit, with_floor = (_misfit(each, rows, errors)[0] for each in (power, floored))
    return floored if with_floor < misfit / 2 else power


def _fitted(rows: Sequence[int], errors: Numbers, *, floor: bool) -> Fit:
    """Least squares: for each steepness the best a and c in closed form, then the best steepness."""
    scale = float(max(rows))
    sizes = np.array(rows, dtype=np.float64) / scale
    best = np.full(len(errors), np.inf)
    a, b, c = (np.zeros(len(errors)) for _ in range(3))
    for steepness in STEEPNESS:
        x = sizes**-steepness
        slope = np.maximum(errors @ x / (x @ x), 0.0)
        rest = np.zeros(len(errors))
        if floor and steepness > 0:
            off = x - x.mean()
            with_rest = errors @ off / (off @ off)
            ground = errors.mean(axis=1) - with_rest * x.mean()
            inside = (with_rest >= 0) & (ground >= 0)
            slope, rest = np.where(inside, with_rest, slope), np.where(inside, ground, rest)
        misfit = ((errors - slope[:, None] * x - rest[:, None]) ** 2).sum(axis=1)
        better = misfit < best - 1e-15
        best = np.where(better, misfit, best)
        a, b, c = np.where(better, slope, a), np.where(better, steepness, b), np.where(better, rest, c)
    return Fit("power law with a floor" if floor else "power law", scale, a, b, c)


def _misfit(found: Fit, rows: Sequence[int], errors: Numbers) -> Numbers:
    curve = np.stack([found.at(each) for each in rows], axis=1)
    misfit: Numbers = ((curve - errors) ** 2).sum(axis=1)
    return misfit


def nested(
    rows: Rows, percents: Sequence[float], seed: int, named: Mapping[str, str] | None = None
) -> dict[float, list[int]]:
    """For each per cent the places of that share of the rows, each set within the next.

    Rows that are near to each other stay together, and those of a group that is `named` for their places. The order of
    groups is drawn from `seed`; a set ends with the group that reaches its share.
    """
    parents = list(range(len(rows)))

    def root(place: int) -> int:
        while parents[place] != place:
            parents[place] = place = parents[parents[place]]
        return place

    alike = neighbours(compared(list(rows)))
    first_of_name: dict[str, int] = {}
    for place, first in enumerate(alike.first):
        parents[root(place)] = root(first)
        name = (named or {}).get(rows[place][0].where)
        if name is not None:
            parents[root(place)] = root(first_of_name.setdefault(name, place))
    for pair in alike.pairs:
        parents[root(pair.second)] = root(pair.first)
    groups: dict[int, list[int]] = defaultdict(list)
    for place in range(len(rows)):
        groups[root(place)].append(place)
    drawn = list(groups.values())
    random.Random(seed).shuffle(drawn)
    order = [(place, number) for number, group in enumerate(drawn) for place in group]
    found = {}
    for percent in sorted(percents):
        least = max(1, round(len(rows) * percent / 100))
        last = order[min(least, len(order)) - 1][1]
        found[percent] = sorted(place for place, number in order if number <= last)
    return found


def check(percents: Sequence[float]) -> list[float]:
    """The per cents in order. Raises InputError for fewer than two, and for what is not above 0 and up to 100."""
    found = sorted(set(percents))
    if len(found) < 2 or not all(0 < each <= 100 for each in found):
        hint = "give at least two per cents, such as 25,50,100"
        raise InputError(
            f"{', '.join(f'{each:g}' for each in percents)} is no curve", where="--learning-curve", hint=hint
        )
    return found


@dataclass(frozen=True, slots=True)
class Curve:
    """What compare.json holds of a learning curve, and the predictions after training on each per cent of the rows."""

    value: dict[str, Any]
    predictions: dict[float, list[dict[str, Any]]]


def learning_curve(
    finished: Finished,
    percents: Sequence[float],
    *,
    on_progress: OnProgress = lambda what, done, total: None,
) -> Curve:
    """Trains on each share of the run's training rows as its recipe says, and scores all test rows. Takes its time.

    The folders of these trainings are gone afterwards. Raises what training raises.
    """
    recipe = finished.recipe
    subsets = nested(finished.rows["train"], check(percents), recipe.seed, finished.groups("train"))
    test, valid = finished.samples("test"), finished.samples("valid")
    learned = finished.asked.render(finished.rows["train"], recipe, finished.limit).samples
    labels, groups = finished.label_set(), finished.groups("test")
    predicted = {}
    for number, (percent, places) in enumerate(subsets.items(), start=1):
        wanted = {finished.rows["train"][place][0].where for place in places}
        samples = [each for each in learned if each.where in wanted]
        lm = finished.load_base()
        data = replace(recipe.data, chat_template=finished.asked.template)
        with tempfile.TemporaryDirectory(prefix="mlxtune-curve-") as scratch:
            train(
                lm,
                samples,
                valid,
                replace(recipe, data=data, train=replace(recipe.train, report_to=[], anchor=None)),
                Path(scratch),
                on_step=_told(on_progress, f"curve {number}/{len(subsets)}"),
            )
        done = evaluate(lm, test, recipe.evaluate, label_set=labels, groups=groups)
        predicted[percent] = [asdict(each) for each in done.predictions]
    sizes = [len(places) for places in subsets.values()]
    return Curve(summed_up(sizes, list(predicted.values()), recipe.seed), predicted)


def _told(on_progress: OnProgress, label: str) -> Callable[[StepLog, int], None]:
    return lambda log, steps: on_progress(label, log.step, steps)


def summed_up(sizes: Sequence[int], predicted: Sequence[Sequence[Prediction]], seed: int) -> dict[str, Any]:
    """The curve of scores at `sizes` training rows, from all predictions of each, and what twice the rows would do.

    Raises DataError where not all sizes are of the same rows, scored in the same way.
    """
    scores = [{score.metric: score for score in rescored(each)} for each in predicted]
    metric = metric_of([("untuned", list(scores[0].values())), ("tuned", list(scores[-1].values()))])
    rows = [[(each["where"], each[RIGHT.get(metric or "", "loss")] is None) for each in one] for one in predicted]
    if metric is None or any(each != rows[0] for each in rows):
        raise DataError("the sizes of a learning curve are not scored on the same rows")
    points = [_point(rows, each[metric]) for rows, each in zip(sizes, scores, strict=True)]
    found, sentence = _extrapolated(sizes, predicted, scores[-1][metric], seed)
    return {"metric": metric, "points": points, "fit": found, "sentence": sentence}


def _point(rows: int, score: Score) -> dict[str, Any]:
    return {"rows": rows, "value": score.value, "ci_low": score.ci_low, "ci_high": score.ci_high}


def _extrapolated(
    sizes: Sequence[int], predicted: Sequence[Sequence[Prediction]], last: Score, seed: int
) -> tuple[dict[str, Any] | None, str]:
    """The fit at twice the largest size, and a sentence that says what it would bring there."""
    if len(set(sizes)) < 2:
        return None, "The parts of the training rows are all the same size: near rows stay together."
    share = last.metric in RIGHT
    wrong, weights, group = _errors(predicted, last.metric)
    point = fit(sizes, (wrong @ weights / weights.sum())[None])
    now, twice = float(point.at(max(sizes))[0]), float(point.at(2 * max(sizes))[0])
    gains, ends = _resampled(sizes, wrong, weights, group, point.kind, seed)
    low, high = np.percentile(ends, [2.5, 97.5])
    worst, best = np.percentile(gains, [2.5, 97.5])
    value, (low, high) = (1 - twice, (1 - high, 1 - low)) if share else (twice, (low, high))
    found = {
        "kind": point.kind,
        "rows": 2 * max(sizes),
        "value": value,
        "ci_low": float(low),
        "ci_high": float(high),
    }
    factor, digits, unit = (100, 1, "points") if share else (-1, 3, "nats per token")
    gain, *ends_shown = (
        f"{factor * each:+.{digits}f}" for each in (now - twice, *sorted([worst, best], reverse=factor < 0))
    )
    sentence = (
        f"Twice the data ({2 * max(sizes):,} rows) would bring about {gain} {unit} of {metric_name(last.metric)} "
        f"(95 % interval {' to '.join(ends_shown)}, over test rows)."
    )
    return found, sentence


def _errors(predicted: Sequence[Sequence[Prediction]], metric: str) -> tuple[Numbers, Numbers, npt.NDArray[np.int64]]:
    """What each test row adds to the error at each size, (S, N), and each row's weight and group (N,)."""

    def error(prediction: Mapping[str, Any]) -> float:
        return 1.0 - float(prediction[RIGHT[metric]]) if metric in RIGHT else float(prediction["loss"])

    field = RIGHT.get(metric, "loss")
    kept = [place for place, each in enumerate(predicted[0]) if each[field] is not None]
    wrong = np.array([[error(each[place]) for place in kept] for each in predicted])
    weights = [1.0 if metric in RIGHT else float(predicted[0][place]["tokens"]) for place in kept]
    group = [predicted[0][place].get("group") or predicted[0][place]["where"] for place in kept]
    return wrong, np.array(weights), group_numbers(group)


def _resampled(
    sizes: Sequence[int], wrong: Numbers, weights: Numbers, group: npt.NDArray[np.int64], kind: str, seed: int
) -> tuple[Numbers, Numbers]:
    """What twice the rows bring, and the error there, of curves through resampled test rows; the form stays."""
    draw = np.random.default_rng(seed)
    groups = int(group.max()) + 1
    gains, ends = [], []
    for _ in range(RESAMPLES // BATCH):
        drawn = draw.integers(0, groups, (BATCH, groups))
        counts = np.stack([np.bincount(each, minlength=groups) for each in drawn])[:, group] * weights  # (BATCH, N)
        errors = counts @ wrong.T / counts.sum(axis=1, keepdims=True)
        found = _fitted(sizes, errors, floor=kind != "power law")
        ends.append(found.at(2 * max(sizes)))
        gains.append(found.at(max(sizes)) - ends[-1])
    return np.concatenate(gains), np.concatenate(ends)
