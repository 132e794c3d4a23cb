"""Trains a LoRA adapter: loop, loss, schedule, validation, checkpoints. Knows samples and a model, not files of data.

The loss is the mean negative log-likelihood in nats over exactly the supervised tokens of an update, however they are
spread over its batches. Every row is seen once an epoch. A rerun continues at the newest checkpoint and ends with
the same adapter, because the order of rows and the dropout are functions of seed, epoch and step alone.
"""

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from mlxtune import adapter, checkpoint, generate, likelihood, machine
from mlxtune.data.batches import Batch, epoch_order, make_batch
from mlxtune.data.render import Sample
from mlxtune.errors import DataError, Interrupted, OutputError, TrainingError
from mlxtune.model import LanguageModel
from mlxtune.noise import noisy_embeddings
from mlxtune.optimizer import (
    clipped,
    gradient_norm,
    learning_rate,
    make_optimizer,
    set_rate,
    total_updates,
    updates_per_epoch,
)
from mlxtune.precision import parameter_count
from mlxtune.recipe import Recipe
from mlxtune.recompute import recomputed
from mlxtune.rundir import RunDir, cut_log, discard, refuse_existing, staged, sync_log, write_json
from mlxtune.steplog import StepLog, Sums, append

HIGH, HIGH_UPDATES = 2, 20  # a loss so many times its start, for so many updates in a row, is a divergence
ANSWER_TOKENS = 48
Stop = Callable[[], int | None]  # the number of a signal that asks to stop, or None


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainResult:
    """What training did. `trained_tokens` counts supervised tokens, each time they are seen.

    `anchor_loss` is that of the best adapter on the text that must not be forgotten, `first_anchor_loss` the base's.
    """

    steps: int
    best_step: int
    first_valid_loss: float | None
    best_valid_loss: float | None
    last_train_loss: float
    trained_tokens: int
    rows: int
    epochs: float
    seconds: float
    tokens_per_second: float
    peak_memory_gb: float
    trainable_parameters: int
    parameters: int
    resumed_at: int | None
    stopped_early: bool
    first_anchor_loss: float | None
    anchor_loss: float | None


def ignore(log: StepLog, steps: int) -> None:
    """An `on_step` that does nothing."""


def train(
    lm: LanguageModel,
    samples: Sequence[Sample],
    valid: Sequence[Sample],
    recipe: Recipe,
    out: Path,
    *,
    anchor: Sequence[Sample] = (),
    on_step: Callable[[StepLog, int], None] = ignore,
    on_warning: Callable[[str], None] = lambda text: None,
    stop: Stop = lambda: None,
) -> TrainResult:
    """Trains an adapter on `lm` and leaves `out/adapter/`, the best by validation loss, and `out/log.jsonl`.

    The best has the lowest validation loss of those that keep the loss on `anchor` within the forgetting budget.
    `lm.net` carries the adapter afterwards. Continues at the newest checkpoint in `out/checkpoints/`.
    Raises DataError for samples without supervised tokens, TrainingError when the loss or gradient is not finite
    (the last good adapter is then in `out/checkpoints/`), and Interrupted after a checkpoint when `stop` says so.
    """
    refuse_existing(RunDir(out).adapter, "--out")
    _check_samples(samples, valid)
    work = _Training(lm, samples, valid, anchor, recipe, out, on_warning)
    updates = work.updates
    eval_every = recipe.train.eval_every or max(1, round(updates / 10))
    order = update_order(samples, recipe)
    for _ in range(work.progress.step):
        next(order)
    if work.progress.step == 0:
        work.validate()
    while work.progress.step < updates and not work.progress.exhausted:
        work.update(next(order))
        measured = work.progress.step == updates or work.progress.step % eval_every == 0
        valid_loss = work.validate() if measured else None
        last = work.progress.step == updates or work.progress.exhausted
        on_step(work.log(valid_loss, write=last or work.progress.step % recipe.train.report_every == 0), updates)
        signal_number = stop()
        if not last and (signal_number is not None or work.progress.step % recipe.train.save_every == 0):
            folder = work.save()
            if signal_number is not None:
                raise Interrupted(
                    f"stopped after update {work.progress.step} of {updates}; {folder} keeps it",
                    signal_number=signal_number,
                    hint="run the same command to go on",
                )
    return work.finish()


