"""Trains a LoRA adapter: loop, loss, schedule, validation, checkpoints. Knows samples and a model, not files of data.

The loss is the mean negative log-likelihood in nats over exactly the supervised tokens of an update, however they are
spread over its batches. Every row is seen once an epoch. A rerun continues at the newest checkpoint and ends with
the same adapter, because the order of rows and the dropout are functions of seed, epoch and step alone.
"""

import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from mlxtune import adapter, checkpoint, fitting, generate, gradient, layout, likelihood, machine, prefix
from mlxtune.data.render import Sample
from mlxtune.errors import DataError, Interrupted, OutputError, TrainingError, WorkerLost
from mlxtune.memory import Job, Rows
from mlxtune.model import LanguageModel, width
from mlxtune.noise import noisy_embeddings
from mlxtune.optimizer import (
    clipped,
    gradient_norm,
    learning_rate,
    make_optimizer,
    peak_rate,
    set_rate,
    total_updates,
    updated,
    updates_per_epoch,
)
from mlxtune.precision import parameter_count
from mlxtune.progress import HIGH, HIGH_UPDATES, Progress
from mlxtune.recipe import Recipe
from mlxtune.recompute import recomputed
from mlxtune.rundir import RunDir, cut_log, discard, refuse_existing, staged, sync_log, write_json
from mlxtune.steplog import StepLog, TrainResult, append
from mlxtune.vectors import Vectors, joining_pays
from mlxtune.workers import ALONE, Workers

ANSWER_TOKENS = 48
GO_ON = "run the same command to go on"
Stop = Callable[[], int | None]  # the number of a signal that asks to stop, or None


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
    workers: Workers = ALONE,
) -> TrainResult:
    """Trains an adapter on `lm` and leaves `out/adapter/`, the best by validation loss, and `out/log.jsonl`.

    The best has the lowest validation loss of those that keep the loss on `anchor` within the forgetting budget.
    `lm.net` carries the adapter afterwards. Continues at the newest checkpoint in `out/checkpoints/`.
    Of several `workers` each calls this with the same arguments, and the first alone writes.
    Raises DataError for samples without supervised tokens, MemoryShort for what cannot fit, TrainingError when the
    loss or gradient is not finite (the last good adapter is then in `out/checkpoints/`), WorkerLost after a checkpoint
    when another worker has ended, and Interrupted after a checkpoint when `stop` says so.
    """
    refuse_existing(RunDir(out).adapter, "--out")
    _check_samples(samples, valid)
    work = _Training(lm, samples, valid, anchor, recipe, out, on_warning, workers)
    updates = work.updates
    eval_every = recipe.train.eval_every or max(1, round(updates / 10))
    order = gradient.update_order(samples, work.recipe)
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
        signal_number = work.signal(stop())
        if last:
            continue
        if signal_number is not None or work.lost is not None or work.progress.step % recipe.train.save_every == 0:
            folder = work.save()
            if work.lost is not None:
                raise work.lost
            if signal_number is not None:
                raise Interrupted(
                    f"stopped after update {work.progress.step} of {updates}; {folder} keeps it",
                    signal_number=signal_number,
                    hint=GO_ON,
                )
    return work.finish()


def _check_samples(samples: Sequence[Sample], valid: Sequence[Sample]) -> None:
    if not samples:
        raise DataError("there are no rows to train on", hint="give a train file with rows")
    for sample in (*samples, *valid):
        if not any(sample.trained[1:]):
            raise DataError("has no token to learn", where=sample.where, hint="give it an answer or delete it")


def _digest(samples: Sequence[Sample], adapter_config: dict[str, object], recipe: Recipe) -> bytes:
    """Of all that must be equal on the workers of a run: rows, base, adapter and settings."""
    same = {name: value for name, value in adapter_config.items() if name != "model"}  # its folder may be another
    digest = hashlib.sha256(repr((same, recipe.train, recipe.lora, recipe.seed)).encode())
    for sample in samples:
        digest.update(np.array([sample.tokens, sample.trained], dtype=np.int32).tobytes())
    return digest.digest()


def _is_ours(found: checkpoint.Checkpoint) -> bool:
    """Whether a whole checkpoint has what a training run goes on from."""
    names = {each.name for each in fields(Progress)}
    return found.state.keys() == names and {"adapters", "best", "optimizer"} <= found.arrays.keys()


