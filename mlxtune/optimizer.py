"""Optimizers and learning-rate schedules by name, and how many updates a run has. Knows recipes, not networks."""

import math
from collections.abc import Callable
from typing import Any, cast

import mlx.core as mx
import mlx.optimizers as optimizers
from mlx.utils import tree_flatten, tree_map

from mlxtune.recipe import TrainRecipe

DEFAULT_EPOCHS = 3


def total_updates(rows: int, train: TrainRecipe) -> int:
    """Optimizer updates of a run over `rows` rows."""
    if train.iters is not None:
        return train.iters
    return max(1, math.ceil((train.epochs or DEFAULT_EPOCHS) * updates_per_epoch(rows, train)))


def updates_per_epoch(rows: int, train: TrainRecipe) -> int:
    """Optimizer updates that see every row once."""
    return math.ceil(math.ceil(rows / train.batch_size) / train.grad_accumulation_steps)


def learning_rate(update: int, updates: int, train: TrainRecipe) -> float:
    """Learning rate of `update` (from 0) of `updates`: linear warm-up to the peak, then the schedule down towards 0."""
    warmup = math.ceil(train.warmup * updates) if train.warmup < 1 else int(train.warmup)
    if update < warmup:
        return train.learning_rate * (update + 1) / warmup
    done = (update - warmup) / max(1, updates - warmup)
    course = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[train.schedule]
    return train.learning_rate * course


def make_optimizer(train: TrainRecipe) -> optimizers.Optimizer:
    """The optimizer of mlx.optimizers with that name; weight decay where it has one."""
    rate, decay = train.learning_rate, train.weight_decay
    made: dict[str, Callable[[], optimizers.Optimizer]] = {
        "adamw": lambda: optimizers.AdamW(rate, weight_decay=decay, bias_correction=True),
        "adam": lambda: optimizers.Adam(rate, bias_correction=True),
        "sgd": lambda: optimizers.SGD(rate, weight_decay=decay),
        "adafactor": lambda: optimizers.Adafactor(rate, relative_step=False, scale_parameter=False, weight_decay=decay),
        "muon": lambda: optimizers.Muon(rate, weight_decay=decay),
        "lion": lambda: optimizers.Lion(rate, weight_decay=decay),
    }
    return made[train.optimizer]()


def gradient_norm(gradient: Any) -> float:
    """The Euclidean norm of all gradients together."""
    squares = [mx.square(each.astype(mx.float32)).sum() for _, each in tree_flatten(gradient)]
    return cast(float, mx.sqrt(mx.stack(squares).sum()).item())


def clipped(gradient: Any, norm: float, limit: float | None) -> Any:
    """`gradient`, whose norm is `norm`, scaled down to `limit` where it is longer."""
    if limit is None or norm <= limit:
        return gradient
    return tree_map(lambda each: each * (limit / norm), gradient)
