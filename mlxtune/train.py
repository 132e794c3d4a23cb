"""Trains a LoRA adapter: loop, loss, schedule, validation, checkpoints. Knows samples and a model, not files of data.

The loss is the mean negative log-likelihood in nats over exactly the supervised tokens of an update, however they are
spread over its batches. Every row is seen once an epoch. A rerun continues at the newest checkpoint and ends with
the same adapter, because the order of rows and the dropout are functions of seed, epoch and step alone.
"""

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from mlxtune import adapter, checkpoint, likelihood, machine
from mlxtune.data.batches import Batch, epoch_order, make_batch
from mlxtune.data.render import Sample
from mlxtune.errors import DataError, Interrupted, OutputError, TrainingError
from mlxtune.model import LanguageModel, parameter_count
from mlxtune.recipe import Recipe, TrainRecipe
from mlxtune.rundir import RunDir, make_folder, refuse_existing, staged, storage_error, write_json

Stop = Callable[[], int | None]  # the number of a signal that asks to stop, or None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepLog:
    """One line of the log. Losses in nats per supervised token; speed in supervised tokens per second."""

    step: int
    train_loss: float
    valid_loss: float | None
    learning_rate: float
    tokens_per_second: float
    peak_memory_gb: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainResult:
    """What training did. `trained_tokens` counts supervised tokens, each time they are seen."""

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


@dataclass(slots=True)
class _Progress:
    """What a checkpoint keeps beside the arrays."""

    step: int = 0
    best_step: int = 0
    first_valid_loss: float | None = None
    best_valid_loss: float | None = None
    last_train_loss: float = math.nan
    trained_tokens: int = 0
    seconds: float = 0.0
    log_bytes: int = 0


def ignore(log: StepLog, steps: int) -> None:
    """An `on_step` that does nothing."""


def total_steps(rows: int, train: TrainRecipe) -> int:
    """Optimizer updates of a run."""
    if train.iters is not None:
        return train.iters
    return max(1, math.ceil((train.epochs or 3) * updates_per_epoch(rows, train)))


def updates_per_epoch(rows: int, train: TrainRecipe) -> int:
    """Optimizer updates that see every row once."""
    return math.ceil(math.ceil(rows / train.batch_size) / train.grad_accumulation_steps)


def learning_rate(step: int, steps: int, train: TrainRecipe) -> float:
    """Learning rate of update `step` (from 0) of `steps`: linear warm-up to the peak, then the schedule down to 0."""
    warmup = math.ceil(train.warmup * steps) if train.warmup < 1 else int(train.warmup)
    if step < warmup:
        return train.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    course = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[train.schedule]
    return train.learning_rate * course


def make_optimizer(train: TrainRecipe) -> optimizers.Optimizer:
    """The optimizer of mlx.optimizers by its name; weight decay where it has one."""
    made: dict[str, Callable[[], optimizers.Optimizer]] = {
        "adamw": lambda: optimizers.AdamW(train.learning_rate, weight_decay=train.weight_decay, bias_correction=True),
        "adam": lambda: optimizers.Adam(train.learning_rate, bias_correction=True),
        "sgd": lambda: optimizers.SGD(train.learning_rate, weight_decay=train.weight_decay),
        "adafactor": lambda: optimizers.Adafactor(
            train.learning_rate, relative_step=False, scale_parameter=False, weight_decay=train.weight_decay
        ),
        "muon": lambda: optimizers.Muon(train.learning_rate, weight_decay=train.weight_decay),
        "lion": lambda: optimizers.Lion(train.learning_rate, weight_decay=train.weight_decay),
    }
    return made[train.optimizer]()


def update_order(samples: Sequence[Sample], recipe: Recipe) -> Iterator[list[list[int]]]:
    """Row indices of each batch of each update, epoch after epoch, without end. No update spans two epochs."""
    lengths = [len(sample.tokens) for sample in samples]
    accumulate = recipe.train.grad_accumulation_steps
    epoch = 0
    while True:
        batches = epoch_order(lengths, recipe.train.batch_size, recipe.seed, epoch)
        for start in range(0, len(batches), accumulate):
            yield batches[start : start + accumulate]
        epoch += 1


def token_weighted_gradient(
    value_and_grad: Callable[..., tuple[mx.array, Any]], batches: Sequence[Batch]
) -> tuple[float, Any, int]:
    """Loss, gradient and supervised tokens of one update: equal to those of the one big batch."""
    tokens = sum(int(batch.trained[:, 1:].sum()) for batch in batches)
    total, gradient = 0.0, None
    for batch in batches:
        nats, part = value_and_grad(mx.array(batch.tokens), mx.array(batch.trained))
        gradient = part if gradient is None else tree_map(lambda a, b: a + b, gradient, part)
        mx.eval(nats, gradient)
        total += cast(float, nats.item())
    return total / tokens, tree_map(lambda g: g / tokens, gradient), tokens


