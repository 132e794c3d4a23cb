"""`mlxtune convert`: a Hugging Face model to an MLX folder."""

from pathlib import Path
from typing import Any

import click

from mlxtune.cli import display
from mlxtune.cli.fetch import fetch
from mlxtune.cli.flags import build_recipe, recipe_flags
from mlxtune.report import words

DTYPES = ("float32", "float16", "bfloat16")


@click.command("convert", short_help="Hugging Face model to an MLX folder")
@click.argument("model_name", metavar="MODEL")
@click.option("--mlx-path", required=True, type=click.Path(path_type=Path), metavar="DIR", help="folder to write")
@click.option("-q", "--quantize", is_flag=True, help="quantize the weights")
@click.option("--dtype", type=click.Choice(DTYPES), help="cast the weights that are not quantized  [as stored]")
@click.option("--json", "as_json", is_flag=True, help="print what was done as JSON")
@recipe_flags("revision", "quantize")
def command(
    model_name: str,
    mlx_path: Path,
    quantize: bool,
    dtype: str | None,
    as_json: bool,
    sets: tuple[str, ...],
    **flags: Any,
) -> None:
    """Convert MODEL, a folder or a hub id, to an MLX folder that plain mlx-lm loads too.

    \b
    Example:
      mlxtune convert Qwen/Qwen2.5-0.5B-Instruct --mlx-path qwen-4bit -q --q-bits 4
    """
    run(model_name, mlx_path, quantize, dtype, as_json, sets, flags)


def run(
    model_name: str,
    mlx_path: Path,
    quantize: bool,
    dtype: str | None,
    as_json: bool,
    sets: tuple[str, ...],
    flags: dict[str, Any],
) -> None:
    """What `convert` and `quantize` do."""
    given = [name for name, value in flags.items() if value is not None and "quantize__" in name]
    if given and not quantize:
        flag = f"--q-{given[0].rsplit('__', 1)[-1].replace('_', '-')}"
        raise click.UsageError(f"{flag} has no effect without -q")
    recipe = build_recipe(None, flags, (*(["quantize.method=rtn"] if quantize else []), *sets))
    from mlxtune.convert import convert
    from mlxtune.rundir import refuse_existing

    refuse_existing(mlx_path, "--mlx-path")
    done = convert(fetch(model_name, recipe.revision), mlx_path, quantize=recipe.quantize, dtype=dtype)
    for name, reason in done.left_out.items():
        display.warn(f"{name} stays in full precision: {reason}")
    if as_json:
        display.result_json(
            {
                "path": str(done.path),
                "parameters": done.parameters,
                "dtype": done.dtype,
                "bits_per_weight": done.bits_per_weight,
                "bytes_before": done.bytes_before,
                "bytes_after": done.bytes_after,
                "quantized_layers": done.quantized_layers,
                "left_out": done.left_out,
            }
        )
        return
    display.note(
        f"{display.count(done.parameters, 'parameter')}, {words.size(done.bytes_before)} → "
        f"{words.size(done.bytes_after)}, {done.bits_per_weight:.2f} bits per weight"
    )
    display.result(str(done.path))
