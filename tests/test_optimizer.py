"""Schedules, update counts, clipping: hand-worked."""

import math

import mlx.core as mx
import pytest

from mlxtune.optimizer import clipped, gradient_norm, learning_rate, make_optimizer, total_updates, updates_per_epoch
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
    train = TrainRecipe(learning_rate=1.0, warmup=4, schedule="cosine")
    rates = [learning_rate(update, 12, train) for update in range(12)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0
    assert rates[8] == pytest.approx(0.5)  # half of the eight updates behind the warm-up
    assert rates[11] == pytest.approx((1 + math.cos(math.pi * 7 / 8)) / 2)
    assert sorted(rates[4:], reverse=True) == rates[4:]


def test_learning_rate_linear_constant_and_a_share_as_warm_up() -> None:
    linear = TrainRecipe(learning_rate=2.0, warmup=0, schedule="linear")
    assert [learning_rate(update, 4, linear) for update in range(4)] == [2.0, 1.5, 1.0, 0.5]
    constant = TrainRecipe(learning_rate=2.0, warmup=0.5, schedule="constant")
    assert [learning_rate(update, 4, constant) for update in range(4)] == [1.0, 2.0, 2.0, 2.0]


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
