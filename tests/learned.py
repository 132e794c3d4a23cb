"""Adapters for tests, learned in a moment on a few rows, and what a network makes of a line of tokens."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.optimizers import Adam

from mlxtune import adapter, likelihood, model
from mlxtune.data.batches import make_batch
from mlxtune.data.render import Sample
from mlxtune.recipe import LoraRecipe

TOKENS = mx.array([[1, 323, 201, 67, 2, 201, 1, 324, 900, 17]])
SAMPLES = [
    Sample(f"rows:{row}", [1, 323, 201, 60 + row, 2, 201, 1, 500 + row, 70 + row, 2], [False] * 7 + [True] * 3, 7, "b")
    for row in range(6)
]


def logits(net: nn.Module) -> Any:
    return np.array(net(TOKENS).astype(mx.float32))


def learn(base: Path, folder: Path, lora: LoraRecipe, steps: int, learning_rate: float) -> Path:
    """A real adapter: `steps` updates on SAMPLES."""
    lm = model.load(base)
    keys = adapter.attach(lm, lora, seed=0)
    batch = make_batch(SAMPLES, list(range(len(SAMPLES))))
    tokens, wanted = mx.array(batch.tokens), mx.array(likelihood.wanted_at(batch.trained))
    optimizer = Adam(learning_rate)
    for _ in range(steps):
        _, gradient = nn.value_and_grad(lm.net, lambda: likelihood.row_nats(lm.net, tokens, wanted).mean())()
        optimizer.update(lm.net, gradient)
        mx.eval(lm.net.parameters())
    folder.mkdir()
    config = adapter.config(lm, lora, keys)
    del config["base_fingerprint"]  # so that it may go onto other copies of the base, as one from elsewhere may
    adapter.save(folder, adapter.trained(lm.net), config)
    return folder


def with_adapter(base: Path, folder: Path) -> model.LanguageModel:
    lm = model.load(base)
    adapter.load(lm, folder)
    return lm