def gradient_norm(gradient: Any) -> float:
    """The Euclidean norm of all gradients together."""
    squares = [mx.square(g.astype(mx.float32)).sum() for _, g in tree_flatten(gradient)]
    return cast(float, mx.sqrt(mx.stack(squares).sum()).item())


def train(
    lm: LanguageModel,
    samples: Sequence[Sample],
    valid: Sequence[Sample],
    recipe: Recipe,
    out: Path,
    *,
    on_step: Callable[[StepLog, int], None] = ignore,
    on_warning: Callable[[str], None] = lambda text: None,
    stop: Stop = lambda: None,
) -> TrainResult:
    """Trains an adapter on `lm` and leaves `out/adapter/`, the best by validation loss, and `out/log.jsonl`.

    `lm.net` carries the adapter afterwards. Continues at the newest checkpoint in `out/checkpoints/`.
    Raises DataError for samples without supervised tokens, TrainingError when the loss or gradient is not finite
    (the last good adapter is then in `out/checkpoints/`), and Interrupted after a checkpoint when `stop` says so.
    """
    run = RunDir(out)
    refuse_existing(run.adapter, "--out")
    _check_samples(samples, valid)
    settings = recipe.train
    steps = total_steps(len(samples), settings)
    eval_every = settings.eval_every or max(1, round(steps / 10))
    pad_multiple, value_and_grad = _compute(lm, recipe)
    adapter_config = adapter.config(lm.net, recipe.lora, _attached(lm, recipe), str(lm.path))
    optimizer = make_optimizer(settings)
    optimizer.init(lm.net.trainable_parameters())

    progress = _Progress()
    best = _copy(lm.net)
    resumed_at = None
    found, damaged = checkpoint.newest(run.checkpoints)
    for folder in damaged:
        on_warning(f"{folder} is damaged and is passed over")
    if found is not None:
        progress, best = _restore(found, lm.net, optimizer)
        resumed_at = progress.step
    _trim_log(run.log, progress.log_bytes)

    def save_checkpoint() -> Path:
        arrays = {"adapters": adapter.factors(lm.net), "best": best, "optimizer": dict(tree_flatten(optimizer.state))}
        return checkpoint.save(
            run.checkpoints, checkpoint.Checkpoint(progress.step, asdict(progress), arrays), adapter_config
        )

    def validate() -> float | None:
        nonlocal best
        if not valid:
            return None
        loss = likelihood.mean_nats(lm.net, valid, settings.batch_size)
        if progress.first_valid_loss is None:
            progress.first_valid_loss = loss
        if progress.best_valid_loss is None or loss < progress.best_valid_loss:
            progress.best_valid_loss, progress.best_step, best = loss, progress.step, _copy(lm.net)
        lm.net.train()
        return loss

    mx.reset_peak_memory()
    lm.net.train()
    if progress.step == 0:
        valid_loss = validate()
        if valid_loss is not None and not math.isfinite(valid_loss):
            raise TrainingError(
                "the validation loss is not finite before the first update", hint="check the base model"
            )
    order = update_order(samples, recipe)
    for _ in range(progress.step):
        next(order)
    report_tokens, report_seconds, report_nats = 0, 0.0, 0.0
    while progress.step < steps:
        started = time.perf_counter()
        rate = learning_rate(progress.step, steps, settings)
        optimizer.learning_rate = mx.array(rate)
        mx.random.seed((recipe.seed * 1_000_003 + progress.step) % 2**63)  # dropout is a function of seed and step
        batches = [make_batch(samples, rows, pad_multiple) for rows in next(order)]
        loss, gradient, tokens = token_weighted_gradient(value_and_grad, batches)
        norm = gradient_norm(gradient)
        if not math.isfinite(loss) or not math.isfinite(norm):
            _stop_at_nan(progress, batches, samples, loss, save_checkpoint)
        if settings.max_grad_norm is not None:
            factor = min(1.0, settings.max_grad_norm / (norm + 1e-12))
            gradient = tree_map(lambda g, factor=factor: g * factor, gradient)
        optimizer.update(lm.net, gradient)
        mx.eval(lm.net.trainable_parameters(), optimizer.state)

        spent = time.perf_counter() - started
        progress.step += 1
        progress.trained_tokens += tokens
        progress.last_train_loss = loss
        progress.seconds += spent
        report_tokens, report_seconds = report_tokens + tokens, report_seconds + spent
        report_nats += loss * tokens
        last = progress.step == steps
        valid_loss = validate() if last or progress.step % eval_every == 0 else None
        line = StepLog(
            step=progress.step,
            train_loss=report_nats / report_tokens,
            valid_loss=valid_loss,
            learning_rate=rate,
            tokens_per_second=report_tokens / report_seconds,
            peak_memory_gb=mx.get_peak_memory() / 1e9,
        )
        if last or valid_loss is not None or progress.step % settings.report_every == 0:
            progress.log_bytes = _append(run.log, asdict(line))
            report_tokens, report_seconds, report_nats = 0, 0.0, 0.0
        on_step(line, steps)
        signal_number = stop()
        if not last and (signal_number is not None or progress.step % settings.save_every == 0):
            folder = save_checkpoint()
            if signal_number is not None:
                raise Interrupted(
                    f"stopped after update {progress.step} of {steps}; {folder} keeps it",
                    signal_number=signal_number,
                    hint="run the same command to go on",
                )

    if not valid:
        best, progress.best_step = adapter.factors(lm.net), progress.step
    lm.net.load_weights(list(best.items()), strict=False)
    lm.net.eval()
    result = TrainResult(
        steps=steps,
        best_step=progress.best_step,
        first_valid_loss=progress.first_valid_loss,
        best_valid_loss=progress.best_valid_loss,
        last_train_loss=progress.last_train_loss,
        trained_tokens=progress.trained_tokens,
        rows=len(samples),
        epochs=steps / updates_per_epoch(len(samples), settings),
        seconds=progress.seconds,
        tokens_per_second=progress.trained_tokens / progress.seconds,
        peak_memory_gb=mx.get_peak_memory() / 1e9,
        trainable_parameters=sum(value.size for value in best.values()),
        parameters=parameter_count(lm.net),
        resumed_at=resumed_at,
    )
    with staged(run.adapter) as scratch:
        adapter.save(scratch, best, adapter_config)
        write_json(scratch / "training.json", asdict(result))
    return result


