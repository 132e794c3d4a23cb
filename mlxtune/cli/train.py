"""`mlxtune train`: an adapter from a model and examples."""

from pathlib import Path
from typing import Any

import click

from mlxtune.cli import display
from mlxtune.cli.flags import build_recipe, config_flag, recipe_flags
from mlxtune.cli.stages import run_stages


@click.command("train", short_help="fine-tune a model with LoRA")
@config_flag
@click.option("--out", type=click.Path(path_type=Path), metavar="RUN", help="run folder  [runs/<name of the data>]")
@click.option("--json", "as_json", is_flag=True, help="print the training figures as JSON")
@click.option("--train", is_flag=True, hidden=True, help="mlx-lm's switch; training is all that this command does")
@recipe_flags("model", "revision", "seed", "data", "quantize", "lora", "train")
def command(
    config: Path | None, out: Path | None, as_json: bool, train: bool, sets: tuple[str, ...], **flags: Any
) -> None:
    """Fine-tune a model with LoRA and leave RUN/adapter, the best adapter by validation loss.

    The data is one file, which is split, or a folder of train, valid and test files. Ctrl-C saves a checkpoint;
    the same command goes on from it.

    \b
    Example:
      mlxtune train --model tiny --data tickets --out runs/tickets --epochs 2 --learning-rate 2e-3
    """
    recipe = build_recipe(config, flags, sets)
    from mlxtune.pipeline import TRAIN_STAGES

    folder = out or Path("runs") / Path(recipe.data.path or "train").resolve().stem
    report = run_stages(recipe, folder, TRAIN_STAGES)
    if as_json:
        display.result_json({"training": report["training"], "paths": report["paths"]})
    else:
        display.result(f"{folder / 'adapter'}")
