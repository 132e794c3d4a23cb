"""Computes every figure of a run's report again, from the files in its folder, and tells each that differs.

With `full` the models answer again too. Knows what a run leaves in its folder; writes nothing.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mlxtune import hub, model, origin, workers
from mlxtune import recipe as recipes
from mlxtune.comparison import contrast
from mlxtune.errors import InputError
from mlxtune.evaluate import evaluate
from mlxtune.evaluation import predictions, tally
from mlxtune.evaluation.labelset import label_of
from mlxtune.evaluation.predictions import Prediction
from mlxtune.metrics.exact_match import is_exact
from mlxtune.model import LanguageModel
from mlxtune.recipe import EvaluateRecipe
from mlxtune.report import build, reading
from mlxtune.report.decision import best, decide
from mlxtune.report.shapes import Exact, Maybe, misfit
from mlxtune.report.words import COLUMNS
from mlxtune.rundir import RunDir, read_json
from mlxtune.stages import Stages

SAME = 1e-9  # relative; a row's loss was divided by its tokens and is multiplied again
SAME_MODEL = 1e-4  # relative, or absolute below 1: of figures that the models give again
LONGEST = 60  # characters of a value that is shown
OnProgress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """A figure that is not what the folder says: `stated` in the file, `found` by computing it again."""

    file: str
    key: str
    stated: str
    found: str


@dataclass(slots=True, kw_only=True)
class Verified:
    """How many figures, files and predictions were compared, what differs, and what could not be computed again."""

    figures: int = 0
    files: int = 0
    predictions: int = 0
    differences: list[Difference] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def differs(self, file: str, key: str, stated: Any, found: Any) -> None:
        self.differences.append(Difference(file=file, key=key, stated=_short(stated), found=_short(found)))

    def compare(self, file: str, stated: Any, found: Any, key: str = "", tolerance: float = SAME) -> None:
        """Holds each number and text of two values against each other."""
        before, after = dict(leaves(stated, key)), dict(leaves(found, key))
        for name in [*before, *(name for name in after if name not in before)]:
            self.figures += 1
            if name not in after or name not in before or not _same(before[name], after[name], tolerance):
                self.differs(file, name, before.get(name, MISSING), after.get(name, MISSING))


class _Missing:
    """A value that is not there."""

    def __repr__(self) -> str:
        return "nothing"


MISSING = _Missing()


def verify(run: RunDir, *, full: bool = False, on_progress: OnProgress = lambda what, done, total: None) -> Verified:
    """Compares report.json and its pages, the evaluations and the comparison with what their files say.

    Raises InputError for a folder without a report.
    """
    path = run.report("json")
    if not path.is_file():
        raise InputError("has no report", where=run.root, hint="write one with `mlxtune report`")
    stated = read_json(path)
    if not isinstance(stated, dict) or not isinstance(stated.get("files"), dict):
        raise InputError("is no report of this version", where=path, hint="write it again with `mlxtune report`")
    result = Verified()
    _check_files(run, stated["files"], result)
    with _readable(run, run.report("json"), result):
        _check_report(run, stated, result)
    with _readable(run, run.recipe, result):
        settings = recipes.load(run.recipe).evaluate if run.recipe.is_file() else None
        if settings is not None:
            schema = tally.check(settings)
            for name in COLUMNS:
                with _readable(run, run.predictions(name), result):
                    _check_evaluation(run, name, settings, schema, result)
            with _readable(run, run.compare / "compare.json", result):
                _check_comparison(run, settings, schema, result)
    if full:
        with _readable(run, run.recipe, result):
            _check_models(run, result, on_progress)
    return result


@contextlib.contextmanager
def _readable(run: RunDir, file: Path, result: Verified) -> Iterator[None]:
    """Inside, what cannot be read is a difference of the file that the error names, else of `file`."""
    try:
        yield
    except InputError as error:  # a file that was altered may not even be readable
        named = Path(error.where or "")
        at = named if named.is_relative_to(run.root) else file
        found = Difference(file=at.relative_to(run.root).as_posix(), key="content", stated="readable", found=error.what)
        if found not in result.differences:
            result.differences.append(found)


def _check_files(run: RunDir, stated: Mapping[str, Any], result: Verified) -> None:
    """Every file has the sha256 that the report states, and none came or went."""
    found = reading.hashes(run)
    for name in [*stated, *(name for name in found if name not in stated)]:
        result.files += 1
        if stated.get(name) != found.get(name):
            result.differs(name, "sha256", stated.get(name, MISSING), found.get(name, MISSING))


def _check_report(run: RunDir, stated: dict[str, Any], result: Verified) -> None:
    """The report is what the files give, and the pages say what it says."""
    again = build.build(run)
    apart = ("paths", "files")  # where the folder lies is no figure; the files were compared
    before, after = ({name: each for name, each in one.items() if name not in apart} for one in (stated, again))
    result.compare("report.json", before, after)
    paths = stated.get("paths")
    known = isinstance(paths, dict) and misfit(paths, Exact(dict.fromkeys(again["paths"], Maybe(str)))) is None
    shown = {**again, "paths": paths if known else again["paths"], "files": stated["files"]}
    for suffix, page in build.pages(shown).items():
        file = run.report(suffix)
        written = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
        result.files += 1
        if written != page:
            line, old, new = _first_difference(written, page)
            result.differs(file.name, f"line {line}", old, new)


def _check_evaluation(run: RunDir, name: str, settings: EvaluateRecipe, schema: object, result: Verified) -> None:
    """Every score and table of an evaluation is what its predictions give."""
    stated = reading.evaluation_of(run, name)
    if stated is None:
        return
    file = f"eval/{name}.json"
    found = predictions.read(run.predictions(name))
    result.predictions += len(found)
    if len(found) != stated["n"]:
        result.differs(file, "n", stated["n"], len(found))
    if not found:
        return
    for number, each in enumerate(found, start=1):
        _check_marks(f"eval/{name}.jsonl:{number}", each, settings, result)
    scores, tables = tally.tally(tally.Rows(found, settings, _labels(stated, settings), schema))
    again = {"scores": [score.to_dict() for score in scores], "tables": tables}
    result.compare(file, {"scores": stated["scores"], "tables": stated["tables"]}, again)
    _check_lengths(file, "cost", stated["cost"], found, result)


def _check_lengths(file: str, key: str, cost: Mapping[str, Any], found: Sequence[Prediction], result: Verified) -> None:
    """The mean tokens of prompts and answers are those of the rows."""
    for name in ("prompt_tokens", "answer_tokens"):
        known = [count for each in found if (count := getattr(each, name)) is not None]
        mean = sum(known) / len(known) if known else None
        if cost.get(name) is not None or mean is not None:
            result.compare(file, cost.get(name), mean, f"{key}.{name}")


def _check_marks(where: str, each: Prediction, settings: EvaluateRecipe, result: Verified) -> None:
    """A prediction's answer is right where it says so."""
    if each.answer is None or each.expected is None:
        return
    label = label_of(each.answer, settings.label)
    expected = label_of(each.expected, settings.label)
    marks: dict[str, tuple[Any, Any]] = {"exact": (each.exact, is_exact(each.answer, each.expected))}
    if each.label_expected is not None:
        marks["label"], marks["label_expected"] = (each.label, label), (each.label_expected, expected)
        marks["right"] = (each.right, label == expected)
    for key, (stated, found) in marks.items():
        result.compare(where, stated, found, key)


