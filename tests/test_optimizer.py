"""Schedules, update counts, clipping: hand-worked."""

import math
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlxtune.errors import RecipeError
from mlxtune.optimizer import (
    clipped,
    gradient_norm,
    learning_rate,
    make_optimizer,
    peak_rate,
    set_rate,
    total_updates,
    updates_per_epoch,
)
from mlxtune.recipe import TrainRecipe
from mlxtune.recipe.settings import OPTIMIZERS


def test_updates_count_partial_batches_and_accumulation() -> None:
    assert updates_per_epoch(17, TrainRecipe(batch_size=4)) == 5
    assert updates_per_epoch(17, TrainRecipe(batch_size=4, grad_accumulation_steps=2)) == 3
    assert total_updates(17, TrainRecipe(batch_size=4)) == 15  # three epochs unless told otherwise
    assert total_updates(17, TrainRecipe(batch_size=4, epochs=0.5)) == 3
    assert total_updates(17, TrainRecipe(batch_size=4, epochs=0.01)) == 1
    assert total_updates(17, TrainRecipe(batch_size=4, iters=7)) == 7


def test_learning_rate_warms_up_and_then_follows_the_cosine() -> None:
    train = TrainRecipe(warmup=4, schedule="cosine")
    rates = [learning_rate(update, 12, train, 1.0) for update in range(12)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0
    assert rates[8] == pytest.approx(0.5)  # half of the eight updates behind the warm-up
    assert rates[11] == pytest.approx((1 + math.cos(math.pi * 7 / 8)) / 2)
    assert sorted(rates[4:], reverse=True) == rates[4:]


def test_learning_rate_linear_constant_and_a_share_as_warm_up() -> None:
    linear = TrainRecipe(warmup=0, schedule="linear")
    assert [learning_rate(update, 4, linear, 2.0) for update in range(4)] == [2.0, 1.5, 1.0, 0.5]
    constant = TrainRecipe(warmup=0.5, schedule="constant")
    assert [learning_rate(update, 4, constant, 2.0) for update in range(4)] == [1.0, 2.0, 2.0, 2.0]


def test_the_peak_rate_follows_the_width_unless_it_is_given() -> None:
    assert peak_rate(TrainRecipe(learning_rate=0.5), "lora", 64) == 0.5
    assert peak_rate(TrainRecipe(), "lora", 2048) == peak_rate(TrainRecipe(), "dora", 8192) == 2e-4
    assert peak_rate(TrainRecipe(), "lora", 512) == pytest.approx(4e-4)  # a quarter of the width
    assert peak_rate(TrainRecipe(), "full", 512) == pytest.approx(4e-5)
    assert peak_rate(TrainRecipe(), "lora", None) == 2e-4  # a config that doesn't say


def test_clipping_keeps_the_direction_and_limits_the_norm() -> None:
    gradient = {"a": mx.array([3.0]), "b": mx.array([[4.0]])}
    assert gradient_norm(gradient) == 5.0
    assert clipped(gradient, 5.0, None) is gradient
    assert clipped(gradient, 5.0, 6.0) is gradient
    shorter = clipped(gradient, 5.0, 1.0)
    assert shorter["a"].item() == pytest.approx(0.6)
    assert shorter["b"].item() == pytest.approx(0.8)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_steps_downhill(name: str) -> None:
    optimizer = make_optimizer(TrainRecipe(optimizer=name, learning_rate=0.01))
    weights = {"w": mx.array([[2.0, -1.0], [0.5, 3.0]])}
    before = mx.square(weights["w"]).sum().item()
    for _ in range(5):
        weights = optimizer.apply_gradients({"w": 2 * weights["w"]}, weights)
    assert mx.square(weights["w"]).sum().item() < before


def test_lora_plus_gives_b_its_own_rate() -> None:
    """With plain SGD a step is rate times gradient, so the two can be read off."""
    holder = nn.Module()
    holder.layer = nn.Module()
    holder.layer.lora_a, holder.layer.lora_b = mx.ones((2, 2)), mx.ones((2, 2))
    made = make_optimizer(TrainRecipe(optimizer="sgd"), plus=16.0)
    made.init(holder.trainable_parameters())
    set_rate(made, 0.01, 16.0)
    made.update(holder, {"layer": {"lora_a": mx.ones((2, 2)), "lora_b": mx.ones((2, 2))}})
    np.testing.assert_allclose(np.array(holder.layer.lora_a), 0.99, rtol=1e-6)
    np.testing.assert_allclose(np.array(holder.layer.lora_b), 0.84, rtol=1e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_takes_its_options(name: str) -> None:
    options: dict[str, Any] = {
        "adamw": {"betas": [0.8, 0.9]}, "adam": {"eps": 1e-6}, "sgd": {"momentum": 0.9}, "muon": {"nesterov": False},
        "adafactor": {"clip_threshold": 2.0}, "lion": {"betas": [0.8, 0.9]}, "adamax": {"eps": 1e-6},
        "adagrad": {"eps": 1e-6}, "adadelta": {"rho": 0.8}, "rmsprop": {"alpha": 0.9},
    }  # fmt: skip
    made = make_optimizer(TrainRecipe(optimizer=name, optimizer_options=options[name]))
    for option, value in options[name].items():
        assert getattr(made, option) == value


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"beta": 1}, "train.optimizer_options: adamw has no option 'beta'; it has betas, eps, weight_decay, "),
        (
            {"weight_decay": 0.1},
            "train.optimizer_options: adamw has no option 'weight_decay'; it is train.weight_decay",
        ),
    ],
)
def test_unknown_options_are_refused(options: dict[str, Any], line: str) -> None:
    with pytest.raises(RecipeError) as caught:
        make_optimizer(TrainRecipe(optimizer_options=options))
    assert str(caught.value).startswith(line)
