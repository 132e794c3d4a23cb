"""`mlxtune fuse`: base and adapter in one model."""

from pathlib import Path

import click

from mlxtune.cli import display
from mlxtune.cli.fetch import fetch
from mlxtune.report import words


@click.command("fuse", short_help="fuse an adapter into its base")
@click.option("--model", "model_name", required=True, metavar="TEXT", help="the base: a folder, a hub id, or `tiny`")
@click.option("--revision", metavar="TEXT", help="branch, tag or commit of a hub id")
@click.option("--adapter-path", required=True, type=click.Path(path_type=Path), metavar="DIR", help="adapter to fuse")
@click.option("--save-path", required=True, type=click.Path(path_type=Path), metavar="DIR", help="folder to write")
@click.option("--q-bits", type=int, metavar="N", help="bits of the fused layers  [as the base]")
@click.option("--dequantize", is_flag=True, help="write full-precision weights")
@click.option("--data", type=click.Path(path_type=Path), metavar="FILE", help="rows to check with  [the run's own]")
@click.option("--keep", type=click.FloatRange(0, 1), metavar="X", help="least share of the gain to keep  [0.9]")
@click.option("--json", "as_json", is_flag=True, help="print the figures as JSON")
def command(
    model_name: str,
    revision: str | None,
    adapter_path: Path,
    save_path: Path,
    q_bits: int | None,
    dequantize: bool,
    data: Path | None,
    keep: float | None,
    as_json: bool,
) -> None:
    """Fuse an adapter into its base, and measure on held-out rows how much of what it learned is kept.

    The rows are the validation rows of the run that the adapter lies in, or those of --data. When less than 90 % of
    the gain would survive, nothing is written.

    \b
    Example:
      mlxtune fuse --model tiny --adapter-path runs/tickets/adapter --save-path tiny-tickets
    """
    from dataclasses import asdict

    from mlxtune import adapter, model, recipe
    from mlxtune.data import load
    from mlxtune.data.render import Limit, render
    from mlxtune.fuse import fuse
    from mlxtune.rundir import RunDir, refuse_existing
    from mlxtune.tokenizer import inner, load_for_rows

    values = {"bits": q_bits, "dequantize": dequantize} | ({"keep": keep} if keep is not None else {})
    run = RunDir(adapter_path.resolve().parent)
    base = recipe.load(run.recipe) if run.recipe.is_file() else recipe.Recipe()
    settings = recipe.build({"fuse": values}, where="command line").fuse
    refuse_existing(save_path, "--save-path")
    template = adapter.check(adapter_path).get("chat_template")
    source = fetch(model_name, revision)
    config = model.check(source)
    tokenizer, _ = load_for_rows(source, config, template)
    if data is not None:
        rows = load.read_examples(data, base.data)
    else:
        rows = load.read_split(run.data, "valid") if (run.data / "valid.jsonl").is_file() else []
    limit = Limit.of(base.train.max_seq_length, model.context_length(config))
    rendered = render(rows, inner(tokenizer), tokenizer.eos_token_ids, base.data, limit)
    done = fuse(source, adapter_path, save_path, settings, rendered.samples)
    if not rendered.samples:
        display.warn("what was kept is not checked: the adapter has no run with validation rows; give --data FILE")
    if as_json:
        display.result_json(asdict(done))
        return
    kept = f", kept {done.kept:.1%} of the gain on {done.rows} rows" if done.kept is not None else ""
    display.note(f"{display.count(done.layers, 'layer')} fused, {words.size(done.bytes)}{kept}")
    display.result(str(save_path))
