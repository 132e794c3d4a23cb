"""`mlxtune quantize`: a smaller copy of a model."""

from pathlib import Path
from typing import Any

import click

from mlxtune.cli import convert
from mlxtune.cli.flags import recipe_flags


@click.command("quantize", short_help="quantize a model")
@click.argument("model_name", metavar="MODEL")
@click.option("--mlx-path", required=True, type=click.Path(path_type=Path), metavar="DIR", help="folder to write")
@click.option("--json", "as_json", is_flag=True, help="print what was done as JSON")
@recipe_flags("revision", "quantize")
def command(model_name: str, mlx_path: Path, as_json: bool, sets: tuple[str, ...], **flags: Any) -> None:
    """Quantize MODEL, a folder or a hub id, and say which layers stay in full precision.

    \b
    Example:
      mlxtune quantize tiny --mlx-path tiny-8bit --q-bits 8
    """
    convert.run(model_name, mlx_path, True, None, as_json, sets, flags)
