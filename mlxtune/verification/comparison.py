"""Whether a comparison follows from the lines in its folder and the rows of its run. Knows files, not models.

A part whose lines an earlier version did not keep is named as not checked.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlxtune import recipe as recipes
from mlxtune.adapter import WEIGHTS
from mlxtune.comparison import contamination, contrast, evidence, forgetting, judge, learning_curve
from mlxtune.comparison.candidates import labels_of
from mlxtune.comparison.scoring import choices_of
from mlxtune.data import load
from mlxtune.data.formats import answer_text
from mlxtune.errors import InputError
from mlxtune.evaluation import tally
from mlxtune.evaluation.predictions import Prediction
from mlxtune.recipe import EvaluateRecipe, Recipe
from mlxtune.report import reading
from mlxtune.report.decision import best, decide
from mlxtune.report.score import Score
from mlxtune.report.words import COLUMNS
from mlxtune.rundir import RunDir, size_of
from mlxtune.verification import evaluations
from mlxtune.verification.evaluations import Predictions
from mlxtune.verification.figures import SAME_MODEL, Verified

FILE = "compare/compare.json"
SERVER = "endpoint"  # the candidate that a server answers for


@dataclass(frozen=True, slots=True)
class _Case:
    """What compare.json states, and the predictions of the candidates that could be read, as lines, by their names."""

    run: RunDir
    recipe: Recipe
    stated: Mapping[str, Any]
    given: dict[str, list[dict[str, Any]]]
    result: Verified

    @property
    def settings(self) -> Mapping[str, Any]:
        return self.stated.get("settings") or {}

    @property
    def whole(self) -> bool:
        """Whether the predictions of every candidate could be read."""
        return len(self.given) == len(self.stated["candidates"])


def check(
    run: RunDir,
    recipe: Recipe,
    known: Predictions,
    result: Verified,
    on_part: Callable[[str], None] = lambda name: None,
) -> None:
    """Scores, differences, verdict, and all else in compare.json. Raises InputError where that is unreadable.

    `on_part` is told what begins that may take a while without a prediction being read.
    """
    stated = reading.comparison_of(run)
    if stated is None:
        return
    case = _Case(run, recipe, stated, {}, result)
    whole = settings_of(run, recipe, stated)
    again = _candidates(case, whole, known)
    if stated.get("evaluate") is not None and whole.evaluate == recipe.evaluate and recipe.data.mask_prompt:
        _same_as_evaluated(case)
    metric = contrast.metric_of([(each["kind"], [Score(**score) for score in each["scores"]]) for each in again])
    result.hold(FILE, "metric", stated["metric"], metric)
    if "base" in case.given:
        result.hold(FILE, "rows", stated["rows"], len(case.given["base"]))
    names = _best(again, metric)
    if case.whole:
        again = _contrast(case, again, names, metric)
    forgotten = stated.get("forgetting")
    with result.reading(run, evidence.file(run.compare, evidence.FORGETTING)):
        forgotten = _forgetting(case)
    if case.whole:
        near = stated.get("contamination")
        on_part("near rows")
        with result.reading(run, run.data / "train.jsonl"):
            near = _contamination(case)
        result.compare(FILE, stated["verdict"], decide(again, metric, forgotten, near), "verdict")
    with result.reading(run, evidence.file(run.compare, evidence.JUDGED)):
        _judged(case, names)
    with result.reading(run, evidence.file(run.compare, evidence.SINCE)):
        _since(case, metric, known)
    with result.reading(run, evidence.curve(run.compare)):
        _curve(case, known)


def settings_of(run: RunDir, recipe: Recipe, stated: Mapping[str, Any]) -> Recipe:
    """The recipe of the run with the settings that its comparison was made with. Raises InputError for what is none."""
    named = {"evaluate": "evaluate", "compare": "settings"}
    parts = {part: stated[name] for part, name in named.items() if stated.get(name) is not None}
    made = recipes.build(parts, where=str(run.compare / "compare.json"))
    return replace(recipe, **{part: getattr(made, part) for part in parts})


def _candidates(case: _Case, recipe: Recipe, known: Predictions) -> list[dict[str, Any]]:
    """The candidates with the scores that their predictions give; fills in `given`."""
    run, result = case.run, case.result
    schema = tally.check(recipe.evaluate)
    labels = _labels(case, recipe.evaluate)
    sizes = _sizes(run, recipe)
    found = []
    for each in case.stated["candidates"]:
        name, scores = each["name"], each["scores"]
        path = run.compare / f"{name}.jsonl"
        # a server tells no probabilities, so what suits its answers was scored
        settings = recipe.evaluate if name != SERVER else replace(recipe.evaluate, metrics=[tally.AUTO])
        with result.reading(run, path):
            if path.parent != run.compare:
                raise InputError("is no name of a candidate", where=run.compare / "compare.json")
            lines = known.read(path)
            case.given[name] = _as_lines(lines)
            result.predictions += len(lines)
            if case.stated.get("evaluate") is not None:  # an earlier version did not keep which labels were compared
                known.check_marks(run, path, settings, result)
            cost = each.get("cost") or {}
            evaluations.check_lengths(FILE, f"{name}.cost", cost, lines, result)
            if name in sizes and cost.get("bytes") is not None:
                result.hold(FILE, f"{name}.cost.bytes", cost["bytes"], sizes[name])
            tallied, _ = known.tallied(path, settings, labels, None if name == SERVER else schema)
            scores = _held(case, name, scores, [score.to_dict() for score in tallied])
        found.append({**each, "scores": scores, "difference": None, "cost": each.get("cost") or {}})
    result.hold(FILE, "candidates", len(found), len({each["name"] for each in found}))
    return found


def _same_as_evaluated(case: _Case) -> None:
    """A candidate that the run has evaluated in the same way answers the same rows the same there."""
    for name in (each for each in COLUMNS if each in case.given and case.run.predictions(each).is_file()):
        evaluated = contrast.keyed(reading.predictions_of(case.run.predictions(name)))
        for key, line in contrast.keyed(case.given[name]).items():
            other = evaluated.get(key, {})
            for part in ("answer", "loss"):
                place = f"{key[0]}, {part} of eval/{name}.jsonl"
                case.result.hold(f"compare/{name}.jsonl", place, line[part], other.get(part), SAME_MODEL)


def _held(case: _Case, name: str, stated: list[dict[str, Any]], found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Compares a candidate's scores; those that its predictions do not tell are kept as they are stated."""
    if case.stated.get("evaluate") is not None:
        case.result.compare(FILE, stated, found, f"{name}.scores")
        return found
    again = {each["metric"]: each for each in found}  # an earlier version did not keep what was to be scored
    for each in stated:
        key = f"{name}.scores.{each['metric']}"
        if each["metric"] in again:
            case.result.compare(FILE, each, again[each["metric"]], key)
        else:
            case.result.unchecked.append(f"{FILE} {key}")
    return [again.get(each["metric"], each) for each in stated]


