"""`mlxtune convert`: a Hugging Face model to an MLX folder."""

import contextlib
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlxtune.cli import display
from mlxtune.cli.fetch import fetch
from mlxtune.cli.flags import build_recipe, recipe_flags
from mlxtune.recipe import Recipe
from mlxtune.recipe.settings import CALIBRATED
from mlxtune.report import words

if TYPE_CHECKING:
    from mlxtune.convert import Converted
    from mlxtune.data.render import Sample
    from mlxtune.fidelity import Fidelity
    from mlxtune.layers import Layer

DTYPES = ("float32", "float16", "bfloat16")


@click.command("convert", short_help="Hugging Face model to an MLX folder")
@click.argument("model_name", metavar="MODEL")
@click.option("--mlx-path", required=True, type=click.Path(path_type=Path), metavar="DIR", help="folder to write")
@click.option("-q", "--quantize", is_flag=True, help="quantize the weights")
@click.option("--dtype", type=click.Choice(DTYPES), help="cast the weights that are not quantized  [as stored]")
@click.option("--json", "as_json", is_flag=True, help="print what was done as JSON")
@recipe_flags("revision", "quantize", "data.path")
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
    recipe = build_recipe(None, flags, (*(["quantize={}"] if quantize else []), *sets))
    source, samples = prepared(model_name, mlx_path, recipe)
    from mlxtune.convert import convert

    with writing("convert") as on_bytes:
        done = convert(source, mlx_path, quantize=recipe.quantize, dtype=dtype, samples=samples, on_bytes=on_bytes)
    show(done, as_json)


def prepared(model_name: str, mlx_path: Path, recipe: Recipe) -> "tuple[Path, list[Sample]]":
    """The folder of the model, and rows for a method that looks at them, when all that can be refused is known."""
    check_data(recipe)
    from mlxtune.rundir import refuse_existing

    refuse_existing(mlx_path, "--mlx-path")
    source = fetch(model_name, recipe.revision)
    return source, seen(source, recipe)


def check_data(recipe: Recipe) -> None:
    """Refuses rows for a method that looks at none."""
    if recipe.data.path is not None and (recipe.quantize is None or recipe.quantize.method not in CALIBRATED):
        raise click.UsageError(f"--data has no effect; it is for --q-method {', '.join(CALIBRATED)}")


def seen(source: Path, recipe: Recipe) -> "list[Sample]":
    """Rows for a method that looks at them: the user's, or the model's own; none for another method."""
    if recipe.quantize is None or recipe.quantize.method not in CALIBRATED:
        return []
    return rows(source, recipe) if recipe.data.path is not None else own_rows(source, recipe)


def own_rows(source: Path, recipe: Recipe) -> "list[Sample]":
    """Rows that the model writes itself, with a note that it does."""
    from mlxtune import packs

    assert recipe.quantize is not None
    packs.check_source(source, recipe.quantize)
    display.note("no --data: the model writes the rows that show what goes into its layers")
    return packs.own_rows(source)


def rows(source: Path, recipe: Recipe) -> "list[Sample]":
    """The rows that a method looks at the layers with: the whole file, or the training rows of a folder."""
    from mlxtune import model
    from mlxtune.data import load
    from mlxtune.data.render import Limit, render
    from mlxtune.errors import DataError
    from mlxtune.tokenizer import inner, load_for_rows

    files = load.files_of(recipe.data)
    file = files.get("all") or files.get("train")
    if file is None:
        raise DataError("has no training file", where=recipe.data.path, hint="give a file of rows with --data FILE")
    config = model.check(source)
    tokenizer, _ = load_for_rows(source, config, recipe.data.chat_template)
    limit = Limit.of(recipe.train.max_seq_length, model.context_length(config))
    examples = load.read_examples(file, recipe.data)
    rendered = render(examples, inner(tokenizer), tokenizer.eos_token_ids, recipe.data, limit)
    if not rendered.samples:
        raise DataError(f"has no row to look at: {rendered.losses}", where=file)
    return list(rendered.samples)


@contextlib.contextmanager
def writing(label: str) -> Iterator[Callable[[int, int], None]]:
    """A function `(done, total)` that shows how many bytes are written, how fast, and the time left."""
    began = time.monotonic()
    shown: list[display.Progress] = []

    def update(done: int, total: int) -> None:
        if not shown:
            shown.append(display.Progress(f"{label} (MB)", total // 10**6))
            shown[0].started = began
        spent = time.monotonic() - began
        shown[0].update(done // 10**6, f"{words.size(done / spent)}/s" if spent else "")

    try:
        yield update
    finally:
        for each in shown:
            each.close()


def show(done: "Converted", as_json: bool, lost: "Fidelity | None" = None) -> None:
    """What was done, and lost: JSON; or notes, the layers where some were quantized, and the folder."""
    for (name, reason), count in Counter((_alike(layer), reason) for layer, reason in done.left_out.items()).items():
        layers = f" ({count} layers)" if count > 1 else ""
        display.warn(f"{name}{layers} {'stay' if count > 1 else 'stays'} in full precision: {reason}")
    if as_json:
        display.result_json(
            {
                "path": str(done.path),
                "parameters": done.parameters,
                "dtype": done.dtype,
                "bits_per_weight": done.bits_per_weight,
                "bytes_before": done.bytes_before,
                "bytes_after": done.bytes_after,
                "method": done.method,
                "quantized_layers": done.quantized_layers,
                "left_out": done.left_out,
                "layers": [_as_json(layer) for layer in done.layers],
            }
            | ({"lost": lost.to_dict()} if lost is not None else {})
        )
        return
    if done.layers:
        with contextlib.redirect_stdout(sys.stderr):  # the result is the folder
            display.table(["layers", "", "weights", "packed", "bits per weight"], _table(done.layers))
    display.note(
        f"{display.count(done.parameters, 'parameter')}, {words.size(done.bytes_before)} → "
        f"{words.size(done.bytes_after)}, {done.bits_per_weight:.2f} bits per weight"
        f"{f', chosen by {done.method}' if done.method is not None else ''}"
    )
    display.result(str(done.path))


def _alike(name: str) -> str:
    """A layer's name without its block's number: what is alike in all blocks is one line."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def _table(layers: "tuple[Layer, ...]") -> list[list[str]]:
    counts: Counter[tuple[str, str, str]] = Counter()
    weights: Counter[tuple[str, str, str]] = Counter()
    for layer in layers:
        packing = layer.packing
        how = "no" if packing is None else f"{packing.mode} {packing.bits} / {packing.group_size}"
        line = (_alike(layer.name), how, f"{layer.bits_per_weight:.2f}")
        counts[line] += 1
        weights[line] += layer.parameters
    return [
        [name, f"x {counts[line]}" if counts[line] > 1 else "", f"{weights[line]:,}", how, bits]
        for line in counts
        for name, how, bits in [line]
    ]


def _as_json(layer: "Layer") -> dict[str, Any]:
    packing = layer.packing.described if layer.packing is not None else {"group_size": None, "bits": None, "mode": None}
    return {
        "name": layer.name,
        "parameters": layer.parameters,
        **packing,
        "bits_per_weight": layer.bits_per_weight,
        "left_out": layer.left_out,
    }