def update_order(samples: Sequence[Sample], recipe: Recipe) -> Iterator[list[list[int]]]:
    """Row indices of each batch of each update, epoch after epoch, without end. No update spans two epochs."""
    lengths = [len(sample.tokens) for sample in samples]
    accumulate = recipe.train.grad_accumulation_steps
    for epoch in itertools.count():
        batches = epoch_order(lengths, recipe.train.batch_size, recipe.seed, epoch)
        for start in range(0, len(batches), accumulate):
            yield batches[start : start + accumulate]


def token_weighted_gradient(
    value_and_grad: Callable[..., tuple[mx.array, Any]], batches: Sequence[Batch]
) -> tuple[float, Any, int]:
    """Loss in nats per token, gradient and supervised tokens of one update: equal to those of the one big batch."""
    tokens = sum(int(batch.trained[:, 1:].sum()) for batch in batches)
    total, gradient = 0.0, None
    for batch in batches:
        for nats, part in likelihood.in_parts(batch, value_and_grad):
            gradient = part if gradient is None else tree_map(mx.add, gradient, part)
            total += cast(float, nats.item())
        mx.eval(gradient)
    return total / tokens, tree_map(lambda each: each / tokens, gradient), tokens


def _check_samples(samples: Sequence[Sample], valid: Sequence[Sample]) -> None:
    if not samples:
        raise DataError("there are no rows to train on", hint="give a train file with rows")
    for sample in (*samples, *valid):
        if not any(sample.trained[1:]):
            raise DataError("has no token to learn", where=sample.where, hint="give it an answer or delete it")


@dataclass(slots=True)
class _Progress:
    """What a checkpoint keeps beside the arrays. `waited`: validations since the best one; `high`: updates in a row
    whose loss was far above the first one's; `exhausted`: training ended before its last update.
    """

    step: int = 0
    best_step: int = 0
    first_valid_loss: float | None = None
    best_valid_loss: float | None = None
    first_anchor_loss: float | None = None
    best_anchor_loss: float | None = None
    first_train_loss: float | None = None
    last_train_loss: float = 0.0
    waited: int = 0
    high: int = 0
    exhausted: bool = False
    trained_tokens: int = 0
    seconds: float = 0.0
    log_bytes: int = 0


def _is_ours(found: checkpoint.Checkpoint) -> bool:
    """Whether a whole checkpoint has what a training run goes on from."""
    names = {each.name for each in fields(_Progress)}
    return found.state.keys() == names and {"adapters", "best", "optimizer"} <= found.arrays.keys()


