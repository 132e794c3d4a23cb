"""`mlxtune run`: a recipe to a verified model."""

from pathlib import Path
from typing import Any

import click

from mlxtune.cli import display
from mlxtune.cli.flags import build_recipe, recipe_flags
from mlxtune.cli.stages import run_stages


@click.command("run", short_help="recipe to verified model")
@click.argument("recipe_file", metavar="RECIPE", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), metavar="RUN", help="run folder  [runs/<name of the recipe>]")
@click.option("--json", "as_json", is_flag=True, help="print the report as JSON")
@recipe_flags("model", "revision", "seed", "data", "quantize", "lora", "train", "fuse")
def command(recipe_file: Path, out: Path | None, as_json: bool, sets: tuple[str, ...], **flags: Any) -> None:
    """Do all that RECIPE asks for: audit, split, convert, quantize, evaluate, train, fuse, evaluate again, report.

    Run it again and it goes on where it stopped; what is done is skipped.

    \b
    Example:
      mlxtune run configs/quickstart.yaml
      mlxtune run my.yaml --out runs/rank8 --set lora.rank=8
    """
    recipe = build_recipe(recipe_file, flags, sets)
    report = run_stages(recipe, out or Path("runs") / recipe_file.stem)
    if as_json:
        display.result_json(report)
        return
    from mlxtune.cli.report import show

    show(report)
