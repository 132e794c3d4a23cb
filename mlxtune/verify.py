"""Computes every figure of a run's report again, from the files in its folder, and tells each that differs.

With `full` the models answer again too. Knows what a run leaves in its folder; writes nothing.
"""

from collections.abc import Callable, Mapping
from typing import Any

from mlxtune import recipe as recipes
from mlxtune.comparison import evidence
from mlxtune.errors import InputError, MlxtuneError
from mlxtune.evaluation import tally
from mlxtune.export import card
from mlxtune.export.facts import of_adapter, of_fused
from mlxtune.recipe import Recipe
from mlxtune.report import build, reading
from mlxtune.report.shapes import Exact, Maybe, misfit
from mlxtune.report.words import COLUMNS
from mlxtune.rundir import RunDir, read_json
from mlxtune.verification import comparison, evaluations
from mlxtune.verification.evaluations import Predictions
from mlxtune.verification.figures import MISSING, Verified

OnProgress = Callable[[str, int, int], None]


def verify(run: RunDir, *, full: bool = False, on_progress: OnProgress = lambda what, done, total: None) -> Verified:
    """Compares report.json and its pages, the evaluations and the comparison with what their files say.

    `on_progress` is told what is read, in kB of predictions, and of models the rows that are scored. Raises InputError
    for a folder without a report.
    """
    path = run.report("json")
    if not path.is_file():
        raise InputError("has no report", where=run.root, hint="write one with `mlxtune report`")
    stated = read_json(path)
    if not isinstance(stated, dict) or not isinstance(stated.get("files"), dict):
        raise InputError("is no report of this version", where=path, hint="write it again with `mlxtune report`")
    result = Verified()
    on_progress("report", 0, 1)
    with result.reading(run, path):
        _check_report(run, stated, result)
    with result.reading(run, run.recipe):
        if run.recipe.is_file():
            _check_measured(run, recipes.load(run.recipe), result, on_progress)
    if not result.differences:  # of other files than the report was built from, cards would be other ones
        _check_beside(run, result)
    if full:
        from mlxtune.verification import models

        try:
            with result.reading(run, run.recipe):
                models.check(run, recipes.load(run.recipe), result, on_progress)
        except MlxtuneError as error:  # what was found already is told all the same
            if not result.differences:
                raise
            result.unchecked.append(f"the models ({error})")
    return result


def _check_report(run: RunDir, stated: dict[str, Any], result: Verified) -> None:
    """The files are those of the report; it is what they give, and the pages say what it says."""
    try:
        again = build.build(run)
    except InputError:
        _check_files(stated["files"], reading.hashes(run), result)
        raise
    _check_files(stated["files"], again["files"], result)
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


def _check_files(stated: Mapping[str, Any], found: Mapping[str, str], result: Verified) -> None:
    """Every file has the sha256 that the report states, and none came or went."""
    for name in [*stated, *(name for name in found if name not in stated)]:
        result.files += 1
        if stated.get(name) != found.get(name):
            result.differs(name, "sha256", stated.get(name, MISSING), found.get(name, MISSING))


def _check_measured(run: RunDir, recipe: Recipe, result: Verified, on_progress: OnProgress) -> None:
    """The evaluations and the comparison are what their lines give."""
    files = [
        *map(run.predictions, COLUMNS),
        *run.compare.glob("*.jsonl"),
        evidence.file(run.compare, evidence.SINCE),
        *evidence.curve_files(run.compare).values(),
    ]
    total, done = sum(path.stat().st_size for path in files if path.is_file()), 0

    def told(size: int) -> None:
        nonlocal done
        done += size
        on_progress("predictions, kB", done // 1000, max(1, total // 1000))

    known = Predictions(told)
    schema = tally.check(recipe.evaluate)
    for name in COLUMNS:
        with result.reading(run, run.predictions(name)):
            evaluations.check(run, name, recipe.evaluate, schema, known, result)
    with result.reading(run, run.compare / "compare.json"):
        comparison.check(run, recipe, known, result, lambda name: on_progress(name, 0, 1))


def _check_beside(run: RunDir, result: Verified) -> None:
    """The model cards and the picture of the losses, which the report does not show and has no hash of.

    People edit cards, a licence is read from where the base lies here, and a picture is that of the version that drew
    it: one that is not what the files give is named as not checked, and is no difference.
    """
    pages: dict[str, Callable[[], str]] = {
        "adapter/README.md": lambda: card.card(of_adapter(run)),
        "fused/README.md": lambda: card.card(of_fused(run.fused, run)),
        run.loss_picture.name: lambda: build.loss_picture(run),
    }
    for name, page in pages.items():
        file = run.root / name
        if file.is_file():
            result.files += 1
            if file.read_text(encoding="utf-8", errors="replace") != page():
                result.unchecked.append(f"{name} (edited, or written elsewhere)")


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
