"""What smaller copies of a model lost, for people: the tables behind `mlxtune quantize --report` and `--sweep`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mlxtune.cli import display
from mlxtune.report import words

if TYPE_CHECKING:
    from mlxtune.fidelity import Fidelity

HEADINGS = ["", "size", "bits/weight", "KL mean", "median", "99 %", "max", "perplexity", "RMS Δp", "same top token"]


def show(found: "Sequence[Fidelity]") -> None:
    """A line a copy, and what the columns mean."""
    display.table(HEADINGS, [_line(each) for each in found])
    one = found[0].divergence
    display.note(
        f"KL divergence from the source in nats per token, perplexity as its multiple, on {one.tokens:,} tokens of "
        f"{display.count(one.rows, 'row')}"
    )


def _line(each: "Fidelity") -> list[str]:
    lost = each.divergence
    error = f" ± {lost.perplexity_ratio_error:.4f}" if lost.perplexity_ratio_error is not None else ""
    kl = [f"{value:.5f}" for value in (lost.kl_mean, lost.kl_median, lost.kl_99, lost.kl_max)]
    return [
        each.name, words.size(each.bytes), f"{each.bits_per_weight:.2f}", *kl,
        f"x {lost.perplexity_ratio:.4f}{error}", f"{lost.rms_delta_p:.2%}", f"{lost.same_top:.1%}",
    ]  # fmt: skip


def widths(context: click.Context, parameter: click.Parameter, value: str | None) -> list[int]:
    """`2,3,4` as numbers."""
    try:
        return [int(each) for each in value.split(",")] if value is not None else []
    except ValueError:
        raise click.BadParameter(f"{value!r} is no list of numbers such as 2,3,4") from None


def draw(found: "Sequence[Fidelity]", file: Path) -> None:
    """Writes the divergence against the size as an SVG picture."""
    from mlxtune.report import chart
    from mlxtune.rundir import write_text

    points = [(each.name, float(each.bytes), each.divergence.kl_mean) for each in found]
    write_text(file, chart.picture(chart.divergence_curve(points)))
