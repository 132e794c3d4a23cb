"""`mlxtune estimate`: whether a training fits into this machine's memory, before anything is trained."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlxtune.cli import display
from mlxtune.cli.flags import build_recipe, config_flag, recipe_flags
from mlxtune.report.words import size

if TYPE_CHECKING:
    from mlxtune.estimate import Estimate


@click.command("estimate", short_help="the memory that a training takes, and what fits")
@config_flag
@click.option("--json", "as_json", is_flag=True, help="print the estimate as JSON, sizes in bytes")
@recipe_flags("model", "revision", "seed", "data", "quantize", "lora", "train")
def command(config: Path | None, as_json: bool, sets: tuple[str, ...], **flags: Any) -> None:
    """Predict the peak memory of a training, say whether it fits here, and if not, what does.

    Takes what `mlxtune train` takes. Without --data, all rows are taken to be --max-seq-length long. No weights are
    loaded and nothing is written.

    \b
    Example:
      mlxtune estimate --model tiny --data tickets --batch-size 16
      mlxtune estimate --model tiny --max-seq-length 512 --grad-checkpoint
    """
    recipe = build_recipe(config, flags, sets)
    from mlxtune.estimate import estimate

    with display.phases() as update:
        found = estimate(
            recipe,
            lambda done, total: update("fetch (MB)", done // 10**6, total // 10**6),
            lambda done, total: update("read", done, total),
        )
    if as_json:
        display.result_json(found.to_dict())
    else:
        show(found)


def show(found: "Estimate") -> None:
    """The estimate for people: what is learned, what holds memory, and the verdict."""
    peak, counts = found.peak, found.counts
    rows, parts = found.batch_size * found.grad_accumulation_steps, found.grad_accumulation_steps
    split = f", in {parts} batches of {found.batch_size}" if parts > 1 else ""
    display.result(f"  {'update':<13}{display.count(rows, 'row')} of up to {found.longest:,} tokens{split}")
    if counts is not None:
        display.result(
            f"  {'to learn':<13}{display.count(counts.samples, 'sample')}, {counts.supervised_tokens:,} of "
            f"{counts.tokens:,} tokens; {display.count(counts.updates, 'update')}, {counts.epochs:.1f} epochs"
        )
    display.result()
    held = {"weights": peak.weights, "adapter": peak.adapter, "activations": peak.activations, "logits": peak.logits}
    for name, value in held.items():
        if value:
            display.result(f"  {name:<13}{size(value):>9}")
    display.result(f"  {'training':<13}{size(peak.training):>9}")
    if peak.loading > peak.training:
        display.result(f"  {'loading':<13}{size(peak.loading):>9}  more than training takes")
    display.result()
    said = {"fits": "It fits", "tight": "It may not fit", "too large": "It does not fit"}[found.verdict]
    display.result(f"{said}: about {size(peak.total)} of the {size(found.usable_bytes)} that training may use here.")
    if found.verdict == "fits":
        return
    if not found.changes:
        display.result("No setting makes it fit: choose a smaller model.")
        return
    from mlxtune.fitting import flags

    display.result("What fits, fastest first:")
    for each in found.changes:
        display.result(f"  {size(each.peak_bytes):>9}  {flags(each.settings)}")
