"""`mlxtune data convert`: examples of any format as canonical JSONL."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import click

from mlxtune.cli import display
from mlxtune.cli.flags import build_recipe, config_flag, recipe_flags


@click.command("convert", short_help="any format as canonical JSONL")
@click.argument("source", metavar="IN")
@click.argument("out", metavar="OUT", type=click.Path(path_type=Path))
@config_flag
@click.option("--json", "as_json", is_flag=True, help="print what was written as JSON")
@recipe_flags()
def command(source: str, out: Path, config: Path | None, as_json: bool, sets: tuple[str, ...]) -> None:
    """Write the rows of IN to OUT as JSONL of `messages`; plain texts stay `text`, other columns stay beside them.

    IN is a JSONL, JSON, CSV or Parquet file, a gzip of one, `-` for what is piped in, a folder of train, valid and
    test files, or a data set of the hub: org/name, org/name/config, org/name:split. Its rows are messages, ShareGPT,
    prompt and completion, Alpaca, text, or what `data.prompt` and `data.completion` say. A folder, and a data set of
    several splits, become a folder.

    \b
    Examples:
      mlxtune data convert alpaca.json tickets.jsonl
      mlxtune data convert banking.csv banking.jsonl --set data.prompt=text --set data.completion=category
      cat tickets.csv.gz | mlxtune data convert - tickets.jsonl
      mlxtune data convert HuggingFaceH4/no_robots no-robots
    """
    recipe = build_recipe(config, {}, sets)
    from mlxtune.data.canonical import Source, convert
    from mlxtune.data.fetch import fetch
    from mlxtune.data.files import is_hub_name, read_rows
    from mlxtune.data.load import files_of
    from mlxtune.rundir import refuse_existing

    refuse_existing(out, "OUT")
    data = replace(recipe.data, path=source)
    sources: dict[str, Source]
    if is_hub_name(source) and not Path(source).exists():
        fetched = fetch(source)
        sources = {split: partial(list, rows) for split, rows in fetched.items()}
    else:
        sources = {split: partial(read_rows, path) for split, path in files_of(data).items()}
    with display.phases() as on_row:
        done = convert(sources, data, out, on_row)
    rows, left_out = sum(each.rows for each in done), sum(each.left_out for each in done)
    if as_json:
        files = [
            {"split": each.split, "path": str(each.path), "rows": each.rows, "left_out": each.left_out} for each in done
        ]
        display.result_json({"out": str(out), "rows": rows, "left_out": left_out, "files": files})
        return
    without = f"; {left_out:,} left out by data.keep" if left_out else ""
    splits = "" if len(done) == 1 else f" ({' · '.join(f'{each.split} {each.rows:,}' for each in done)})"
    display.note(f"{display.count(rows, 'row')}{splits}{without}")
    display.result(str(out))