def _labels(case: _Case, settings: EvaluateRecipe) -> Sequence[str]:
    if case.stated.get("labels") is not None:
        return list(case.stated["labels"])  # names are taken as stated, as an evaluation's; answers are counted
    own = case.recipe.evaluate
    if (settings.label, settings.labels) == (own.label, own.labels):
        return evaluations.labels(reading.evaluation_of(case.run, "base"), settings)
    if settings.labels:
        return settings.labels
    return labels_of([answer_text(each) for _, each in load.read_split(case.run.data, "train")], settings.label)[0]


def _sizes(run: RunDir, recipe: Recipe) -> dict[str, int]:
    """The bytes of the candidates whose weights lie in the run, or are told of in its origin."""
    known = reading.origin_of(run)
    if recipe.quantize is not None:
        base = _weights(run.base)
    else:
        base = int(known["model"]["bytes"]) if known is not None else None
    found: dict[str, int | None] = dict.fromkeys(("base", "prompt", "few_shot", "retrieval"), base)
    adapter = run.adapter / WEIGHTS
    found["tuned"] = base + size_of(adapter) if base is not None and adapter.is_file() else None
    found["fused"] = _weights(run.fused)
    return {name: size for name, size in found.items() if size is not None}


def _weights(folder: Path) -> int | None:
    if not folder.is_dir():
        return None
    return sum(size_of(file) for file in folder.glob("*.safetensors") if file.is_file())


def _best(candidates: Sequence[Mapping[str, Any]], metric: str | None) -> tuple[str, str] | None:
    """The names of the best untuned and the best tuned candidate."""
    if metric is None:
        return None
    untuned, tuned = best(candidates, metric, "untuned"), best(candidates, metric, "tuned")
    return (untuned, tuned) if untuned is not None and tuned is not None else None


def _contrast(
    case: _Case, candidates: list[dict[str, Any]], names: tuple[str, str] | None, metric: str | None
) -> list[dict[str, Any]]:
    """Compares differences and flips; returns the candidates with their differences."""
    found: dict[str, dict[str, Any] | None] = dict.fromkeys(case.given)
    flips = None
    if names is not None and metric is not None:
        found = contrast.differences(case.given, names[0], metric)
        flips = contrast.flips(case.given[names[0]], case.given[names[1]], names, metric)
    for each in case.stated["candidates"]:
        case.result.compare(FILE, each.get("difference"), found[each["name"]], f"{each['name']}.difference")
    case.result.compare(FILE, case.stated.get("flips"), flips, "flips")
    return [{**each, "difference": found[each["name"]]} for each in candidates]


