"""`mlxtune evaluate`: scores over every row of a file, of questions, or of tasks of lm-evaluation-harness."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlxtune.cli import display
from mlxtune.cli.fetch import fetch
from mlxtune.cli.flags import build_recipe, config_flag, recipe_flags
from mlxtune.errors import DataError, InputError
from mlxtune.recipe import Recipe
from mlxtune.report import words
from mlxtune.report.score import Score

if TYPE_CHECKING:
    from mlxtune.evaluate import Evaluation

MOST_CLASSES = 100  # lines of a table of labels


@click.command("evaluate", short_help="score a model on every row of a file")
@config_flag
@click.option("--adapter-path", type=click.Path(path_type=Path), metavar="DIR", help="adapter to evaluate with")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="write scores there as JSON, and every prediction beside it as .jsonl",
)
@click.option("--json", "as_json", is_flag=True, help="print the scores as JSON")
@click.option(
    "--metric", "recipe_evaluate__metrics", multiple=True, metavar="NAME", help="score this, not all that suits"
)
@click.option("--labels", "recipe_evaluate__labels", multiple=True, metavar="LABEL", help="one of the answers' labels")
@click.option("--group-by", "recipe_data__group_by", metavar="FIELD", help="column whose equal values belong together")
@click.option(
    "--choices", type=click.Path(path_type=Path), metavar="FILE", help="multiple-choice questions, in place of --data"
)
@click.option("--tasks", metavar="NAME,…", help="tasks of lm-evaluation-harness, in place of --data")
@click.option(
    "--tasks-path",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    metavar="DIR",
    help="further tasks' YAML, which may run code of its own",
)
@click.option("--few-shot", type=click.IntRange(0), metavar="N", help="examples in the prompts of --tasks")
@click.option("--limit", type=click.IntRange(1), metavar="N", help="rows of each of --tasks")
@recipe_flags("model", "revision", "data.path", "data.mask_prompt", "train.max_seq_length")
def command(
    config: Path | None,
    adapter_path: Path | None,
    out: Path | None,
    as_json: bool,
    choices: Path | None,
    tasks: str | None,
    tasks_path: Path | None,
    few_shot: int | None,
    limit: int | None,
    sets: tuple[str, ...],
    **flags: Any,
) -> None:
    """Score a model on every row: loss, exact match of greedy answers, and what else suits the answers.

    Each score has its 95 % interval. With a folder of splits, its test file is scored. Where answers are labels, or
    `evaluate.label` in a recipe finds labels in them, these are scored by their probabilities too: those of the
    folder's train file, or the rows' own.

    \b
    Examples:
      mlxtune evaluate --model tiny --adapter-path runs/tickets/adapter --data runs/tickets/data/test.jsonl
      mlxtune evaluate --model tiny --choices questions.jsonl
      mlxtune evaluate --model Qwen/Qwen2.5-0.5B-Instruct --tasks arc_easy --limit 200
    """
    recipe = build_recipe(config, flags, sets)
    if out is not None:
        _refuse_taken(out)
    if choices is not None and tasks is not None:
        raise InputError("cannot go with --tasks", where="--choices", hint="run the command twice")
    if choices is not None:
        _of_choices(recipe, adapter_path, choices, out, as_json)
    elif tasks is not None:
        _of_tasks(recipe, adapter_path, tasks, tasks_path, few_shot, limit, out, as_json)
    else:
        _of_rows(recipe, adapter_path, out, as_json)


def _refuse_taken(out: Path) -> None:
    from mlxtune.rundir import refuse_existing

    refuse_existing(out, "--out")
    if out.suffix == ".jsonl":
        raise InputError("is the file of the predictions", where=f"--out {out}", hint="name it .json")
    refuse_existing(out.with_suffix(".jsonl"), "--out")


def _of_rows(recipe: Recipe, adapter_path: Path | None, out: Path | None, as_json: bool) -> None:
    from mlxtune import adapter, model
    from mlxtune.data import load
    from mlxtune.data.render import Limit, render
    from mlxtune.evaluate import check, evaluate, refuse_impossible, write
    from mlxtune.evaluation import labelset
    from mlxtune.tokenizer import inner, load_for_rows

    check(recipe.evaluate)
    files = load.files_of(recipe.data)
    file = files.get("all") or files.get("test")
    if file is None:
        raise DataError("has no test file", where=recipe.data.path, hint="give the file to score with --data FILE")
    rows = load.read_examples(file, recipe.data)
    known = load.read_examples(files["train"], recipe.data) if "train" in files else rows
    groups = _groups(rows, recipe.data.group_by)
    source = fetch(recipe.model, recipe.revision)
    template = recipe.data.chat_template
    if adapter_path is not None:
        template = template or adapter.check(adapter_path).get("chat_template")
    config_json = model.check(source)
    tokenizer, template = load_for_rows(source, config_json, template)
    limit = Limit.of(recipe.train.max_seq_length, model.context_length(config_json))
    rendered = render(rows, inner(tokenizer), tokenizer.eos_token_ids, recipe.data, limit)
    if not rendered.samples:
        raise DataError(f"has no row to score: {rendered.losses}", where=file, hint="raise --max-seq-length")
    labels = labelset.find(known, recipe.evaluate, inner(tokenizer), tokenizer.eos_token_ids, recipe.data)
    refuse_impossible(rendered.samples, recipe.evaluate, labels)
    lm = model.load(source, chat_template=template)
    if adapter_path is not None:
        adapter.load(lm, adapter_path)
    with display.phases() as on_row:
        done = evaluate(
            lm,
            rendered.samples,
            recipe.evaluate,
            label_set=labels,
            groups=groups,
            adapter_path=adapter_path,
            on_row=on_row,
        )
    if rendered.losses:
        display.warn(f"rows: {rendered.losses}")
    if out is not None:
        write(done, out, out.with_suffix(".jsonl"))
    if as_json:
        value = {"model": recipe.model, "n": done.n, "scores": [score.to_dict() for score in done.scores]}
        display.result_json({**value, "tables": done.tables, "cost": done.cost})
        return
    _show_scores(done.scores)
    _show_tables(done)


def _groups(rows: Sequence[Any], column: str | None) -> dict[str, str] | None:
    """The group of each row by its place."""
    if column is None:
        return None
    groups = {row.where: str(row.value[column]) for row, _ in rows if column in row.value}
    if not groups:
        raise DataError(f"has no column `{column}`", where="data.group_by", hint="name one of the file that is scored")
    return groups


def _of_choices(recipe: Recipe, adapter_path: Path | None, file: Path, out: Path | None, as_json: bool) -> None:
    from mlxtune.data.files import resolve
    from mlxtune.evaluation import multiple_choice

    questions = multiple_choice.read(resolve(str(file)))
    lm = _loaded(recipe, adapter_path)
    with display.phases() as on_row:
        done = multiple_choice.measure(lm, questions, lambda at, total: on_row("choices", at, total))
    _finish(recipe, adapter_path, done.scores, out, as_json)


def _of_tasks(
    recipe: Recipe,
    adapter_path: Path | None,
    names: str,
    folder: Path | None,
    few_shot: int | None,
    limit: int | None,
    out: Path | None,
    as_json: bool,
) -> None:
    from mlxtune.evaluation import tasks

    wanted = [name.strip() for name in names.split(",") if name.strip()]
    tasks.check(wanted, folder)
    lm = _loaded(recipe, adapter_path)
    with display.phases() as on_row:
        scores = tasks.measure(
            lm,
            wanted,
            folder=folder,
            few_shot=few_shot,
            limit=limit,
            batch_size=recipe.evaluate.batch_size,
            on_row=on_row,
        )
    _finish(recipe, adapter_path, scores, out, as_json)


def _loaded(recipe: Recipe, adapter_path: Path | None) -> Any:
    """The model, with its adapter."""
    from mlxtune import adapter, model

    source = fetch(recipe.model, recipe.revision)
    if adapter_path is not None:
        adapter.check(adapter_path)
    lm = model.load(source, chat_template=recipe.data.chat_template)
    if adapter_path is not None:
        adapter.load(lm, adapter_path)
    return lm


def _finish(
    recipe: Recipe, adapter_path: Path | None, scores: Sequence[Score], out: Path | None, as_json: bool
) -> None:
    """Writes and shows scores that have no predictions."""
    from mlxtune.rundir import write_json

    value = {"model": recipe.model, "scores": [score.to_dict() for score in scores]}
    if out is not None:
        write_json(out, {**value, "adapter": str(adapter_path) if adapter_path is not None else None})
    if as_json:
        display.result_json(value)
    else:
        _show_scores(scores)


def _show_scores(scores: Sequence[Score]) -> None:
    named = [words.metric_name(each.metric).removeprefix("held-out ") for each in scores]  # any file can be scored
    display.table(
        ["score", "value", "95 % interval", "rows"],
        [
            [name, words.value(each), words.interval(each), f"{each.n}"]
            for name, each in zip(named, scores, strict=True)
        ],
    )


def _show_tables(done: "Evaluation") -> None:
    """The classes, what they are taken for, and when the model may answer alone."""
    classes = done.tables.get("classes", [])
    if classes:
        display.result()
        counts = done.tables["confusion"]
        display.table(
            ["label", "precision", "recall", "F1", "rows", "mostly taken for"],
            [
                [display.harmless(each["label"]), *(f"{each[name]:.2f}" for name in ("precision", "recall", "f1")),
                 f"{each['support']}", display.harmless(_taken_for(each["label"], counts))]
                for each in classes[:MOST_CLASSES]
            ],
        )  # fmt: skip
    if len(classes) > MOST_CLASSES:
        display.note(f"  and {len(classes) - MOST_CLASSES} more labels; --out FILE has them all")
    found = done.tables.get("coverage")
    if found is not None:
        display.result()
        display.result(words.coverage_words(found))


def _taken_for(label: str, table: dict[str, Any]) -> str:
    """The label that is most often given in place of one, and how often."""
    line = table["labels"].index(label)
    wrong = [(count, name) for count, name in zip(table["counts"][line], [*table["labels"], "(other)"], strict=True)]
    del wrong[line]
    count, name = max(wrong, key=lambda each: each[0])
    return f"{name} ({count})" if count else ""
