"""`mlxtune evaluate`: scores over every row of a file."""

from pathlib import Path
from typing import Any

import click

from mlxtune.cli import display
from mlxtune.cli.fetch import fetch
from mlxtune.cli.flags import build_recipe, config_flag, recipe_flags
from mlxtune.report import words


@click.command("evaluate", short_help="score a model on every row of a file")
@config_flag
@click.option("--adapter-path", type=click.Path(path_type=Path), metavar="DIR", help="adapter to evaluate with")
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE", help="write scores and every prediction there")
@click.option("--json", "as_json", is_flag=True, help="print the scores as JSON")
@recipe_flags("model", "revision", "data.path", "data.mask_prompt", "train.max_seq_length")
def command(
    config: Path | None,
    adapter_path: Path | None,
    out: Path | None,
    as_json: bool,
    sets: tuple[str, ...],
    **flags: Any,
) -> None:
    """Score a model on every row: loss per supervised token, perplexity, exact match of greedy answers.

    Each score has its 95 % interval. With a folder of splits, its test file is scored. `evaluate.label` in a recipe
    adds the accuracy of a label inside the answers.

    \b
    Example:
      mlxtune evaluate --model tiny --adapter-path runs/tickets/adapter --data runs/tickets/data/test.jsonl
    """
    recipe = build_recipe(config, flags, sets)
    from mlxtune import adapter, model
    from mlxtune.data import load
    from mlxtune.data.render import Limit, render
    from mlxtune.errors import DataError
    from mlxtune.evaluate import evaluate
    from mlxtune.rundir import refuse_existing, write_json
    from mlxtune.tokenizer import inner, load_for_rows

    files = load.files_of(recipe.data)
    file = files.get("all") or files.get("test")
    if file is None:
        raise DataError("has no test file", where=recipe.data.path, hint="give the file to score with --data FILE")
    rows = load.read_examples(file, recipe.data)
    if out is not None:
        refuse_existing(out, "--out")
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
    lm = model.load(source, chat_template=template)
    if adapter_path is not None:
        adapter.load(lm, adapter_path)
    with display.phases() as on_row:
        done = evaluate(lm, rendered.samples, recipe.evaluate, adapter_path=adapter_path, on_row=on_row)
    if rendered.losses:
        display.warn(f"rows: {rendered.losses}")
    if out is not None:
        write_json(out, done.to_dict())
    if as_json:
        display.result_json({"model": recipe.model, "n": done.n, "scores": [score.to_dict() for score in done.scores]})
        return
    display.table(
        ["score", "value", "95 % interval", "rows"],
        [
            [
                score.metric.replace("_", " "),
                words.value(score),
                words.interval(score),
                f"{score.n}",
            ]
            for score in done.scores
        ],
    )
