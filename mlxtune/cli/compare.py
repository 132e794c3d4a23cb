"""`mlxtune compare`: was tuning worth it? Shows the candidates of a run and the verdict; knows no statistics."""

import contextlib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlxtune.cli import display
from mlxtune.cli.flags import build_recipe, recipe_flags
from mlxtune.cli.stages import run_stages
from mlxtune.report import words
from mlxtune.report.score import Score

if TYPE_CHECKING:
    from mlxtune.recipe import Recipe
    from mlxtune.rundir import RunDir

OWN = r"(compare|evaluate)[.:]"  # what may be set otherwise than in the run


def _percents(context: click.Context, parameter: click.Parameter, value: str | None) -> list[float]:
    """`25,50,100` as numbers."""
    try:
        return [float(each) for each in value.split(",")] if value is not None else []
    except ValueError:
        raise click.BadParameter(f"{value!r} is no list of per cents such as 25,50,100") from None


@click.command("compare", short_help="was tuning worth it?")
@click.argument("target", metavar="RUN|RECIPE", type=click.Path(path_type=Path))
@click.option(
    "--learning-curve",
    "percents",
    metavar="25,50,100",
    callback=_percents,
    help="train on so many per cents of the rows: what would more bring?",
)
@click.option("--against", type=click.Path(path_type=Path), metavar="RUN", help="earlier run: what changed since?")
@click.option("--out", type=click.Path(path_type=Path), metavar="DIR", help="folder for the result  [RUN/compare]")
@click.option("--json", "as_json", is_flag=True, help="print the comparison as JSON")
@recipe_flags("compare")
def command(
    target: Path,
    percents: list[float],
    against: Path | None,
    out: Path | None,
    as_json: bool,
    sets: tuple[str, ...],
    **flags: Any,
) -> None:
    """Put the same held-out rows to the base as it is, with a prompt, with examples, with retrieved passages, and to
    the tuned and the fused model; tell the differences with their intervals, what each costs, what was forgotten, and
    whether tuning was worth it.

    RUN is a folder that `mlxtune run` or `mlxtune train` wrote; a RECIPE is run first where that has not been done.
    A finished comparison is shown as it is; with other settings it needs an --out of its own.

    \b
    Example:
      mlxtune compare runs/quickstart
      mlxtune compare runs/quickstart --out few8 --set compare.few_shot=8
      mlxtune compare my.yaml --learning-curve 25,50,100
    """
    if percents:
        from mlxtune.comparison.learning_curve import check

        check(percents)
    from mlxtune.rundir import RunDir

    run = RunDir(target if target.is_dir() else Path("runs") / target.stem)
    if not target.is_dir():
        whole = build_recipe(target, flags, sets)
        run_stages(whole, run.root)
    recipe = _recipe(run, flags, sets if target.is_dir() else ())
    value = _compared(run, recipe, out, against)
    if percents:
        value = _with_curve(run, recipe, out, percents, value)
    if as_json:
        display.result_json(value)
    else:
        show(value)


def _recipe(run: "RunDir", flags: dict[str, Any], sets: tuple[str, ...]) -> "Recipe":
    """The run's recipe with what is set otherwise here. Raises InputError for no run, RecipeError for what is fixed."""
    from mlxtune import recipe as recipes
    from mlxtune.errors import InputError, RecipeError

    if not run.recipe.is_file():
        raise InputError("holds no run", where=run.root, hint="give a folder that `mlxtune run` wrote, or a recipe")
    recipe = build_recipe(run.recipe, flags, sets)
    found = recipes.differences(recipes.load(run.recipe), recipe)
    changed = [each for each in found if not re.match(OWN, each)]
    if changed:
        hint = "only compare.* and evaluate.* can be set here; run another recipe for the rest"
        raise RecipeError(f"is not how {run.root} was made ({changed[0]})", where="--set", hint=hint)
    return recipe


def _compared(run: "RunDir", recipe: "Recipe", out: Path | None, against: Path | None) -> dict[str, Any]:
    """The comparison: as it is finished already, or made now."""
    from dataclasses import asdict

    from mlxtune.compare import compare
    from mlxtune.errors import InputError, OutputError
    from mlxtune.recipe import CompareRecipe
    from mlxtune.report import reading
    from mlxtune.rundir import RunDir

    earlier = RunDir(against) if against is not None else None
    if earlier is not None and not earlier.evaluation("tuned").is_file():
        raise InputError("has no evaluation of a tuned model", where=against, hint="give a finished run")
    value = reading.comparison_of(run) if out is None else None
    if value is not None:
        same = value.get("settings") == asdict(recipe.compare or CompareRecipe())
        same = same and value.get("evaluate") in (None, asdict(recipe.evaluate))
        if not same or earlier is not None:
            what = "holds a comparison with other settings" if not same else "holds a comparison already"
            raise OutputError(what, where=run.compare, hint="give an --out, or remove it")
        return value
    with run.lock() if out is None else contextlib.nullcontext(), display.phases() as shown:
        value = compare(run, recipe, out=out, since=earlier, on_progress=shown)
    _reported(run, out)
    return value


