"""Gradient checkpointing (`tests/cli/test_train.py` has what it saves): the same gradient, and nothing left patched."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlxtune import adapter, model
from mlxtune.likelihood import row_nats
from mlxtune.recipe import LoraRecipe
from mlxtune.recompute import recomputed


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
