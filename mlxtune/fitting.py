"""Which settings of a training fit into memory: the size of its batches, and what to change. Knows predictions only."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from mlxtune import recipe as recipes
from mlxtune.errors import MemoryShort
from mlxtune.memory import Job
from mlxtune.recipe import Recipe
from mlxtune.report.words import size

SURE = 1.25  # what exceeds the memory by more than predictions are wrong by cannot fit
SHORTEST_ROW = 128
SHOWN = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """Settings, by their dotted keys, that make a training fit, and its peak then."""

    settings: dict[str, Any]
    peak_bytes: int


def in_batches(recipe: Recipe, batch_size: int) -> Recipe:
    """The recipe with the rows of an update in batches of `batch_size`, which divides them."""
    rows = rows_per_update(recipe)
    train = replace(recipe.train, batch_size=batch_size, grad_accumulation_steps=rows // batch_size, fit_batch=False)
    return replace(recipe, train=train)


def rows_per_update(recipe: Recipe) -> int:
    """The rows of an optimizer update."""
    return recipe.train.batch_size * recipe.train.grad_accumulation_steps


def batch_sizes(recipe: Recipe) -> list[int]:
    """The sizes of batches into which the rows of an update can be split, the largest first."""
    rows = rows_per_update(recipe)
    return [count for count in range(rows, 0, -1) if rows % count == 0]


def chosen(job: Job, recipe: Recipe) -> Recipe:
    """The recipe with its own batches, or with `train.fit_batch` the largest of `batch_sizes` that fit.

    An update has the same rows whatever is chosen, so learning rates and the number of updates stay as they are.
    """
    if not recipe.train.fit_batch:
        return recipe
    choices = [in_batches(recipe, count) for count in batch_sizes(recipe)]
    fitting = (each for each in choices if job.peak(each).training <= job.place.usable_bytes)
    return next(fitting, choices[-1])


def fitted(job: Job, recipe: Recipe, on_warning: Callable[[str], None] = lambda text: None) -> Recipe:
    """The recipe with batches as `chosen`.

    Raises MemoryShort, with what would fit, for a training that cannot; warns of one that may not.
    """
    recipe = chosen(job, recipe)
    peak, usable = job.peak(recipe).total, job.place.usable_bytes
    if peak > usable:
        needs = f"training takes about {size(peak)} of memory, and has {size(usable)}"
        if peak > SURE * usable:
            found = changes(job, recipe)
            shown = " or ".join(f"`{flags(each.settings)}` ({size(each.peak_bytes)})" for each in found[:SHOWN])
            raise MemoryShort(needs, hint=f"what fits: {shown}" if found else "choose a smaller model")
        on_warning(f"{needs}: it may not fit")
    return recipe


def changes(job: Job, recipe: Recipe) -> list[Change]:
    """What would make a training fit that does not, what costs least time and changes least first.

    Smaller batches, as many rows an update; then blocks computed again, for a third more time; then a 4-bit base,
    where the machine computes with one; then shorter rows; then an adapter in place of full tuning.
    """
    again: dict[str, Any] = {"train.grad_checkpoint": True}
    kinds: list[dict[str, Any]] = [{}, again]
    quantized = recipe.quantize is not None or "quantization" in job.config
    if not quantized and not job.place.policy.expand and recipe.lora.method != "full":
        kinds += [{"quantize.bits": 4}, {"quantize.bits": 4} | again]
    length = job.rows.longest // 2
    while length >= SHORTEST_ROW:
        kinds.append(again | {"train.max_seq_length": length})
        length //= 2
    if recipe.lora.method == "full":
        kinds += [{"lora.method": "lora"}, {"lora.method": "lora"} | again]
    found: list[Change] = []
    for kind in kinds:
        if kind.get("train.max_seq_length", 0) and any("train.max_seq_length" in each.settings for each in found):
            continue
        change = _largest_batch(job, recipe, kind)
        if change is not None:
            found.append(change)
    return found


def _largest_batch(job: Job, recipe: Recipe, settings: dict[str, Any]) -> Change | None:
    """`settings` with the largest batches that fit then, or None if none does."""
    changed = with_settings(recipe, settings)
    length = changed.train.max_seq_length
    rows = replace(job.rows, longest=min(job.rows.longest, length), supervised=min(job.rows.supervised, length))
    job = replace(job, rows=rows)
    for count in batch_sizes(recipe):
        batched = in_batches(changed, count)
        peak = job.peak(batched)
        if count <= recipe.train.batch_size and peak.total <= job.place.usable_bytes:
            names = ("batch_size", "grad_accumulation_steps")
            new = {name: getattr(batched.train, name) for name in names}
            old = {name: getattr(recipe.train, name) for name in names}
            batches = {f"train.{name}": value for name, value in new.items()} if new != old else {}
            return Change(settings={**settings, **batches}, peak_bytes=peak.total)
    return None


def with_settings(recipe: Recipe, settings: dict[str, Any]) -> Recipe:
    """The recipe with other values of these dotted keys."""
    return recipes.build(recipes.to_dict(recipe), settings=settings)


def flags(settings: dict[str, Any]) -> str:
    """Settings as they are typed: `--grad-checkpoint --batch-size 2`."""
    known = recipes.all_settings()
    names = {key: known[key][0].metadata["flag"] for key in settings}
    return " ".join(names[key] if value is True else f"{names[key]} {value}" for key, value in settings.items())