def _check_samples(samples: Sequence[Sample], valid: Sequence[Sample]) -> None:
    if not samples:
        raise DataError("there are no rows to train on", hint="give a train file with rows")
    for sample in (*samples, *valid):
        if not any(sample.trained[1:]):
            raise DataError("has no token to learn", where=sample.where, hint="give it an answer or delete it")


def _attached(lm: LanguageModel, recipe: Recipe) -> list[str]:
    return adapter.attach(lm.net, recipe.lora, recipe.seed)


def _compute(lm: LanguageModel, recipe: Recipe) -> tuple[int, Callable[..., tuple[mx.array, Any]]]:
    """Padding and the function from a batch to its summed nats and their gradient, as the machine's policy says."""
    policy = machine.compute_policy(
        device=machine.device_kind(), memory_bytes=machine.memory_bytes(), float32_bytes=4 * parameter_count(lm.net)
    )
    net = lm.net

    def nats(tokens: mx.array, trained: mx.array) -> mx.array:
        return likelihood.row_nats(net, tokens, trained).sum()

    function: Callable[..., tuple[mx.array, Any]] = nn.value_and_grad(net, nats)
    if policy.compile:
        state = [net.state, mx.random.state]
        function = mx.compile(function, inputs=state, outputs=[mx.random.state])
    return policy.pad_multiple, function


def _copy(net: nn.Module) -> dict[str, mx.array]:
    """The adapter's tensors as they are now: updates make new arrays, so holding these keeps them."""
    return dict(adapter.factors(net))


def _restore(
    found: checkpoint.Checkpoint, net: nn.Module, optimizer: optimizers.Optimizer
) -> tuple[_Progress, dict[str, mx.array]]:
    expected = {name: value.shape for name, value in adapter.factors(net).items()}
    if {name: value.shape for name, value in found.arrays["adapters"].items()} != expected:
        raise OutputError("its checkpoints belong to another recipe", hint="choose another --out")
    net.load_weights(list(found.arrays["adapters"].items()), strict=False)
    optimizer.state = tree_unflatten(list(found.arrays["optimizer"].items()))
    return _Progress(**found.state), found.arrays["best"]


def _stop_at_nan(
    progress: _Progress, batches: Sequence[Batch], samples: Sequence[Sample], loss: float, save: Callable[[], Path]
) -> None:
    folder = save()
    rows = [samples[row].where for batch in batches for row in batch.rows]
    shown = ", ".join(rows[:3]) + (f" and {len(rows) - 3} more" if len(rows) > 3 else "")
    raise TrainingError(
        f"loss or gradient is not finite (loss {loss}) in update {progress.step + 1}, rows {shown}; "
        f"the last good adapter is {folder}",
        hint="lower train.learning_rate or look at these rows",
    )


def _append(log: Path, line: dict[str, Any]) -> int:
    """Adds a line to the log; returns its size in bytes."""
    make_folder(log.parent)
    try:
        with log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            return file.tell()
    except OSError as error:
        raise storage_error(error, log) from error


def _trim_log(log: Path, size: int) -> None:
    """Cuts the lines that were written after the checkpoint that training goes on from."""
    with contextlib.suppress(FileNotFoundError), log.open("r+b") as file:
        file.truncate(size)