def _shapes(arrays: Mapping[str, mx.array]) -> dict[str, tuple[int, ...]]:
    return {name: value.shape for name, value in arrays.items()}


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
        workers: Workers,
    ):
        self.lm, self.net, self.samples, self.valid, self.anchor = lm, lm.net, samples, valid, anchor
        self.run, self.on_warning = RunDir(out), on_warning
        self.workers = workers
        self.lost: WorkerLost | None = None
        self.updates = total_updates(len(samples), recipe.train)
        self.parameters = parameter_count(lm.net)
        self.peak = peak_rate(recipe.train, recipe.lora.method, width(lm.config))
        policy = machine.policy_here(self.parameters)
        fitted = fitting.fitted(Job.here(lm.net, lm.config, Rows.of([*samples, *valid])), recipe, on_warning)
        self.optimizer = make_optimizer(recipe.train, recipe.lora.plus)
        targets = adapter.attach(lm, recipe.lora, recipe.seed)
        self.adapter_config = adapter.config(lm, recipe.lora, targets, recipe.data.chat_template)
        self.best = adapter.trained(lm.net)
        self.vectors = Vectors.of(lm.net, joined=joining_pays(self.best, recipe.train.optimizer, recipe.lora.method))
        self.optimizer.init(tree_unflatten(list(self.vectors.join(self.vectors.now()).items())))
        self.progress = Progress(batch_size=fitted.train.batch_size)
        if workers.size > 1:
            workers.agree(_digest([*samples, *valid], self.adapter_config, recipe), "rows, models or recipes")
        self.resumed_at: int | None = None
        self.anchor_loss: float | None = None
        found = self._newest() if workers.first else None
        if found is not None:
            self.progress = Progress(**found.state)
        self.progress = Progress(**workers.value_from_first(asdict(self.progress)))
        # what was chosen by the memory at the start stays, also where there is more now
        self.recipe = fitting.in_batches(recipe, self.progress.batch_size)
        self.settings = self.recipe.train
        # before a checkpoint's weights are loaded: what is tried with random tokens must turn out as at the start
        self.layout = layout.choose(lm.net, samples, self.recipe, policy, workers, on_warning)
        self.value_and_grad = gradient.value_and_grad(lm.net, self.vectors, policy.compile, self.layout.prefix)
        if found is not None:
            self._go_on_from(found)
        if workers.size > 1:
            self._follow_first()
        self.trained = self.good = self.vectors.join(self.vectors.now())
        mx.eval(self.trained)
        mx.reset_peak_memory()

    def _newest(self) -> checkpoint.Checkpoint | None:
        """The checkpoint to go on from, if there is one; and the log as it was then."""
        found, damaged = checkpoint.newest(self.run.checkpoints, _is_ours)
        for folder in damaged:
            self.on_warning(f"{folder} is damaged and is passed over")
            discard(folder)
        if found is not None:
            ours = {"adapters": self.best, "optimizer": dict(tree_flatten(self.optimizer.state))}
            if any(_shapes(found.arrays[name]) != _shapes(arrays) for name, arrays in ours.items()):
                raise OutputError("has checkpoints of another recipe", where=self.run.root, hint="choose another --out")
        log_bytes = found.state["log_bytes"] if found is not None else 0
        cut_log(self.run.log, log_bytes)  # lines behind the checkpoint are written again
        return found

    def _go_on_from(self, found: checkpoint.Checkpoint) -> None:
        self.net.load_weights(list(found.arrays["adapters"].items()), strict=False)
        self.optimizer.state = tree_unflatten(list(found.arrays["optimizer"].items()))
        self.best = found.arrays["best"]
        self.resumed_at = found.step

    def _follow_first(self) -> None:
        """Takes over the state of the first worker, which alone knows the checkpoints."""
        optimizer = dict(tree_flatten(self.optimizer.state))
        given = {"adapters": adapter.trained(self.net), "best": self.best, "optimizer": optimizer}
        found = {name: self.workers.from_first(arrays) for name, arrays in given.items()}
        self.net.load_weights(list(found["adapters"].items()), strict=False)
        self.optimizer.state = tree_unflatten(list(found["optimizer"].items()))
        self.best = found["best"]

    def signal(self, number: int | None) -> int | None:
        """The signal that asked any worker to stop, or None."""
        try:
            return int(self.workers.highest(number or 0)) or None
        except WorkerLost as error:
            self._go_on_alone(error)
            return number

    def _go_on_alone(self, error: WorkerLost) -> None:
        """The first worker brings what it is at to an end, to save it; others end here."""
        if not self.workers.first:
            raise error
        self.lost, self.workers = error, ALONE
        self.lost.hint = f"{self.run.checkpoints} keeps what was done; {GO_ON}"

    def _mean_nats(self, samples: Sequence[Sample]) -> float:
        tokens = self.layout.prefix if prefix.begin_with(samples, self.layout.prefix) else []
        rest = prefix.without(samples, len(tokens))
        self.net.eval()
        try:
            with prefix.shared(self.net, tokens):
                return likelihood.mean_nats(self.net, rest, self.settings.batch_size, self.workers)
        except WorkerLost as error:
            self._go_on_alone(error)
            return self._mean_nats(samples)

    def update(self, rows: list[list[int]]) -> None:
        """One optimizer update over the batches at `rows`. Raises TrainingError when it is not finite."""
        started = time.perf_counter()
        # dropout and noise are functions of seed and step alone, so a resumed run draws the same
        mx.random.seed((self.recipe.seed * 1_000_003 + self.progress.step + self.workers.rank * 2**40) % 2**63)
        self.net.train()
        tokens = sum(self.samples[row].trained_count for part in rows for row in part)
        mine = [share for part in rows if (share := self.workers.share(part))]
        batches = [self.layout.batch(part) for part in mine]
        with recomputed(self.net, self.settings.grad_checkpoint), noisy_embeddings(self.net, self.settings.neftune):
            try:
                loss, found = gradient.token_weighted(self.value_and_grad, self.vectors, batches, tokens, self.workers)
            except WorkerLost as error:
                self._go_on_alone(error)
                self.save()  # the state is that after the update before
                raise
        norm = gradient_norm(found)
        if not math.isfinite(loss) or not math.isfinite(norm):
            self._stop_at_nan(loss, rows)
        self.rate = learning_rate(self.progress.step, self.updates, self.settings, self.peak)
        set_rate(self.optimizer, self.rate, self.recipe.lora.plus)
        self.good = self.trained  # its loss and gradient are finite
        self.trained = updated(self.optimizer, clipped(found, norm, self.settings.max_grad_norm), self.trained)
        arrays = self.vectors.apart(self.trained)
        mx.eval(self.trained, arrays, self.optimizer.state)
        self.vectors.put(arrays)
        spent = time.perf_counter() - started
        if self.progress.updated(loss, tokens, spent):
            self.on_warning(
                f"the loss has been above {HIGH} times its start ({self.progress.first_train_loss:.3f}) for "
                f"{HIGH_UPDATES} updates, now {loss:.3f}: lower train.learning_rate"
            )

    def _stop_at_nan(self, loss: float, rows: list[list[int]]) -> None:
        self.vectors.put(self.vectors.apart(self.good))
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
            self.anchor_loss = self._mean_nats(self.anchor)
        progress = self.progress
        if progress.step == 0:
            progress.first_anchor_loss = progress.best_anchor_loss = self.anchor_loss
        if not self.valid:
            return None
        loss = self._mean_nats(self.valid)
        if not math.isfinite(loss):
            self.net.load_weights(list(self.best.items()), strict=False)
            folder = self.save()
            raise TrainingError(
                f"the validation loss is {loss} after update {progress.step}; the best adapter so far is in {folder}",
                hint="lower train.learning_rate, or check the base model",
            )
        if progress.validated(loss, self.anchor_loss, self.settings):
            self.best = adapter.trained(self.net)
        return loss

    def log(self, valid_loss: float | None, *, write: bool) -> StepLog:
        """The line of this step, over the updates since the last written one; written if asked or validated."""
        line = StepLog(
            step=self.progress.step,
            train_loss=self.progress.unlogged_nats / self.progress.unlogged_tokens,
            valid_loss=valid_loss,
            learning_rate=self.rate,
            tokens_per_second=self.progress.unlogged_tokens / self.progress.unlogged_seconds,
            peak_memory_gb=mx.get_peak_memory() / 1e9,
            anchor_loss=self.anchor_loss if valid_loss is not None else None,
            answer=self._answer() if valid_loss is not None and self.settings.show_answer else None,
        )
        if write or valid_loss is not None:
            self.progress.logged(append(self.run.log, line) if self.workers.first else 0)
        return line

    def _answer(self) -> str | None:
        """The greedy answer to the first validation row that asks for one, at this point of the training."""
        row = next((each for each in self.valid if each.answer is not None), None)
        if row is None or not self.workers.first:
            return None
        pieces = generate.stream(self.lm, row.tokens[: row.prompt_length], max_tokens=ANSWER_TOKENS)
        return "".join(piece.text for piece in pieces)

    def save(self) -> Path:
        """Writes a checkpoint of the state as it is now, if this is the first worker."""
        if not self.workers.first:
            return self.run.checkpoints
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
            batch_size=self.settings.batch_size,
            grad_accumulation_steps=self.settings.grad_accumulation_steps,
            resumed_at=self.resumed_at,
            stopped_early=progress.exhausted and progress.step < self.updates,
            first_anchor_loss=progress.first_anchor_loss,
            anchor_loss=progress.best_anchor_loss,
        )
        if not self.workers.first:
            return result
        sync_log(self.run.log)  # an adapter that is there has its whole log
        with staged(self.run.adapter) as scratch:
            adapter.save(scratch, self.best, self.adapter_config)
            write_json(scratch / "training.json", asdict(result))
        return result
