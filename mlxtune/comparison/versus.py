"""Two runs side by side: their scores, their recipes, and the rows that changed. Knows run folders; writes nothing."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mlxtune import recipe as recipes
from mlxtune.comparison import contrast
from mlxtune.report import build, reading
from mlxtune.report.score import Score
from mlxtune.report.verdict import headline
from mlxtune.report.words import COLUMNS
from mlxtune.rundir import RunDir

NAMES = ("first", "second")


@dataclass(frozen=True, slots=True, kw_only=True)
class Versus:
    """`scores` by column and metric, one for each run or None; `recipe` what differs in it, `first there, second here`.

    `difference` is second - first of the models in `column` by `metric`, over the `common` rows that ask and expect
    the same in both, with interval and p; `flips` the rows that became right or wrong. None where nothing is common.
    """

    runs: tuple[str, str]
    scores: dict[str, dict[str, tuple[Score | None, Score | None]]]
    recipe: list[str]
    column: str | None
    metric: str | None
    common: int
    difference: dict[str, Any] | None
    flips: dict[str, Any] | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def versus(first: RunDir, second: RunDir) -> Versus:
    """Compares two run folders. Raises InputError for one that holds no run, or has damaged files."""
    runs = (first, second)
    scores = {column: [_scores(run, column) for run in runs] for column in COLUMNS}
    column = next((name for name in ("fused", "tuned") if all(scores[name])), None)
    metric = headline(*scores[column]) if column else None
    pairs: Sequence[tuple[Any, Any]] = []
    if column is not None:
        before, after = (reading.predictions_of(run.predictions(column)) for run in runs)
        pairs = contrast.same_rows(before, after)
    old, new = [{**one, "where": other["where"]} for one, other in pairs], [other for _, other in pairs]
    return Versus(
        runs=(str(first.root), str(second.root)),
        scores={
            name: {metric: (one.get(metric), other.get(metric)) for metric in dict.fromkeys([*one, *other])}
            for name, (one, other) in scores.items()
        },
        recipe=_recipes(first, second),
        column=column,
        metric=metric,
        common=len(pairs),
        difference=contrast.difference(old, new, metric) if metric else None,
        flips=contrast.flips(old, new, NAMES, metric) if metric else None,
    )


def _scores(run: RunDir, column: str) -> dict[str, Score]:
    build.check(run)
    found = reading.evaluation_of(run, column)
    return {each["metric"]: Score(**each) for each in found["scores"]} if found else {}


def _recipes(first: RunDir, second: RunDir) -> list[str]:
    if not (first.recipe.is_file() and second.recipe.is_file()):
        return []
    return recipes.differences(recipes.load(first.recipe), recipes.load(second.recipe))
