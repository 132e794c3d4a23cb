"""What a training will take: peak memory, whether it fits here, tokens and updates. Loads no weights."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from mlxtune import fitting, hub, model
from mlxtune.data import load
from mlxtune.data.render import Limit, Sample, render
from mlxtune.fitting import Change
from mlxtune.memory import Job, Peak, Rows
from mlxtune.optimizer import total_updates, updates_per_epoch
from mlxtune.recipe import Recipe
from mlxtune.tokenizer import inner, load_for_rows

Verdict = Literal["fits", "tight", "too large"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """What there is to learn: samples, and tokens of them, in an epoch; updates and epochs of the whole training."""

    samples: int
    tokens: int
    supervised_tokens: int
    updates: int
    epochs: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """The predicted peak of a training in bytes, and what MLX may hold here.

    `tight`: more than that, by less than predictions may be wrong. `changes`: settings that would fit, where it does
    not. `longest`: tokens of the longest row; `counts`: None without data.
    """

    peak: Peak
    usable_bytes: int
    verdict: Verdict
    batch_size: int
    grad_accumulation_steps: int
    longest: int
    counts: Counts | None
    changes: list[Change]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        parts = asdict(self.peak)
        return asdict(self) | {"peak": {"total": self.peak.total, "training": self.peak.training, **parts}}


def estimate(
    recipe: Recipe, on_fetch: Callable[[int, int], None] = hub.ignore, on_row: Callable[[int, int], None] = hub.ignore
) -> Estimate:
    """What training as the recipe says takes on this machine.

    Without data every row is taken to have `train.max_seq_length` tokens, or those of the model's context, and all of
    them to be learned. Raises what loading data and models raises.
    """
    files = load.files_of(recipe.data) if recipe.data.path is not None else None
    source = hub.fetch(recipe.model, recipe.revision, on_fetch)
    net, config = model.outline(source)
    limit = Limit.of(recipe.train.max_seq_length, model.context_length(config))
    counts = None
    if files is None:
        rows = Rows(longest=limit.tokens, supervised=limit.tokens, count=fitting.rows_per_update(recipe))
    else:
        tokenizer, _ = load_for_rows(source, config, recipe.data.chat_template)
        splits = load.load_splits(recipe.data, recipe.seed, recipe.evaluate.label)
        total = len(splits["train"]) + len(splits["valid"])

        def rendered(name: str, before: int) -> list[Sample]:
            ends, told = tokenizer.eos_token_ids, lambda done: on_row(before + done, total)
            return render(splits[name], inner(tokenizer), ends, recipe.data, limit, told).samples

        samples = {"train": rendered("train", 0), "valid": rendered("valid", len(splits["train"]))}
        rows = Rows.of([*samples["train"], *samples["valid"]])
        counts = _counts(samples["train"], recipe)
    job = Job.here(net, config, rows)
    chosen = fitting.chosen(job, recipe)
    peak, usable = job.peak(chosen), job.place.usable_bytes
    may = peak.total <= fitting.SURE * usable
    verdict: Verdict = "fits" if peak.total <= usable else "tight" if may else "too large"
    return Estimate(
        peak=peak,
        usable_bytes=usable,
        verdict=verdict,
        batch_size=chosen.train.batch_size,
        grad_accumulation_steps=chosen.train.grad_accumulation_steps,
        longest=rows.longest,
        counts=counts,
        changes=[] if verdict == "fits" else fitting.changes(job, chosen),
    )


def _counts(samples: list[Sample], recipe: Recipe) -> Counts:
    updates = total_updates(len(samples), recipe.train)
    return Counts(
        samples=len(samples),
        tokens=sum(len(sample.tokens) for sample in samples),
        supervised_tokens=sum(sample.trained_count for sample in samples),
        updates=updates,
        epochs=updates / updates_per_epoch(len(samples), recipe.train),
    )
