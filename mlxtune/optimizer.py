"""Optimizers and learning-rate schedules by name, and how many updates a run has. Knows recipes, not networks."""

import inspect
import math
from typing import Any, cast

import mlx.core as mx
import mlx.optimizers as optimizers
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from mlxtune.errors import RecipeError
from mlxtune.recipe import TrainRecipe

DEFAULT_EPOCHS = 3
RATE, RATE_WIDTH = 2e-4, 2048


def total_updates(rows: int, train: TrainRecipe) -> int:
    """Optimizer updates of a run over `rows` rows."""
    if train.iters is not None:
        return train.iters
    return max(1, math.ceil((train.epochs or DEFAULT_EPOCHS) * updates_per_epoch(rows, train)))


def updates_per_epoch(rows: int, train: TrainRecipe) -> int:
    """Optimizer updates that see every row once."""
    return math.ceil(math.ceil(rows / train.batch_size) / train.grad_accumulation_steps)


def peak_rate(train: TrainRecipe, method: str, width: int | None) -> float:
    """The peak learning rate: the recipe's, or one by the model's `width`, the length of its hidden states.

    The best rate falls as models get wider, and is about ten times as high for LoRA as for full tuning (Schulman et
    al. 2025, "LoRA Without Regret", https://thinkingmachines.ai/blog/lora/). `RATE` is what is common for LoRA on
    models of `RATE_WIDTH` and more; below, it grows with the root of the ratio, which is gentler than what was best
    on stories260K (width 64: 2e-3 to 4e-3; this gives 1.1e-3).
    """
    if train.learning_rate is not None:
        return train.learning_rate
    rate = RATE * max(1.0, math.sqrt(RATE_WIDTH / width)) if width else RATE
    return rate / 10 if method == "full" else rate


def learning_rate(update: int, updates: int, train: TrainRecipe, peak: float) -> float:
    """Learning rate of `update` (from 0) of `updates`: linear warm-up to `peak`, then the schedule down towards 0."""
    warmup = math.ceil(train.warmup * updates) if train.warmup < 1 else int(train.warmup)
    if update < warmup:
        return peak * (update + 1) / warmup
    done = (update - warmup) / max(1, updates - warmup)
    course = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[train.schedule]
    return peak * course


def make_optimizer(train: TrainRecipe, plus: float | None = None) -> optimizers.Optimizer:
    """The optimizer of mlx.optimizers with that name and those options; weight decay where it has one.

    With `plus`, the B factors have an optimizer of their own, whose learning rate is `plus` times the other
    (LoRA+, Hayou et al. 2024, https://arxiv.org/abs/2402.12354). Raises RecipeError for an option that it has not.
    """
    one = _one_optimizer(train)
    if plus is None:
        return one
    return optimizers.MultiOptimizer([_one_optimizer(train), one], [lambda name, _: name.endswith("lora_b")])


def set_rate(optimizer: optimizers.Optimizer, rate: float, plus: float | None) -> None:
    """Sets the learning rate of the next update; that of the B factors is `plus` times it."""
    if plus is None:
        optimizer.learning_rate = mx.array(rate)
    else:
        for each, factor in zip(optimizer.optimizers, (plus, 1.0), strict=True):
            each.learning_rate = mx.array(rate * factor)


def _one_optimizer(train: TrainRecipe) -> optimizers.Optimizer:
    kinds: dict[str, tuple[type[optimizers.Optimizer], dict[str, Any]]] = {
        "adamw": (optimizers.AdamW, {"bias_correction": True}),
        "adam": (optimizers.Adam, {"bias_correction": True}),
        "sgd": (optimizers.SGD, {}),
        "adafactor": (optimizers.Adafactor, {"relative_step": False, "scale_parameter": False}),
        "muon": (optimizers.Muon, {}),
        "lion": (optimizers.Lion, {}),
        "adamax": (optimizers.Adamax, {}),
        "adagrad": (optimizers.Adagrad, {}),
        "adadelta": (optimizers.AdaDelta, {}),
        "rmsprop": (optimizers.RMSprop, {}),
    }
    kind, options = kinds[train.optimizer]
    known = list(inspect.signature(kind.__init__).parameters)[2:]  # behind self and the learning rate
    if "weight_decay" in known:
        options = options | {"weight_decay": train.weight_decay}
    unknown = sorted(train.optimizer_options.keys() - set(known) | train.optimizer_options.keys() & {"weight_decay"})
    if unknown:
        hint = "it is train.weight_decay" if unknown[0] == "weight_decay" else f"it has {', '.join(known)}"
        raise RecipeError(f"{train.optimizer} has no option {unknown[0]!r}", where="train.optimizer_options", hint=hint)
    try:
        return kind(train.learning_rate or RATE, **(options | train.optimizer_options))
    except (TypeError, ValueError) as error:
        raise RecipeError(f"{train.optimizer} refuses them: {error}", where="train.optimizer_options") from None


def updated(
    optimizer: optimizers.Optimizer, gradient: dict[str, mx.array], trained: dict[str, mx.array]
) -> dict[str, mx.array]:
    """`trained`, by name, after an update along the `gradient`."""
    one, other = (tree_unflatten(list(arrays.items())) for arrays in (gradient, trained))
    return dict(tree_flatten(optimizer.apply_gradients(one, other)))


def gradient_norm(gradient: Any) -> float:
    """The Euclidean norm of all gradients together."""
    squares = [mx.square(each.astype(mx.float32)).sum() for _, each in tree_flatten(gradient)]
    return cast(float, mx.sqrt(mx.stack(squares).sum()).item())


def clipped(gradient: Any, norm: float, limit: float | None) -> Any:
    """`gradient`, whose norm is `norm`, scaled down to `limit` where it is longer."""
    if limit is None or norm <= limit:
        return gradient
    return tree_map(lambda each: each * (limit / norm), gradient)
