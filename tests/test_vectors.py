"""What is trained as a few vectors: nothing is lost or moved, and an optimizer does to them what it does to each."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlxtune import adapter, model
from mlxtune.optimizer import make_optimizer, set_rate, updated
from mlxtune.recipe import LoraRecipe, TrainRecipe
from mlxtune.vectors import ELEMENTWISE, Vectors

OPTIONS: dict[str, dict[str, Any]] = {"sgd": {"momentum": 0.9}}


@pytest.fixture
def lm(tiny: Path) -> model.LanguageModel:
    made = model.load(tiny)
    adapter.attach(made, LoraRecipe(rank=4, method="dora"), seed=1)
    return made


def drawn(arrays: dict[str, mx.array], seed: int) -> dict[str, mx.array]:
    random = np.random.default_rng(seed)
    return {name: mx.array(random.normal(0, 1, each.shape).astype(np.float32)) for name, each in arrays.items()}


def equal(one: dict[str, mx.array], other: dict[str, mx.array]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def test_a_vector_for_each_kind(lm: model.LanguageModel) -> None:
    vectors, before = Vectors.of(lm.net, joined=True), adapter.trained(lm.net)
    now = vectors.join(vectors.now())
    assert {name: each.ndim for name, each in now.items()} == {"lora_a": 1, "lora_b": 1, "m": 1}
    assert sum(each.size for each in now.values()) == sum(each.size for each in before.values())
    assert equal(vectors.apart(now), before)
    changed = drawn(before, 2)
    vectors.put(vectors.apart(vectors.join(changed)))
    assert equal(adapter.trained(lm.net), changed)


def test_or_each_array_by_itself(lm: model.LanguageModel) -> None:
    vectors, before = Vectors.of(lm.net, joined=False), adapter.trained(lm.net)
    assert equal(vectors.join(vectors.now()), before)
    assert equal(vectors.apart(before), before)


def test_kept(lm: model.LanguageModel) -> None:
    vectors, before = Vectors.of(lm.net, joined=True), adapter.trained(lm.net)
    changed = drawn(before, 2)
    with pytest.raises(ZeroDivisionError), vectors.kept():
        vectors.put(changed)
        assert equal(adapter.trained(lm.net), changed)
        raise ZeroDivisionError
    assert equal(adapter.trained(lm.net), before)


@pytest.mark.parametrize("plus", [None, 4.0], ids=["one rate", "two rates"])
@pytest.mark.parametrize("name", sorted(ELEMENTWISE))
def test_updates_are_those_of_each_array(lm: model.LanguageModel, name: str, plus: float | None) -> None:
    """To the bit, over three updates with weight decay."""
    settings = TrainRecipe(optimizer=name, optimizer_options=OPTIONS.get(name, {}), weight_decay=0.1)
    ends: list[dict[str, mx.array]] = []
    for joined in (True, False):
        vectors, optimizer = Vectors.of(lm.net, joined=joined), make_optimizer(settings, plus)
        trained = vectors.join(drawn(adapter.trained(lm.net), 3))
        for update in range(3):
            set_rate(optimizer, 0.01, plus)
            gradient = vectors.join(drawn(adapter.trained(lm.net), 4 + update))
            trained = updated(optimizer, gradient, trained)
        ends.append(vectors.apart(trained))
    assert equal(*ends)
    moved = {key: value - drawn(adapter.trained(lm.net), 3)[key] for key, value in ends[0].items()}
    assert all(mx.abs(value).max() > 0 for value in moved.values())


def test_an_optimizer_keeps_a_few_arrays(lm: model.LanguageModel) -> None:
    optimizer = make_optimizer(TrainRecipe(optimizer="adam"))
    vectors = Vectors.of(lm.net, joined=True)
    optimizer.init(vectors.join(vectors.now()))
    assert {name.rpartition(".")[0] for name, _ in tree_flatten(optimizer.state)} == {"", "lora_a", "lora_b", "m"}