def _with_curve(
    run: "RunDir", recipe: "Recipe", out: Path | None, percents: list[float], value: dict[str, Any]
) -> dict[str, Any]:
    """The comparison with a learning curve, which is written beside it into its file."""
    from mlxtune.compare import RESULT
    from mlxtune.comparison import evidence
    from mlxtune.comparison.finished import open_run
    from mlxtune.comparison.learning_curve import learning_curve
    from mlxtune.errors import OutputError
    from mlxtune.rundir import discard, staged, write_json

    file = (out or run.compare) / RESULT
    if value["learning_curve"] is not None:
        raise OutputError("has a learning curve already", where=file, hint="give an --out, or remove it")
    with display.phases() as shown:
        found = learning_curve(open_run(run, recipe), percents, on_progress=shown)
    value = {**value, "learning_curve": found.value}
    folder = evidence.curve(file.parent)
    if folder.exists():  # of a curve that was cut off before it stood in the file
        discard(folder)
    with staged(folder) as scratch:
        for percent, lines in found.predictions.items():
            evidence.write(scratch / evidence.curve_name(percent), lines)
    write_json(file, value)
    _reported(run, out)
    return value


def _reported(run: "RunDir", out: Path | None) -> None:
    """Brings the report of a run, where it has one, up to date with what was written into the run."""
    if out is None and run.report("json").is_file():
        from mlxtune.pipeline import reported

        reported(run)


def show(value: dict[str, Any]) -> None:
    """Prints the table of candidates, what else was measured, and the verdict."""
    headings, rows = words.comparison_table(value)
    display.table(headings, [[display.harmless(cell) for cell in row] for row in rows])
    for name, reason in value["left_out"].items():
        display.note(display.harmless(f"not compared: {name} ({reason})"))
    display.result()
    for line in _lines(value):
        display.result(display.harmless(line))
    display.result()
    display.result(display.harmless(value["verdict"]["sentence"]))
    for reason in value["verdict"]["reasons"]:
        display.result(display.harmless(f"  - {reason}"))


def _lines(value: dict[str, Any]) -> list[str]:
    """What was measured besides, a line each."""
    found = []
    for flips in filter(None, (value["flips"], value["flips_since"])):
        found.append(
            f"from {flips['from']} to {flips['to']}: {display.count(flips['fixed'], 'row')} fixed, "
            f"{flips['broken']:,} broken"
        )
    forgot = value["forgetting"]
    if forgot is not None:
        error = f" ± {forgot['kl_error']:.3f}" if forgot["kl_error"] is not None else ""
        found.append(
            f"forgetting on {forgot['anchor']}: loss {forgot['base_loss']:.3f} → {forgot['tuned_loss']:.3f} nats per "
            f"token, KL from the base {forgot['kl']:.3f}{error}"
        )
    near = value["contamination"]
    if near is not None and near["count"]:
        found.append(
            f"{display.count(near['count'], 'test row')} near training rows, such as {near['near'][0]['test']}"
            f"{_without(near['without'], value['metric'])}"
        )
    judged = value["judged"]
    if judged is not None:
        found.append(
            f"judged by {judged['judge']}: {judged['better']} better than {judged['than']} in {judged['wins']}, "
            f"as good in {judged['ties']}, worse in {judged['losses']}"
        )
    curve = value["learning_curve"]
    if curve is not None:
        points = ", ".join(f"{point['rows']:,} rows {point['value']:.3f}" for point in curve["points"])
        found += [f"learning curve of {words.metric_name(curve['metric'])}: {points}", curve["sentence"]]
    return found


def _without(rest: list[dict[str, Any]], metric: str | None) -> str:
    """The scores of the tuned candidates without the rows that are near to training rows."""
    scores = {
        each["name"]: Score(**score)
        for each in rest
        for score in each["scores"]
        if score["metric"] == metric and each["name"] in ("tuned", "fused")
    }
    told = ", ".join(f"{name} {words.figure(score)}" for name, score in scores.items())
    return f"; without them: {told}" if told else ""