def _labels(evaluation: Mapping[str, Any] | None, settings: EvaluateRecipe) -> Sequence[str]:
    """The set of labels. It is that of the training rows: its names are taken as stated, what was given is counted."""
    table = (evaluation["tables"] if evaluation else {}).get("confusion") or {}
    labels: Sequence[str] = table.get("labels") or settings.labels
    return labels


def _check_comparison(run: RunDir, settings: EvaluateRecipe, schema: object, result: Verified) -> None:
    """The comparison's scores, differences, flips and verdict are what the candidates' predictions give."""
    stated = reading.comparison_of(run)
    if stated is None:
        return
    file, metric, lines = "compare/compare.json", stated["metric"], stated["candidates"]
    labels = _labels(reading.evaluation_of(run, "base"), settings)
    for each in lines:
        found = predictions.read(run.compare / f"{each['name']}.jsonl")
        result.predictions += len(found)
        _check_lengths(file, f"{each['name']}.cost", each.get("cost") or {}, found, result)
        scores = tally.tally(tally.Rows(found, settings, labels, schema))[0] if found else []
        again = {score.metric: score.to_dict() for score in scores}
        for score in each["scores"]:
            key = f"{each['name']}.scores.{score['metric']}"
            if score["metric"] in again:
                result.compare(file, score, again[score["metric"]], key)
            else:
                result.unchecked.append(f"{file} {key}")
    given = {each["name"]: reading.predictions_of(run.compare / f"{each['name']}.jsonl") for each in lines}
    if metric is not None:
        _check_contrast(stated, lines, given, metric, result)
    result.compare(file, stated["verdict"], decide(lines, metric, stated.get("forgetting")), "verdict")
    told = ("forgetting", "learning_curve", "contamination", "judged", "flips_since")
    result.unchecked += [f"{file} {name}" for name in told if stated.get(name) is not None]


