"""Gradient checkpointing (`tests/cli/test_train.py` has what it saves): the same gradient, and nothing left patched."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlxtune import adapter, model
from mlxtune.data.batches import make_batch
from mlxtune.data.render import Sample
from mlxtune.likelihood import row_nats
from mlxtune.recipe import LoraRecipe
from mlxtune.recompute import recomputed
from tests import zoo
from tests.gradients import difference, loss_and_gradient

SAMPLES = [
    Sample("a:1", np.random.default_rng(length).integers(0, zoo.VOCABULARY, length).tolist(), [True] * length, 0, None)
    for length in (19, 12)
]


def test_same_gradient(tiny: Path) -> None:
    lm = model.load(tiny)
    adapter.attach(lm, LoraRecipe(rank=4), seed=0)
    tokens = mx.random.randint(10, 900, (8, 200), key=mx.random.key(1))
    wanted = mx.arange(8 * 199)
    function = nn.value_and_grad(lm.net, lambda: row_nats(lm.net, tokens, wanted).sum())

    def measured(wanted: bool) -> dict[str, Any]:
        with recomputed(lm.net, wanted):
            return {name: np.array(value) for name, value in tree_flatten(function()[1])}

    plain, saving = measured(False), measured(True)
    assert plain.keys() == saving.keys()
    assert all(np.allclose(plain[name], saving[name], rtol=1e-4, atol=1e-4) for name in plain)


@pytest.mark.parametrize("name", zoo.ARCHITECTURES)
def test_same_gradient_for_an_architecture(name: str) -> None:
    """In some, a block gives others more than its output."""
    net = zoo.build(name)
    batch = make_batch(SAMPLES, [0, 1])
    loss, plain = loss_and_gradient(net, [batch], 1)
    with recomputed(net):
        saving_loss, saving = loss_and_gradient(net, [batch], 1)
    assert saving_loss == pytest.approx(loss, rel=1e-6)
    assert difference(saving, plain) <= 1e-5


def test_nothing_stays_patched(tiny: Path) -> None:
    lm = model.load(tiny)
    kind = type(lm.net.layers[0])
    before = kind.__call__
    with recomputed(lm.net):
        assert kind.__call__ is not before
    assert kind.__call__ is before
    with pytest.raises(KeyError), recomputed(lm.net):
        raise KeyError
    assert kind.__call__ is before
    with recomputed(lm.net, False):
        assert kind.__call__ is before
