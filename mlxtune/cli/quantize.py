"""`mlxtune quantize`: a smaller copy of a model, within a size if asked, and what it lost."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlxtune.cli import convert, display, fidelity
from mlxtune.cli.fetch import fetch
from mlxtune.cli.flags import build_recipe, recipe_flags
from mlxtune.recipe import Recipe, check_quantization
from mlxtune.report.words import size

if TYPE_CHECKING:
    from mlxtune.fidelity import Fidelity
    from mlxtune.quant.packing import Packing

COSTS = "costs.json"


@click.command("quantize", short_help="quantize a model")
@click.argument("model_name", metavar="MODEL")
@click.option("--mlx-path", type=click.Path(path_type=Path), metavar="DIR", help="folder to write")
@click.option("--target-bpw", type=click.FloatRange(1, 16), metavar="X", help="bits per weight of the whole model")
@click.option("--target-size", metavar="SIZE", help="size of the whole model: 600MB, 2.5GB")
@click.option("--costs", type=click.Path(path_type=Path), metavar="FILE", help=f"{COSTS} of an earlier target")
@click.option("--report", is_flag=True, help="compare the copy with the source on a text")
@click.option("--sweep", callback=fidelity.widths, metavar="BITS,…", help="compare several widths; nothing is written")
@click.option("--plot", type=click.Path(path_type=Path), metavar="FILE", help="the sweep as an SVG picture")
@click.option("--text", metavar="FILE", help="what is read to compare: .txt, .md or rows  [the embedded tickets]")
@click.option("--json", "as_json", is_flag=True, help="print what was done as JSON")
@recipe_flags("revision", "quantize", "data.path")
def command(
    model_name: str,
    mlx_path: Path | None,
    target_bpw: float | None,
    target_size: str | None,
    costs: Path | None,
    report: bool,
    sweep: list[int],
    plot: Path | None,
    text: str | None,
    as_json: bool,
    sets: tuple[str, ...],
    **flags: Any,
) -> None:
    """Quantize MODEL, a folder or a hub id, and say which layers stay in full precision.

    With --target-bpw or --target-size each layer gets bits of its own: first it is measured what each layer's cost in
    KL divergence is, then bits go where they save most. --report and --sweep compare with MODEL on a text.

    \b
    Example:
      mlxtune quantize tiny --mlx-path tiny-8bit --q-bits 8 --report
      mlxtune quantize tiny --mlx-path tiny-small --target-bpw 4.5
      mlxtune quantize tiny --sweep 2,3,4,6,8 --plot kl.svg
    """
    targets = target_bpw is not None or target_size is not None
    _check_usage(mlx_path, target_bpw, target_size, costs, report, sweep, plot, text, flags, sets)
    recipe = build_recipe(None, flags, ("quantize={}", *sets))
    spec = recipe.quantize
    assert spec is not None
    if targets and spec.mode != "affine":
        raise click.UsageError("a target takes --q-mode affine, the only one with several widths")
    if targets and spec.method == "awq":
        raise click.UsageError("a target gives each layer its own bits, and --q-method awq packs all alike: use gptq")
    if sweep:
        _sweep(model_name, recipe, sweep, plot, text, as_json)
        return
    assert mlx_path is not None
    source, samples = convert.prepared(model_name, mlx_path, recipe)
    packings: dict[str, Packing] | None = None
    beside: dict[str, Any] = {}
    if targets:
        bits = target_bpw if target_bpw is not None else _bits_per_weight(source, target_size or "")
        packings, beside[COSTS] = _allotted(source, recipe, bits, costs, text)
    with convert.writing("quantize") as on_bytes:
        from mlxtune.convert import convert as write

        done = write(
            source,
            mlx_path,
            quantize=spec,
            samples=samples,
            packings=packings,
            beside=beside,
            on_bytes=on_bytes,
        )
    lost = _report(source, mlx_path, text) if report else None
    convert.show(done, as_json, lost)
    if lost is not None and not as_json:
        fidelity.show([lost])


def _check_usage(
    mlx_path: Path | None,
    target_bpw: float | None,
    target_size: str | None,
    costs: Path | None,
    report: bool,
    sweep: list[int],
    plot: Path | None,
    text: str | None,
    flags: dict[str, Any],
    sets: tuple[str, ...],
) -> None:
    """Refuses what has no effect, or two ways at once."""
    targets = target_bpw is not None or target_size is not None
    if sweep and (mlx_path is not None or targets or report):
        raise click.UsageError("--sweep writes no model: leave --mlx-path, --target-… and --report out")
    if not sweep and mlx_path is None:
        raise click.UsageError("Missing option '--mlx-path'.")
    if target_bpw is not None and target_size is not None:
        raise click.UsageError("give --target-bpw or --target-size, not both")
    if costs is not None and not targets:
        raise click.UsageError("--costs has no effect without --target-bpw or --target-size")
    if plot is not None and not sweep:
        raise click.UsageError("--plot has no effect without --sweep")
    if text is not None and not (sweep or report or (targets and costs is None)):
        raise click.UsageError("--text has no effect without --report, --sweep or a target to measure for")
    given = {name.rpartition("quantize__")[2]: value for name, value in flags.items() if value is not None}
    if (sweep or targets) and ("bits" in given or any(each.startswith("quantize.bits=") for each in sets)):
        raise click.UsageError("--q-bits has no effect beside --sweep or a target")


def _bits_per_weight(source: Path, text: str) -> float:
    """Bits per weight of a model that takes a size such as `2.5GB`."""
    from mlxtune import model, precision

    units = {"kb": 1e3, "mb": 1e6, "gb": 1e9}
    number, unit = text[:-2], text[-2:].lower()
    try:
        wanted = float(number) * units[unit]
    except (KeyError, ValueError):
        raise click.UsageError(f"--target-size {text!r} is no size such as 600MB or 2.5GB") from None
    net, _ = model.outline(source)
    return 8 * wanted / precision.parameter_count(net)


def _allotted(
    source: Path, recipe: Recipe, bits: float, costs: Path | None, text: str | None
) -> "tuple[dict[str, Packing], dict[str, Any]]":
    """Packings within so many bits per weight, and what the layers cost, as JSON holds it."""
    from mlxtune import allotment, model
    from mlxtune.fidelity import EMBEDDED, read_text

    assert recipe.quantize is not None
    known = allotment.read_costs(costs) if costs is not None else None
    samples = read_text(model.load(source), text or EMBEDDED) if known is None else []
    with display.phases() as shown:
        found = allotment.allot(
            source, recipe.quantize, bits, samples, costs=known,
            on_layer=lambda done, total: shown("layers measured", done, total),
        )  # fmt: skip
    display.note(f"{found.bits_per_weight:.2f} bits per weight of {bits:.2f} asked for")
    return dict(found.packings), allotment.costs_to_value(found.costs)


def _report(source: Path, copy: Path, text: str | None) -> "Fidelity":
    from mlxtune import model
    from mlxtune.fidelity import EMBEDDED, compare, read_text

    lm = model.load(source)
    with display.phases() as shown:
        return compare(lm, copy, read_text(lm, text or EMBEDDED), copy.name, shown)


def _sweep(
    model_name: str, recipe: Recipe, bits: list[int], plot: Path | None, text: str | None, as_json: bool
) -> None:
    from mlxtune.fidelity import EMBEDDED, sweep
    from mlxtune.rundir import refuse_existing

    spec = recipe.quantize
    assert spec is not None
    for each in bits:
        check_quantization(each, spec.group_size, spec.mode, "--sweep")
    convert.check_data(recipe)
    if plot is not None:
        refuse_existing(plot, "--plot")
    source = fetch(model_name, recipe.revision)
    seen = convert.seen(source, recipe)
    with display.phases() as shown:
        found = sweep(source, [replace(spec, bits=each) for each in bits], text or EMBEDDED, shown, seen)
    if plot is not None:
        fidelity.draw(found, plot)
    if as_json:
        display.result_json([each.to_dict() for each in found])
        return
    fidelity.show(found)
    if plot is not None:
        display.note(f"drawn in {plot}, {size(plot.stat().st_size)}")