class _Training:
    """The state of a training run: network, optimizer, progress, the best adapter so far."""

    def __init__(
        self,
        lm: LanguageModel,
        samples: Sequence[Sample],
        valid: Sequence[Sample],
        anchor: Sequence[Sample],
        recipe: Recipe,
        out: Path,
        on_warning: Callable[[str], None],
    ):
        self.lm, self.net, self.samples, self.valid, self.anchor = lm, lm.net, samples, valid, anchor
        self.recipe, self.settings, self.run, self.on_warning = recipe, recipe.train, RunDir(out), on_warning
        self.updates = total_updates(len(samples), recipe.train)
        self.parameters = parameter_count(lm.net)
        policy = machine.policy_here(self.parameters)
        self.pad_multiple = policy.pad_multiple
        self.optimizer = make_optimizer(recipe.train, recipe.lora.plus)
        targets = adapter.attach(lm, recipe.lora, recipe.seed)
        self.adapter_config = adapter.config(lm, recipe.lora, targets, recipe.data.chat_template)
        self.optimizer.init(lm.net.trainable_parameters())
        self.value_and_grad = self._value_and_grad(policy.compile)
        self.progress = _Progress()
        self.best = self.good = adapter.trained(lm.net)
        self.resumed_at: int | None = None
        self.sums = Sums()
        self.anchor_loss: float | None = None
        self._resume()
        mx.reset_peak_memory()

    def _value_and_grad(self, compile: bool) -> Callable[..., tuple[mx.array, Any]]:
        """The function from tokens and trained (B, T) to their summed nats and the gradient of the adapter."""

        def nats(tokens: mx.array, trained: mx.array) -> mx.array:
            return likelihood.row_nats(self.net, tokens, trained).sum()

        function: Callable[..., tuple[mx.array, Any]] = nn.value_and_grad(self.net, nats)
        if compile:
            # the network is an output too: tracing the gradient puts its parameters through `update`
            state = [self.net.state, mx.random.state]
            function = mx.compile(function, inputs=state, outputs=state)
        return function

    def _resume(self) -> None:
        found, damaged = checkpoint.newest(self.run.checkpoints, _is_ours)
        for folder in damaged:
            self.on_warning(f"{folder} is damaged and is passed over")
            discard(folder)
        if found is not None:
            shapes = {name: value.shape for name, value in self.best.items()}
            if {name: value.shape for name, value in found.arrays["adapters"].items()} != shapes:
                raise OutputError("has checkpoints of another recipe", where=self.run.root, hint="choose another --out")
            self.net.load_weights(list(found.arrays["adapters"].items()), strict=False)
            self.optimizer.state = tree_unflatten(list(found.arrays["optimizer"].items()))
            self.best = found.arrays["best"]
            self.progress = _Progress(**found.state)
            self.resumed_at = self.progress.step
        cut_log(self.run.log, self.progress.log_bytes)  # lines behind the checkpoint are written again

    def update(self, rows: list[list[int]]) -> None:
        """One optimizer update over the batches at `rows`. Raises TrainingError when it is not finite."""
        started = time.perf_counter()
        # dropout and noise are functions of seed and step alone, so a resumed run draws the same
        mx.random.seed((self.recipe.seed * 1_000_003 + self.progress.step) % 2**63)
        self.net.train()
        batches = [make_batch(self.samples, part, self.pad_multiple) for part in rows]
        with recomputed(self.net, self.settings.grad_checkpoint), noisy_embeddings(self.net, self.settings.neftune):
            loss, gradient, tokens = token_weighted_gradient(self.value_and_grad, batches)
        norm = gradient_norm(gradient)
        if not math.isfinite(loss) or not math.isfinite(norm):
            self._stop_at_nan(loss, rows)
        self.rate = learning_rate(self.progress.step, self.updates, self.settings)
        set_rate(self.optimizer, self.rate, self.recipe.lora.plus)
        self.good = adapter.trained(self.net)  # its loss and gradient are finite
        self.optimizer.update(self.net, clipped(gradient, norm, self.settings.max_grad_norm))
        mx.eval(self.net.trainable_parameters(), self.optimizer.state)
        spent = time.perf_counter() - started
        self.progress.step += 1
        self.progress.trained_tokens += tokens
        self.progress.seconds += spent
        self.progress.last_train_loss = loss
        self.sums.add(loss, tokens, spent)
        self._watch(loss)

    def _watch(self, loss: float) -> None:
        """Warns once when the loss stays far above its start."""
        progress = self.progress
        if progress.first_train_loss is None:
            progress.first_train_loss = loss
        progress.high = progress.high + 1 if loss > HIGH * progress.first_train_loss else 0
        if progress.high == HIGH_UPDATES:
            self.on_warning(
                f"the loss has been above {HIGH} times its start ({progress.first_train_loss:.3f}) for {HIGH_UPDATES} "
                f"updates, now {loss:.3f}: lower train.learning_rate"
            )

    def _stop_at_nan(self, loss: float, rows: list[list[int]]) -> None:
        self.net.load_weights(list(self.good.items()), strict=False)
        folder = self.save()
        names = [self.samples[row].where for part in rows for row in part]
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        raise TrainingError(
            f"loss or gradient is not finite (loss {loss}) in update {self.progress.step + 1}, rows {shown}; "
            f"the last good adapter is in {folder}",
            hint="lower train.learning_rate or look at these rows",
        )

    def validate(self) -> float | None:
        """The loss on the validation rows, always all of them; keeps the adapter if it is the best so far."""
        if self.anchor:
            self.anchor_loss = likelihood.mean_nats(self.net, self.anchor, self.settings.batch_size)
        progress = self.progress
        if progress.step == 0:
            progress.first_anchor_loss = progress.best_anchor_loss = self.anchor_loss
        if not self.valid:
            return None
        loss = likelihood.mean_nats(self.net, self.valid, self.settings.batch_size)
        if not math.isfinite(loss):
            self.net.load_weights(list(self.best.items()), strict=False)
            folder = self.save()
            raise TrainingError(
                f"the validation loss is {loss} after update {progress.step}; the best adapter so far is in {folder}",
                hint="lower train.learning_rate, or check the base model",
            )
        if progress.first_valid_loss is None:
            progress.first_valid_loss = loss
        if progress.best_valid_loss is None or (loss < progress.best_valid_loss and self._remembers()):
            progress.waited = 0 if self._better(loss) else progress.waited + 1
            progress.best_valid_loss, progress.best_step = loss, progress.step
            progress.best_anchor_loss = self.anchor_loss
            self.best = adapter.trained(self.net)
        else:
            progress.waited += 1
        progress.exhausted = self.settings.patience is not None and progress.waited >= self.settings.patience
        return loss

    def _better(self, loss: float) -> bool:
        """Whether a loss is so much better than the best one that patience begins anew."""
        best = self.progress.best_valid_loss
        return best is None or loss < best - self.settings.min_delta

    def _remembers(self) -> bool:
        """Whether the loss on the anchor is within the forgetting budget."""
        first = self.progress.first_anchor_loss
        return first is None or self.anchor_loss is None or self.anchor_loss <= first + self.settings.forget_budget

    def log(self, valid_loss: float | None, *, write: bool) -> StepLog:
        """The line of this step, over the updates since the last written one; written if asked or validated."""
        line = StepLog(
            step=self.progress.step,
            train_loss=self.sums.nats / self.sums.tokens,
            valid_loss=valid_loss,
            learning_rate=self.rate,
            tokens_per_second=self.sums.tokens / self.sums.seconds,
            peak_memory_gb=mx.get_peak_memory() / 1e9,
            anchor_loss=self.anchor_loss if valid_loss is not None else None,
            answer=self._answer() if valid_loss is not None and self.settings.show_answer else None,
        )
        if write or valid_loss is not None:
            self.progress.log_bytes = append(self.run.log, line)
            self.sums = Sums()
        return line

    def _answer(self) -> str | None:
        """The greedy answer to the first validation row that asks for one, at this point of the training."""
        row = next((each for each in self.valid if each.answer is not None), None)
        if row is None:
            return None
        pieces = generate.stream(self.lm, row.tokens[: row.prompt_length], max_tokens=ANSWER_TOKENS)
        return "".join(piece.text for piece in pieces)

    def save(self) -> Path:
        """Writes a checkpoint of the state as it is now."""
        optimizer = dict(tree_flatten(self.optimizer.state))
        arrays = {"adapters": adapter.trained(self.net), "best": self.best, "optimizer": optimizer}
        state = checkpoint.Checkpoint(self.progress.step, asdict(self.progress), arrays)
        sync_log(self.run.log)  # the checkpoint says how much of it there is
        return checkpoint.save(self.run.checkpoints, state, self.adapter_config)

    def finish(self) -> TrainResult:
        """Writes the best adapter, leaves it on the network, and tells what was done."""
        progress = self.progress
        if not self.valid:
            self.best, progress.best_step = adapter.trained(self.net), progress.step
            progress.best_anchor_loss = self.anchor_loss
            if not all(mx.all(mx.isfinite(value)).item() for value in self.best.values()):
                raise TrainingError("the last update made the adapter infinite", hint="lower train.learning_rate")
        self.net.load_weights(list(self.best.items()), strict=False)
        self.net.eval()
        result = TrainResult(
            steps=progress.step,
            best_step=progress.best_step,
            first_valid_loss=progress.first_valid_loss,
            best_valid_loss=progress.best_valid_loss,
            last_train_loss=progress.last_train_loss,
            trained_tokens=progress.trained_tokens,
            rows=len(self.samples),
            epochs=progress.step / updates_per_epoch(len(self.samples), self.settings),
            seconds=progress.seconds,
            tokens_per_second=progress.trained_tokens / progress.seconds,
            peak_memory_gb=mx.get_peak_memory() / 1e9,
            trainable_parameters=sum(value.size for value in self.best.values()),
            parameters=self.parameters,
            resumed_at=self.resumed_at,
            stopped_early=progress.exhausted and progress.step < self.updates,
            first_anchor_loss=progress.first_anchor_loss,
            anchor_loss=progress.best_anchor_loss,
        )
        sync_log(self.run.log)  # an adapter that is there has its whole log
        with staged(self.run.adapter) as scratch:
            adapter.save(scratch, self.best, self.adapter_config)
            write_json(scratch / "training.json", asdict(result))
        return result
