"""How the rows of a run are laid into arrays: what they share, whether they are packed, and in which shapes.

Decided once, from the rows, the recipe and what the network is seen to support. Whatever it is, an update has the same
rows, loss and gradient.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import mlx.core as mx
import mlx.nn as nn

from mlxtune import machine, packing, prefix
from mlxtune.data.batches import WIDTHS, Batch, Shape, epoch_order, few_shapes, make_lines, pack, up, work
from mlxtune.data.render import Sample
from mlxtune.likelihood import part_count
from mlxtune.recipe import Recipe
from mlxtune.workers import ALONE, Workers

PROBED = 16  # tokens behind a prefix with which a network is tried


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """`samples` lack the tokens of `prefix`, with which each begins. `shapes`: those of all batches; none: any.

    `pack`: whether to pack a batch into fewer lines, by the tokens of its longest part without and with that.
    """

    samples: Sequence[Sample]
    prefix: list[int] = field(default_factory=list)
    parts: int = 1
    pad_multiple: int = 1
    pack: Callable[[int, int], bool] | None = None
    shapes: Sequence[Shape] = ()

    def batch(self, rows: list[int]) -> Batch:
        """The samples at `rows` as arrays."""
        lines = self.lines(rows)
        return make_lines(self.samples, lines, self.shape(lines))

    def lines(self, rows: list[int]) -> list[list[int]]:
        """The rows of each line: one, or several where packing is worth it."""
        alone = [[row] for row in rows]
        if self.pack is None:
            return alone
        packed = pack({row: len(self.samples[row].tokens) for row in rows})
        fewer = len(packed) < len(alone)
        return packed if fewer and self.pack(self._work(alone), self._work(packed)) else alone

    def _work(self, lines: list[list[int]]) -> int:
        return work([self.width(line) for line in lines], self.parts)

    def width(self, line: list[int]) -> int:
        """Tokens of a line."""
        return sum(len(self.samples[row].tokens) for row in line)

    def shape(self, lines: list[list[int]]) -> Shape:
        """The shape of a batch of these lines: the smallest that holds them."""
        height, width = len(lines), up(max(map(self.width, lines)), self.pad_multiple)
        fitting = [shape for shape in self.shapes if shape[0] >= height and shape[1] >= width]
        return min(fitting, key=lambda shape: shape[0] * shape[1], default=(height, width))


def choose(
    net: nn.Module,
    samples: Sequence[Sample],
    recipe: Recipe,
    policy: machine.ComputePolicy,
    workers: Workers = ALONE,
    on_warning: Callable[[str], None] = lambda text: None,
) -> Layout:
    """The layout of a run. Warns where the recipe asks for what this network or its noise does not allow."""
    parts = machine.batch_parts(machine.device_kind(), machine.own_cores())
    layout = Layout(samples=samples, parts=parts, pad_multiple=policy.pad_multiple)
    vocabulary = net(mx.zeros((1, 1), dtype=mx.int32)).shape[-1]  # the shape is known without computing
    shared, reason = _shared(net, layout, recipe, vocabulary)
    if reason and recipe.train.share_prefix == "on":
        on_warning(f"train.share_prefix: {reason}")
    packed, reason = _packed(net, shared, recipe, vocabulary, workers)
    if reason and recipe.train.packing == "on":
        on_warning(f"train.packing: {reason}")
    return replace(packed, shapes=_shapes(packed, recipe, workers)) if policy.compile else packed


def _shared(net: nn.Module, layout: Layout, recipe: Recipe, vocabulary: int) -> tuple[Layout, str | None]:
    """The layout with what the rows share, where it is right and worth it to compute that once; or why it is not."""
    wanted, samples = recipe.train.share_prefix, layout.samples
    if wanted == "off":
        return layout, None
    if recipe.lora.dropout or recipe.train.neftune is not None:
        return layout, "with dropout or NEFTune each row needs noise of its own"
    tokens = prefix.common(samples)
    rest = sum(len(sample.tokens) for sample in samples) / len(samples) - len(tokens)
    rows = min(recipe.train.batch_size, len(samples))
    most = machine.most_tokens(machine.device_kind())
    lines = -(-rows // part_count((rows, math.ceil(rest)), min(rows, layout.parts), most))
    if not tokens or (wanted == "auto" and not machine.sharing_pays(len(tokens), rest, lines)):
        return layout, "the rows do not begin alike"
    if not prefix.supported(net, len(tokens), PROBED, vocabulary):
        return layout, "this architecture cannot share the beginning of rows"
    return replace(layout, samples=prefix.without(samples, len(tokens)), prefix=tokens), None


def _packed(
    net: nn.Module, layout: Layout, recipe: Recipe, vocabulary: int, workers: Workers
) -> tuple[Layout, str | None]:
    """The layout with packing, where it is right and packs any batch of the first epoch; or why it is not."""
    wanted = recipe.train.packing
    if wanted == "off":
        return layout, None
    if layout.prefix:
        return layout, "the rows share their beginning (train.share_prefix) instead"
    if recipe.train.neftune is not None:
        return layout, "NEFTune's noise goes by the length of a row"
    device = machine.device_kind()
    packed = replace(layout, pack=lambda before, after: wanted == "on" or machine.packing_pays(device, before, after))
    widths = [max(map(packed.width, lines)) for lines in _epoch(packed, recipe, workers) if max(map(len, lines)) > 1]
    if not widths:
        return layout, "no two rows of a batch fit in a line"
    if not packing.supported(net, max(widths), vocabulary):
        return layout, "this architecture cannot keep packed rows apart"
    return packed, None


def _epoch(layout: Layout, recipe: Recipe, workers: Workers) -> list[list[list[int]]]:
    """The lines of this worker's share of each batch of the first epoch."""
    lengths = [len(sample.tokens) for sample in layout.samples]
    batches = epoch_order(lengths, recipe.train.batch_size, recipe.seed, 0)
    return [layout.lines(share) for rows in batches if (share := workers.share(rows))]


def _shapes(layout: Layout, recipe: Recipe, workers: Workers) -> list[Shape]:
    """The few shapes that hold every batch of the run: those of the first epoch go best."""
    widest = max(len(sample.tokens) for sample in layout.samples)
    coarse = replace(layout, pad_multiple=up(-(-widest // WIDTHS), layout.pad_multiple))
    lines = -(-min(recipe.train.batch_size, len(layout.samples)) // workers.size)
    largest = (lines, up(widest, coarse.pad_multiple))
    return few_shapes([largest, *map(coarse.shape, _epoch(layout, recipe, workers))])