def _check_contrast(
    stated: Mapping[str, Any],
    lines: Sequence[Mapping[str, Any]],
    given: Mapping[str, Sequence[Mapping[str, Any]]],
    metric: str,
    result: Verified,
) -> None:
    untuned, tuned = best(lines, metric, "untuned"), best(lines, metric, "tuned")
    if untuned is None or tuned is None:
        return
    file = "compare/compare.json"
    found = contrast.differences(given, untuned, metric)
    for each in lines:
        result.compare(file, each.get("difference"), found[each["name"]], f"{each['name']}.difference")
    flips = contrast.flips(given[untuned], given[tuned], (untuned, tuned), metric)
    result.compare(file, stated.get("flips"), flips, "flips")


def _check_models(run: RunDir, result: Verified, on_progress: OnProgress) -> None:
    """The models give the same scores again, on the machine and with the versions that the run was made with."""
    recipe = recipes.load(run.recipe)
    source = hub.fetch(recipe.model, recipe.revision or origin.revision(run))
    origin.refuse_changed_model(run, source)
    work = Stages(recipe, run, source, {}, lambda event: None, lambda: None, workers.join())
    models: dict[str, Callable[[], LanguageModel]] = {
        "base": work.load_base,
        "tuned": work.load_tuned,
        "fused": functools.partial(model.load, run.fused),
    }
    for name, load in models.items():
        stated = reading.evaluation_of(run, name)
        if stated is None:
            continue
        done = evaluate(
            load(),
            work.samples("test"),
            recipe.evaluate,
            label_set=work.label_set,
            groups=work.groups,
            on_row=functools.partial(_tell, on_progress, name),
        )
        again = {score.metric: score.to_dict() for score in done.scores}
        for each in stated["scores"]:
            key = f"scores.{each['metric']} of the model"
            result.compare(f"eval/{name}.json", each, again.get(each["metric"]), key, SAME_MODEL)


def _tell(on_progress: OnProgress, name: str, phase: str, done: int, total: int) -> None:
    on_progress(f"{name}, {phase}", done, total)


def leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every number, text, switch and null of a JSON value with its place, such as `fused[2].value`."""
    if isinstance(value, dict):
        for name, each in value.items():
            yield from leaves(each, f"{key}.{name}" if key else str(name))
        if not value:
            yield key, "{}"
    elif isinstance(value, list):
        for at, each in enumerate(value):
            named = isinstance(each, dict) and isinstance(each.get("metric"), str) and "better" in each
            yield from leaves(each, f"{key}.{each['metric']}" if named else f"{key}[{at}]")
        if not value:
            yield key, "[]"
    else:
        yield key, value


def _same(first: Any, second: Any, tolerance: float) -> bool:
    numbers = all(isinstance(each, int | float) and not isinstance(each, bool) for each in (first, second))
    if numbers:
        floor = tolerance if tolerance > SAME else 1e-12
        return math.isclose(first, second, rel_tol=tolerance, abs_tol=floor)
    return type(first) is type(second) and bool(first == second)


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


def _first_difference(written: str, page: str) -> tuple[int, str, str]:
    """The first line that differs, and around where it does, in both."""
    old, new = written.split("\n"), page.split("\n")
    pairs = zip(old, new, strict=False)
    at = next((number for number, (a, b) in enumerate(pairs) if a != b), min(len(old), len(new)))
    first, second = (lines[at] if at < len(lines) else "" for lines in (old, new))
    shared = min(len(first), len(second))
    start = next((i for i in range(shared) if first[i] != second[i]), shared)
    start = max(0, start - 12)
    return at + 1, first[start:], second[start:]
