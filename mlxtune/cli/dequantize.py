"""`mlxtune dequantize`: a quantized model with dense weights of the same values."""

from pathlib import Path

import click

from mlxtune.cli import convert
from mlxtune.cli.fetch import fetch


@click.command("dequantize", short_help="dense weights of a quantized model")
@click.argument("model_name", metavar="MODEL")
@click.option("--mlx-path", required=True, type=click.Path(path_type=Path), metavar="DIR", help="folder to write")
@click.option("--dtype", type=click.Choice(convert.DTYPES), help="what the weights are cast to  [as their scales]")
@click.option("--revision", metavar="TEXT", help="branch, tag or commit of a hub id")
@click.option("--json", "as_json", is_flag=True, help="print what was done as JSON")
def command(model_name: str, mlx_path: Path, dtype: str | None, revision: str | None, as_json: bool) -> None:
    """Write MODEL, a folder or a hub id, with dense weights of the values that its quantized ones stand for.

    What quantizing lost does not come back.

    \b
    Example:
      mlxtune dequantize tiny-8bit --mlx-path tiny-dense
    """
    from mlxtune.convert import dequantize
    from mlxtune.rundir import refuse_existing

    refuse_existing(mlx_path, "--mlx-path")
    source = fetch(model_name, revision)
    with convert.writing("dequantize") as on_bytes:
        done = dequantize(source, mlx_path, dtype=dtype, on_bytes=on_bytes)
    convert.show(done, as_json)
