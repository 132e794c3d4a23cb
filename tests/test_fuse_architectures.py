"""Fusing on other architectures: experts, latent attention, biases, joined projections; mlx-lm reads the result."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlxtune import adapter, model
from mlxtune.convert import convert
from mlxtune.data.render import Sample
from mlxtune.fuse import fuse
from mlxtune.recipe import FuseRecipe, LoraRecipe, QuantizeRecipe
from tests.test_sources import write_zoo

# isort: split
import mlx_lm

SAMPLES = [
    Sample(f"r:{n}", [1, 40, 200 + n, 7, 250, 12, 2, 9 + n], [False] * 4 + [True] * 4, 4, None) for n in range(12)
]
TOKENS = mx.array([[1, 40, 203, 7, 250, 12, 2, 12]])


def logits(net: nn.Module) -> Any:
    return np.array(net(TOKENS).astype(mx.float32))


def adapted(base: Path, folder: Path) -> Any:
    """Makes an adapter on every linear layer that changes what the model says; returns its logits."""
    lm = model.load(base)
    lora = LoraRecipe(rank=4)
    keys = adapter.attach(lm, lora, seed=0)
    for _, layer in adapter.adapted_layers(lm.net):
        layer.lora_b = mx.random.normal(layer.lora_b.shape, scale=0.05)
    folder.mkdir()
    adapter.save(folder, adapter.trained(lm.net), adapter.config(lm, lora, keys))
    return logits(lm.net)


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "gpt_oss", "phi3", "lfm2"])
def test_fused_is_base_and_adapter(name: str, tiny: Path, tmp_path: Path) -> None:
    dense, packed, tuned = tmp_path / "dense", tmp_path / "packed", tmp_path / "tuned"
    write_zoo(name, dense, tiny)
    wanted = adapted(dense, tuned)
    assert np.abs(wanted - logits(model.load(dense).net)).max() > 0.1
    fuse(dense, tuned, tmp_path / "fused", FuseRecipe())
    plain, _ = mlx_lm.load(str(tmp_path / "fused"))
    np.testing.assert_allclose(logits(plain), wanted, atol=1e-4)

    convert(dense, packed, quantize=QuantizeRecipe(bits=4, group_size=32))
    adapted(packed, tmp_path / "packed-tuned")
    settings = FuseRecipe(keep=0, aim=0)
    found = [
        fuse(packed, tmp_path / "packed-tuned", tmp_path / f"packed-{len(rows)}", settings, SAMPLES, rows)
        for rows in ((), SAMPLES)
    ]
    blind, fitted = (each.kl for each in found)
    assert fitted is not None and blind is not None and fitted < 0.6 * blind
    plain, _ = mlx_lm.load(str(tmp_path / f"packed-{len(SAMPLES)}"))
    np.testing.assert_allclose(logits(plain), logits(model.load(tmp_path / f"packed-{len(SAMPLES)}").net), atol=1e-3)
