"""Conversion of many architectures, against mlx-lm's own: the same layers, weights, configs and logits."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map_with_path

from mlxtune.convert import convert, dequantize
from mlxtune.recipe import QuantizeRecipe
from tests.test_sources import apart, write_zoo

# isort: split
import mlx_lm
from mlx_lm.utils import load_model, quantize_model

# of tied heads, experts, predicates of the architecture's own, layers with a state, latent attention
ARCHITECTURES = [
    "llama", "gemma3_text", "qwen2_moe", "qwen3_moe", "qwen3_next", "mixtral", "deepseek_v3", "gpt_oss", "gpt2",
    "lfm2", "minimax", "olmo2", "phi3", "longcat_flash", "step3p5", "nanochat",
]  # fmt: skip
TOKENS = mx.array([[1, 40, 300, 7, 900, 12, 2]])


def reference(folder: Path, dtype: mx.Dtype | None = None) -> tuple[dict[str, mx.array], Any]:
    """The weights that mlx-lm's own functions make in 4 bits and groups of 32, and their config."""
    net, config = load_model(folder)
    if dtype is not None:
        wanted = getattr(net, "cast_predicate", lambda name: True)
        cast = tree_map_with_path(
            lambda name, each: each.astype(dtype) if wanted(name) and mx.issubdtype(each.dtype, mx.floating) else each,
            net.parameters(),
        )
        net.update(cast)
    net, config = quantize_model(net, config, 32, 4)
    return dict(tree_flatten(net.parameters())), config["quantization"]


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_rounding_is_that_of_mlx_lm(name: str, dtype: str | None, tiny: Path, tmp_path: Path) -> None:
    weights = write_zoo(name, tmp_path / "model", tiny)
    if name == "mixtral":
        mx.save_safetensors(str(tmp_path / "model" / "model.safetensors"), apart(weights))
    expected, described = reference(tmp_path / "model", mx.bfloat16 if dtype else None)
    done = convert(
        tmp_path / "model", tmp_path / "out", quantize=QuantizeRecipe(group_size=32, method="rtn"), dtype=dtype
    )
    stored = mx.load(str(tmp_path / "out" / "model.safetensors"))
    assert stored.keys() == expected.keys()
    for key, each in expected.items():
        assert stored[key].dtype == each.dtype, key
        assert mx.array_equal(stored[key], each).item(), key
    written = json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]
    own = {key: value for key, value in described.items() if isinstance(value, dict) and f"{key}.scales" in expected}
    assert written == {"group_size": 32, "bits": 4, "mode": "affine"} | {
        key: {"mode": "affine"} | value for key, value in own.items() if value != {"group_size": 32, "bits": 4}
    }
    assert done.bits_per_weight == 8 * sum(each.nbytes for each in expected.values()) / done.parameters
    packed = {key.removesuffix(".scales") for key in expected if key.endswith(".scales")}
    assert {layer.name for layer in done.layers if layer.packing is not None} == packed


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "gpt_oss", "qwen3_next"])
def test_dense_again(name: str, tiny: Path, tmp_path: Path) -> None:
    """Experts and latent attention too: dense layers compute what the packed ones do, in plain mlx-lm."""
    write_zoo(name, tmp_path / "model", tiny)
    convert(tmp_path / "model", tmp_path / "q", quantize=QuantizeRecipe(group_size=32))
    dequantize(tmp_path / "q", tmp_path / "out")
    packed, _ = mlx_lm.load(str(tmp_path / "q"))
    plain, _ = mlx_lm.load(str(tmp_path / "out"))
    assert not any("scales" in key for key, _ in tree_flatten(plain.parameters()))
    np.testing.assert_allclose(plain(TOKENS), packed(TOKENS), atol=2e-4)


def peak_bytes(blocks: int, tiny: Path, folder: Path) -> tuple[int, int]:
    """What MLX holds at most while it packs a Llama of so many blocks, and the bytes of the Llama."""
    types = ["full_attention"] * blocks
    shape = {
        "num_hidden_layers": blocks,
        "layer_types": types,
        "hidden_size": 256,
        "intermediate_size": 704,
        "vocab_size": 1024,
    }
    weights = write_zoo("llama", folder / f"{blocks}", tiny, **shape)
    size = sum(each.nbytes for each in weights.values())
    del weights
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    convert(folder / f"{blocks}", folder / f"{blocks}-q", quantize=QuantizeRecipe(method="rtn"))
    return mx.get_peak_memory() - before, size


def test_the_peak_does_not_grow_with_the_model(tiny: Path, tmp_path: Path) -> None:
    small, _ = peak_bytes(3, tiny, tmp_path)
    large, size = peak_bytes(15, tiny, tmp_path)
    assert large < 1.15 * small + 2**20
    assert large < size / 4
