"""Whether the models of a run give its scores again, and those of its comparison. Knows models; writes nothing.

What a row takes in seconds and in memory cannot be had again, so it is not held against anything. Servers are not
asked, and no learning curve is trained: they are named as not checked.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from mlxtune import compare, hub, model, origin, workers
from mlxtune.comparison import contrast, evidence
from mlxtune.comparison.finished import open_run
from mlxtune.comparison.scoring import Scored, Scoring
from mlxtune.evaluate import evaluate
from mlxtune.evaluation import predictions
from mlxtune.model import LanguageModel
from mlxtune.recipe import CompareRecipe, Recipe
from mlxtune.report import reading
from mlxtune.report.score import Score
from mlxtune.report.words import COLUMNS
from mlxtune.rundir import RunDir
from mlxtune.stages import Stages
from mlxtune.verification.comparison import FILE, SERVER, placed, settings_of
from mlxtune.verification.figures import SAME_MODEL, Verified

OnProgress = Callable[[str, int, int], None]
Scores = dict[str, list[Score]]  # of a model, by its column
AGAIN = "by the models"


def check(run: RunDir, recipe: Recipe, result: Verified, on_progress: OnProgress) -> None:
    """The models give the same scores again, on the machine and with the versions that the run was made with.

    What a comparison took from the run's evaluations is evaluated once, for both.
    """
    source = hub.fetch(recipe.model, recipe.revision or origin.revision(run))
    origin.refuse_changed_model(run, source)
    scored: Scores = {}
    with result.reading(run, run.compare / "compare.json"):
        scored = _compared(run, recipe, source, result, on_progress)
    for name in COLUMNS:
        stated = reading.evaluation_of(run, name)
        if stated is not None and name in scored:
            _hold(f"eval/{name}.json", stated, scored[name], result)
    rest = [name for name in COLUMNS if name not in scored]
    if rest:
        _evaluated(run, recipe, source, rest, result, on_progress)


def _hold(file: str, stated: Mapping[str, Any], found: list[Score], result: Verified) -> None:
    again = {score.metric: score.to_dict() for score in found}
    for each in stated["scores"]:
        result.compare(file, each, again.get(each["metric"]), f"{AGAIN}: scores.{each['metric']}", SAME_MODEL)


def _evaluated(
    run: RunDir, recipe: Recipe, source: Path, names: list[str], result: Verified, on_progress: OnProgress
) -> None:
    """Evaluates as the run's own stages do."""
    work = Stages(recipe, run, source, {}, lambda event: None, lambda: None, workers.join())
    models: dict[str, Callable[[], LanguageModel]] = {
        "base": work.load_base,
        "tuned": work.load_tuned,
        "fused": functools.partial(model.load, run.fused),
    }
    for name in names:
        stated = reading.evaluation_of(run, name)
        if stated is None:
            continue
        done = evaluate(
            models[name](),
            work.samples("test"),
            recipe.evaluate,
            label_set=work.label_set,
            groups=work.groups,
            on_row=functools.partial(_tell, on_progress, name),
        )
        _hold(f"eval/{name}.json", stated, done.scores, result)


def _tell(on_progress: OnProgress, name: str, phase: str, done: int, total: int) -> None:
    on_progress(f"{name}, {phase}", done, total)


def _compared(run: RunDir, recipe: Recipe, source: Path, result: Verified, on_progress: OnProgress) -> Scores:
    """Scores the comparison's candidates; returns those that the run's evaluations were to give as well."""
    stated = reading.comparison_of(run)
    if stated is None:
        return {}
    whole = settings_of(run, recipe, stated)
    settings = replace(whole.compare or CompareRecipe(), endpoint=None, endpoint_model=None, judge=None)
    compare.check(settings)
    work = Scoring(open_run(run, whole, source), settings, on_progress, reuse=False)
    work.score_all()
    served = next((each for each in stated["candidates"] if each["name"] == SERVER), None)
    if served is not None:  # that the others are compared with
        work.scored.append(_as_stated(run, served))
    found = compare.summed_up(work)
    since = evidence.file(run.compare, evidence.SINCE)
    if since.exists() and stated.get("flips_since") is not None and found["metric"] is not None:
        before = [asdict(each) for each in predictions.read(since)]
        now = next((each.predictions for each in work.scored if each.name == "tuned"), [])
        found["flips_since"] = contrast.flips_since(before, now, stated["flips_since"]["from"], found["metric"])
    _hold_comparison(stated, found, result)
    asked = [name for name in ("judged", "learning_curve", "flips_since") if stated.get(name) is not None]
    names = [*([SERVER] if served is not None else []), *(name for name in asked if found[name] is None)]
    result.unchecked += [f"{FILE} {name} {AGAIN}" for name in names]
    return {each.name: each.scores for each in work.scored if each.name in COLUMNS} if work.same else {}


def _as_stated(run: RunDir, candidate: Mapping[str, Any]) -> Scored:
    lines = predictions.read(run.compare / f"{candidate['name']}.jsonl")
    return Scored(
        name=candidate["name"],
        kind=candidate["kind"],
        description=candidate.get("description") or "",
        scores=[Score(**each) for each in candidate["scores"]],
        predictions=[asdict(each) for each in lines],
        cost=candidate.get("cost") or {},
    )


def _hold_comparison(stated: Mapping[str, Any], found: Mapping[str, Any], result: Verified) -> None:
    """The verdict's sentences and the flips' examples follow from figures, which is checked without models."""
    again = {each["name"]: each for each in found["candidates"]}
    for each in stated["candidates"]:
        name = each["name"]
        if name == SERVER:
            continue
        other = again.pop(name, {})
        for part in ("scores", "difference"):
            result.compare(FILE, each.get(part), other.get(part), f"{AGAIN}: {name}.{part}", SAME_MODEL)
        for key in ("kind", "description"):
            result.hold(FILE, f"{AGAIN}: {name}.{key}", each.get(key), other.get(key))
        for key in ("prompt_tokens", "answer_tokens", "bytes"):
            one, two = ((value.get("cost") or {}).get(key) for value in (each, other))
            result.hold(FILE, f"{AGAIN}: {name}.cost.{key}", one, two, SAME_MODEL)
    for key in ("metric", "rows", "forgetting", "left_out"):
        result.compare(FILE, stated.get(key), found[key], f"{AGAIN}: {key}", SAME_MODEL)
    one, two = (placed(each.get("contamination")) for each in (stated, found))
    result.compare(FILE, one, two, f"{AGAIN}: contamination", SAME_MODEL)
    flips = ("from", "to", "fixed", "broken")
    for part, keys in (("verdict", ("decision", "rows_needed")), ("flips", flips), ("flips_since", flips)):
        one, two = (_of(value.get(part), keys) for value in (stated, found))
        if two is not None or part != "flips_since":
            result.compare(FILE, one, two, f"{AGAIN}: {part}", SAME_MODEL)


def _of(value: Mapping[str, Any] | None, keys: tuple[str, ...]) -> dict[str, Any] | None:
    return None if value is None else {key: value.get(key) for key in keys}