def _forgetting(case: _Case) -> dict[str, Any] | None:
    """What was forgotten by the lines of the anchor's windows; as it is stated where there are none."""
    stated: dict[str, Any] | None = case.stated.get("forgetting")
    lines = evidence.read(case.run.compare, evidence.FORGETTING)
    if lines is None:
        _not_told(case, "forgetting", stated)
        return stated
    windows = [
        forgetting.Window(**{name: each[name] for name in evidence.SHAPES[evidence.FORGETTING]}) for each in lines
    ]
    found = {
        "anchor": case.settings.get("anchor") or (stated or {}).get("anchor"),
        **forgetting.summed_up(windows),
        "budget": case.recipe.train.forget_budget,
        "choices": _choices(case, (stated or {}).get("choices")),
    }
    case.result.compare(FILE, stated, found, "forgetting")
    return found


def _choices(case: _Case, stated: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    lines = evidence.read(case.run.compare, evidence.CHOICES)
    if lines is None:
        _not_told(case, "forgetting.choices", stated)
        return stated
    return choices_of(case.settings.get("choices") or (stated or {}).get("file", ""), lines)


def _contamination(case: _Case) -> dict[str, Any] | None:
    """The rows near training rows, found again; where the folder lies is no figure."""
    if "contamination" not in case.stated:
        return None
    train, test = (load.read_split(case.run.data, name) for name in ("train", "test"))
    scored = {contrast.place(each["where"]) for each in case.given.get("base", [])}
    test = [(row, example) for row, example in test if contrast.place(row.where) in scored]
    found = contamination.measured(train, test, case.given)
    stated, again = (placed(each) for each in (case.stated["contamination"], found))
    case.result.compare(FILE, stated, again, "contamination")
    return found


def placed(found: dict[str, Any] | None) -> dict[str, Any] | None:
    """A contamination whose rows are named by file and line alone."""
    if found is None:
        return None
    near = [{**each, **{name: contrast.place(each[name]) for name in ("test", "train")}} for each in found["near"]]
    return {**found, "near": near}


def _judged(case: _Case, names: tuple[str, str] | None) -> None:
    """The counts by the judge's verdicts, of the pairs that it was asked about."""
    stated = case.stated.get("judged")
    lines = evidence.read(case.run.compare, evidence.JUDGED)
    if lines is None:
        _not_told(case, "judged", stated)
        return
    if names is None or not case.given.keys() >= set(names):
        return
    file = evidence.file(case.run.compare, evidence.JUDGED).relative_to(case.run.root).as_posix()
    pairs = judge.pairs_of(case.given[names[0]], case.given[names[1]])
    case.result.compare(file, [each["where"] for each in lines], [pair.where for pair in pairs], "where")
    said = [judge.as_verdicts(each["verdicts"]) for each in lines]
    name = case.settings.get("judge") or (stated or {}).get("judge")
    found = {"judge": name, "better": names[1], "than": names[0], **judge.summed_up(said, case.recipe.seed).to_dict()}
    case.result.compare(FILE, stated, found, "judged")


def _since(case: _Case, metric: str | None, known: Predictions) -> None:
    """The rows that changed since an earlier run, whose name is taken as stated."""
    stated, path = case.stated.get("flips_since"), evidence.file(case.run.compare, evidence.SINCE)
    if not path.exists():
        _not_told(case, "flips_since", stated)
        return
    before, now = _as_lines(known.read(path, scored=False)), case.given.get("tuned")
    if metric is None or now is None:
        return
    file = path.relative_to(case.run.root).as_posix()
    case.result.hold(file, "rows of this run", len(before), len(contrast.same_rows(before, now)))
    found = contrast.flips_since(before, now, (stated or {}).get("from", ""), metric)
    case.result.compare(FILE, stated, found, "flips_since")


def _curve(case: _Case, known: Predictions) -> None:
    """The learning curve by the predictions at each size; the sizes by the training rows."""
    stated, files = case.stated.get("learning_curve"), evidence.curve_files(case.run.compare)
    if not files:
        _not_told(case, "learning_curve", stated)
        return
    if stated is None:  # cut off while it was put there
        result = case.result
        result.differs(FILE, "learning_curve", "nothing", "lines of one; run compare --learning-curve again")
        return
    rows, column = load.read_split(case.run.data, "train"), case.recipe.data.group_by
    groups = {row.where: str(each[column]) for row, _ in rows if column in (each := load.group_of(row, column))}
    parts = learning_curve.nested(rows, list(files), case.recipe.seed, groups)
    predicted = [_as_lines(known.read(path, scored=False)) for path in files.values()]
    case.result.predictions += sum(map(len, predicted))
    found = learning_curve.summed_up([len(places) for places in parts.values()], predicted, case.recipe.seed)
    case.result.compare(FILE, stated, found, "learning_curve")


def _not_told(case: _Case, name: str, stated: Any) -> None:
    """Names a part that is stated and that the folder has no lines of."""
    if stated is not None:
        case.result.unchecked.append(f"{FILE} {name}")


def _as_lines(found: Sequence[Prediction]) -> list[dict[str, Any]]:
    """Predictions as `contrast` takes them."""
    names = Prediction.__slots__
    return [{name: getattr(each, name) for name in names} for each in found]
