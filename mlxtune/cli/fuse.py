"""`mlxtune fuse`: base and adapter in one model."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlxtune.cli import display
from mlxtune.cli.fetch import fetch
from mlxtune.errors import FuseError, InputError
from mlxtune.report import words

if TYPE_CHECKING:
    from mlxtune.fuse import Fused
    from mlxtune.fusing.assembly import Way
    from mlxtune.fusing.blend import Part
    from mlxtune.fusing.strength import Sweep

BAR = 24  # characters


@click.command("fuse", short_help="fuse an adapter into its base")
@click.option("--model", "model_name", required=True, metavar="TEXT", help="the base: a folder, a hub id, or `tiny`")
@click.option("--revision", metavar="TEXT", help="branch, tag or commit of a hub id")
@click.option(
    "--adapter-path",
    "adapters",
    required=True,
    multiple=True,
    metavar="DIR[=WEIGHT]",
    help="adapter to fuse; may be repeated",
)
@click.option("--save-path", type=click.Path(path_type=Path), metavar="DIR", help="folder to write")
@click.option("--scale", type=click.FloatRange(0, 4), metavar="X", help="strength of what the adapter adds  [1.0]")
@click.option("--sweep-scale", is_flag=True, help="measure strengths; with --save-path, fuse at the best of them")
@click.option("--plot", type=click.Path(path_type=Path), metavar="FILE", help="the strengths as an SVG picture")
@click.option("--anchor", metavar="FILE", help="text that shows what a strength forgets  [the run's own]")
@click.option("--base", "original", metavar="TEXT", help="the model that a quantized --model was made of: fuse into it")
@click.option("--q-bits", type=int, metavar="N", help="bits of the fused layers  [as the base]")
@click.option("--dequantize", is_flag=True, help="write full-precision weights")
@click.option(
    "--max-bpw", type=float, metavar="X", help="bits per weight at most, for layers that lose too much  [+0.5]"
)
@click.option("--data", type=click.Path(path_type=Path), metavar="FILE", help="rows to check with  [the run's own]")
@click.option(
    "--train-data",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="rows to fit packed layers to  [the run's own]",
)
@click.option("--keep", type=click.FloatRange(0, 1), metavar="X", help="least share of the gain to keep  [0.9]")
@click.option("--accept-loss", is_flag=True, help="write the model even if it keeps less")
@click.option("--json", "as_json", is_flag=True, help="print the figures as JSON")
def command(
    model_name: str,
    revision: str | None,
    adapters: tuple[str, ...],
    save_path: Path | None,
    scale: float | None,
    sweep_scale: bool,
    plot: Path | None,
    anchor: str | None,
    original: str | None,
    q_bits: int | None,
    dequantize: bool,
    max_bpw: float | None,
    data: Path | None,
    train_data: Path | None,
    keep: float | None,
    accept_loss: bool,
    as_json: bool,
) -> None:
    """Fuse an adapter into its base, and measure on held-out rows how much of what it learned is kept.

    Layers of a quantized base are packed again so that their outputs on the training rows change least. The rows are
    the training and validation rows of the run that the adapter lies in. Where less than 95 % of the gain would
    survive, the worst layers get more bits; below 90 % nothing is written. Several adapters of one base are added:
    --adapter-path A=0.7 --adapter-path B=0.3.

    \b
    Example:
      mlxtune fuse --model tiny --adapter-path runs/tickets/adapter --save-path tiny-tickets
      mlxtune fuse --model tiny --adapter-path runs/tickets/adapter --sweep-scale
    """
    from dataclasses import asdict, replace

    from mlxtune import model, recipe
    from mlxtune.data import load
    from mlxtune.data.render import Limit, Sample, render
    from mlxtune.fuse import fuse
    from mlxtune.fusing import blend
    from mlxtune.fusing.assembly import ways_out
    from mlxtune.fusing.strength import sweep
    from mlxtune.rundir import RunDir, refuse_existing
    from mlxtune.tokenizer import inner, load_for_rows

    parts = [_part(text) for text in adapters]
    given: dict[str, Any] = {
        "bits": q_bits,
        "dequantize": dequantize,
        "accept_loss": accept_loss,
        "original": original is not None,
    }
    given |= {
        name: value for name, value in (("keep", keep), ("scale", scale), ("max_bpw", max_bpw)) if value is not None
    }
    settings = recipe.build({"fuse": given}, where="command line").fuse
    run = RunDir(parts[0].path.resolve().parent)
    base = recipe.load(run.recipe) if run.recipe.is_file() else recipe.Recipe()
    if save_path is not None:
        refuse_existing(save_path, "--save-path")
    elif not sweep_scale:
        raise InputError("names no folder to write", where="--save-path", hint="give one, or --sweep-scale")
    if sweep_scale and scale is not None:
        raise InputError("is what --sweep-scale chooses", where="--scale", hint="give one of them")
    for flag, given_one in (("--anchor", anchor), ("--plot", plot)):
        if given_one is not None and not sweep_scale:
            raise InputError("is of use with --sweep-scale only", where=flag, hint="leave it out")
    if plot is not None:
        refuse_existing(plot, "--plot")
    template = blend.check(parts).get("chat_template")
    source = fetch(model_name, revision)
    config = model.check(source)
    tokenizer, _ = load_for_rows(source, config, template)
    limit = Limit.of(base.train.max_seq_length, model.context_length(config))

    def samples(given: Path | None, split: str) -> list[Sample]:
        if given is not None:
            rows = load.read_examples(given, base.data)
        else:
            rows = load.read_split(run.data, split) if (run.data / f"{split}.jsonl").is_file() else []
        return render(rows, inner(tokenizer), tokenizer.eos_token_ids, base.data, limit).samples

    held_out = samples(data, "valid")
    if sweep_scale:
        text = anchor or base.train.anchor
        with display.phases() as show:
            swept = sweep(source, parts, held_out, text, on_scale=lambda done, total: show("strengths", done, total))
        settings = replace(settings, scale=swept.chosen)
        if plot is not None:
            _draw(swept, plot)
        if save_path is None or not as_json:
            _show(swept, as_json=as_json)
    if save_path is None:
        return
    packs = not dequantize and ("quantization" in config or q_bits is not None)
    if train_data is not None and not packs:
        raise InputError("is of use where layers are packed only", where="--train-data", hint="leave it out")
    training = samples(train_data, "train") if packs else []
    whole = fetch(original, None) if original is not None else None
    try:
        with display.phases() as show:
            done = fuse(source, parts, save_path, settings, held_out, training, whole, on_phase=show)
    except FuseError:
        _show_ways(ways_out(source, parts, settings))
        raise
    if not held_out:
        display.warn("what was kept is not checked: the adapter has no run with validation rows; give --data FILE")
    if as_json:
        display.result_json(asdict(done) | ({"sweep": swept.to_dict()} if sweep_scale else {}))
        return
    display.note(_summary(done))
    display.result(str(save_path))


def _part(text: str) -> "Part":
    """`DIR`, or `DIR=WEIGHT` where no folder is called so."""
    from mlxtune.fusing.blend import Part

    folder, equals, weight = text.rpartition("=")
    if not equals or Path(text).exists():
        return Part(Path(text))
    try:
        value = float(weight)
    except ValueError:
        return Part(Path(text))
    if not -4 <= value <= 4:
        raise InputError(f"has the weight {weight}", where=f"--adapter-path {folder}", hint="give one from -4 to 4")
    return Part(Path(folder), value)


def _summary(done: "Fused") -> str:
    kept = f", kept {done.kept:.1%} of the gain on {done.rows} rows" if done.kept is not None else ""
    raised = f", {display.count(len(done.raised), 'layer')} with more bits" if done.raised else ""
    return f"{display.count(done.layers, 'layer')} fused, {words.size(done.bytes)}{raised}{kept}"


def _show(swept: "Sweep", *, as_json: bool) -> None:
    """The strengths as a table whose bars are the gains, the chosen one marked."""
    if as_json:
        display.result_json(swept.to_dict())
        return
    most = max(max(point.gain for point in swept.points), 1e-9)
    with_text = swept.points[0].anchor_loss is not None
    rows = []
    for point in swept.points:
        bar = "█" * round(BAR * max(0.0, point.gain) / most)
        scale = f"{point.scale:g}{' ←' if point.scale == swept.chosen else ''}"
        text = [f"{point.anchor_loss:.4f}", f"{point.forgotten:+.4f}"] if with_text else []
        rows.append([scale, f"{point.loss:.4f}", f"{point.gain:+.4f}", *text, bar.ljust(BAR)])
    headings = ["scale", "loss", "gain", *(["anchor loss", "forgotten"] if with_text else []), "gain".ljust(BAR)]
    display.table(headings, rows)
    display.note(f"nats per token on {display.count(swept.rows, 'row')}; best: --scale {swept.chosen:g}")


def _draw(swept: "Sweep", file: Path) -> None:
    from mlxtune.report import chart
    from mlxtune.rundir import write_text

    points = [(point.scale, point.gain, point.forgotten) for point in swept.points]
    write_text(file, chart.picture(chart.strengths(points, swept.chosen)))


def _show_ways(ways: "list[Way]") -> None:
    """Ways to keep more, beside the error that says why they are needed."""
    for way in ways:
        display.note(f"  {way.flag:<16}{words.size(way.bytes):>10}  {way.bits_per_weight:5.2f} bits per weight")
