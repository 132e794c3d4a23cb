"""Models: none runs code, saved ones load in plain mlx-lm, layers are dequantized exactly."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.mla import MultiLinear
from mlx_lm.models.switch_layers import SwitchLinear

from mlxtune import machine, model, precision
from mlxtune.errors import ModelError, TrustError
from tests import zoo
from tests.spoil import add_token, set_json, set_tensor, with_code

# isort: split
import mlx_lm  # after mlxtune.model, which keeps its import from lowering the limit of open files

TOKENS = mx.array([[1, 323, 201, 67, 2, 201, 1, 324]])
PACKINGS = [
    *(("affine", bits, group) for bits in (2, 3, 4, 5, 6, 8) for group in (32, 64)),
    ("mxfp4", 4, 32), ("nvfp4", 4, 16), ("mxfp8", 8, 32),
]  # fmt: skip


def logits(net: nn.Module) -> Any:
    return np.array(net(TOKENS))


@pytest.fixture
def folder(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the embedded model that a test may spoil."""
    return Path(shutil.copytree(tiny, tmp_path / "model"))


def test_a_model_that_brings_code_is_not_trusted(folder: Path) -> None:
    (folder / "own.py").write_text(f"open({str(folder / 'RAN')!r}, 'w')\n")
    set_json("config.json", model_file="own.py")(folder)
    with pytest.raises(TrustError) as caught:
        model.load(folder)
    line = "DIR: asks to run its own code, own.py; mlxtune runs no code from model folders"
    assert str(caught.value).replace(str(folder), "DIR") == line
    assert caught.value.exit_code == 4
    assert not (folder / "RAN").exists()


def test_a_tokenizer_that_brings_code_is_not_trusted_and_nobody_is_asked(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_code(folder)
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # the answer to transformers' question
    with pytest.raises(TrustError) as caught:
        model.load(folder)
    line = "DIR: has a tokenizer that asks to run its own code; mlxtune runs no code from model folders"
    assert str(caught.value).replace(str(folder), "DIR") == line
    assert not (folder / "RAN").exists()


def test_a_control_token_that_nobody_writes_may_lack_an_embedding(folder: Path) -> None:
    """Gemma 3 has one for images: 262,145 tokens for 262,144 embeddings."""
    add_token("<image>", special=True)(folder)
    assert len(model.load(folder).tokenizer) == 1025


def test_a_control_token_of_the_template_may_not(folder: Path) -> None:
    add_token("<|turn|>", special=True)(folder)
    set_json("tokenizer_config.json", chat_template="{{ messages[0].content }}<|turn|>")(folder)
    with pytest.raises(ModelError, match="1025 tokens for 1024 embeddings"):
        model.load(folder)


def test_check_reads_no_weights(folder: Path) -> None:
    set_tensor("model.norm.weight", mx.full((192,), float("nan")))(folder)
    assert model.check(folder)["model_type"] == "llama"


def test_the_limit_of_open_files_is_left_alone() -> None:
    code = """
import resource
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (1000, hard))
import mlxtune.model, mlxtune.adapter, mlxtune.fuse, mlxtune.convert
assert resource.getrlimit(resource.RLIMIT_NOFILE) == (1000, hard), resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (999, hard))  # others may still change it
assert resource.getrlimit(resource.RLIMIT_NOFILE) == (999, hard)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_loading_computes_in_float32_on_a_cpu(tiny: Path, tmp_path: Path) -> None:
    stored = model.load(tiny, stored=True)
    stored.net.set_dtype(mx.bfloat16)
    save(stored, tmp_path / "half")
    half, computing = model.load(tmp_path / "half", stored=True), model.load(tmp_path / "half")
    assert half.net.model.norm.weight.dtype == mx.bfloat16
    if machine.device_kind() == "cpu":
        assert computing.net.model.norm.weight.dtype == mx.float32
    assert (computing.context_length, computing.has_chat_template) == (512, True)


@pytest.mark.parametrize(
    ("config", "width"),
    [
        ({"hidden_size": 64, "n_embd": 1}, 64),
        ({"n_embd": 768}, 768),
        ({"text_config": {"hidden_size": 2560}, "vision_config": {"hidden_size": 1}}, 2560),
        ({"hidden_size": "64"}, None),
        ({}, None),
    ],
)
def test_the_width_of_a_model(config: dict[str, Any], width: int | None) -> None:
    assert model.width(config) == width


def save(lm: model.LanguageModel, folder: Path) -> None:
    folder.mkdir()
    model.save(folder, lm.net, lm.config, lm.path)


FILES = ["config.json", "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json"]


def test_saved_folders_load_in_plain_mlx_lm(tiny: Path, tmp_path: Path) -> None:
    lm = model.load(tiny)
    save(lm, tmp_path / "copy")
    assert sorted(each.name for each in (tmp_path / "copy").iterdir()) == sorted([*FILES, "model.safetensors"])
    plain, tokenizer = mlx_lm.load(str(tmp_path / "copy"))
    np.testing.assert_array_equal(logits(plain), logits(lm.net))
    np.testing.assert_array_equal(logits(model.load(tmp_path / "copy").net), logits(lm.net))
    assert tokenizer.encode("Grüße 🙂") == lm.tokenizer.encode("Grüße 🙂")
    assert tokenizer.chat_template == lm.tokenizer.chat_template
    assert json.loads((tmp_path / "copy" / "config.json").read_text()) == json.loads((tiny / "config.json").read_text())


def test_saved_in_shards(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlxtune.shards.SHARD_BYTES", 1_500_000)
    lm = model.load(tiny)
    save(lm, tmp_path / "copy")
    shards = [f"model-{number:05d}-of-00004.safetensors" for number in range(1, 5)]
    assert sorted(each.name for each in (tmp_path / "copy").iterdir()) == sorted([*FILES, *shards])
    assert [each.name for each in model.weight_files(tmp_path / "copy")] == shards
    found: dict[str, str] = {}
    for name in shards:
        tensors = mx.load(str(tmp_path / "copy" / name))
        assert sum(each.nbytes for each in tensors.values()) <= 1_500_000
        found |= dict.fromkeys(tensors, name)
    written = json.loads((tmp_path / "copy" / "model.safetensors.index.json").read_text())
    assert written == {"metadata": {"total_size": 4 * 1_377_600}, "weight_map": dict(sorted(found.items()))}
    plain, _ = mlx_lm.load(str(tmp_path / "copy"))
    np.testing.assert_array_equal(logits(plain), logits(lm.net))
    np.testing.assert_array_equal(logits(model.load(tmp_path / "copy").net), logits(lm.net))


def test_a_tensor_larger_than_a_shard_has_one_of_its_own(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlxtune.shards.SHARD_BYTES", 1)
    save(model.load(tiny), tmp_path / "copy")
    assert len(model.weight_files(tmp_path / "copy")) == 3 * 9 + 2
    model.load(tmp_path / "copy")


@pytest.mark.parametrize(("mode", "bits", "group_size"), PACKINGS)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_dense_layers_have_the_values_of_quantized_ones(mode: str, bits: int, group_size: int, dtype: mx.Dtype) -> None:
    """Against mx.dequantize on the stored scales in float32, for each kind of layer."""
    packing = {"group_size": group_size, "bits": bits, "mode": mode}
    layers = [nn.Linear(128, 6), nn.Linear(128, 6, bias=False), nn.Embedding(6, 128)]
    layers += [SwitchLinear(128, 6, 3), MultiLinear(128, 6, 3)]
    for layer in layers:
        layer.set_dtype(dtype)
        packed = layer.to_quantized(**packing)
        assert isinstance(packed, precision.QUANTIZED)
        scales, biases = packed.scales, packed.biases
        if mode == "affine":
            scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
        expected = mx.dequantize(packed.weight, scales, biases, **packing, dtype=mx.float32)
        made = precision.dense(packed, mx.float32)
        assert type(made) is type(layer)
        np.testing.assert_array_equal(made.weight, expected)
        assert sorted(made.parameters()) == sorted(layer.parameters())
        if "bias" in layer:
            np.testing.assert_array_equal(made.bias.astype(mx.float32), layer.bias.astype(mx.float32))
        assert precision.dense_dtype(packed) == (dtype if mode == "affine" else mx.bfloat16)
        net = nn.Sequential(packed)
        precision.dequantize(net)
        assert net.layers[0].weight.dtype == precision.dense_dtype(packed)


def test_the_scales_of_experts_count() -> None:
    layer = SwitchLinear(64, 32, 3)
    layer.weight = layer.weight * mx.array([1.0, 10.0, 100.0])[:, None, None]
    packed = layer.to_quantized(16, 4, "nvfp4", global_scale=True)
    made = precision.dense(packed, mx.float32)
    error = mx.abs(made.weight - layer.weight).max(axis=(1, 2)) / mx.abs(layer.weight).max(axis=(1, 2))
    assert 0.01 < error.max().item() < 0.2  # 4 bits


def test_a_quantized_model_is_expanded_to_the_same_function(tiny: Path) -> None:
    """On a CPU all is computed in float32, also where the scales are no floats (they would give bfloat16)."""
    policy = machine.ComputePolicy(float32=True, expand=True, spread=False, compile=False, pad_multiple=1)
    for mode, bits, group_size in PACKINGS[-4:]:
        lm = model.load(tiny, stored=True)
        nn.quantize(lm.net, group_size, bits, mode=mode)
        packed = logits(lm.net)
        net = precision.for_compute(lm.net, policy)
        assert {each.dtype for _, each in tree_flatten(net.parameters())} == {mx.float32}
        assert not any(isinstance(each, precision.QUANTIZED) for each in net.modules())
        np.testing.assert_allclose(logits(net), packed, atol=2e-4)


UNFOLDED = machine.ComputePolicy(float32=False, expand=False, spread=False, compile=False, pad_multiple=1, unfold=True)


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "gemma2", "deepseek_v3", "qwen3_next", "phi"])
@pytest.mark.parametrize("packing", [None, (4, 32, "affine"), (8, 32, "mxfp8")])
def test_unfolded_matrices_stay_as_stored_and_compute_in_float32(
    name: str, packing: tuple[int, int, str] | None
) -> None:
    net, wide = zoo.build(name), zoo.build(name)
    for each in (net, wide):
        each.set_dtype(mx.bfloat16)
        if packing is not None:
            nn.quantize(each, packing[1], packing[0], mode=packing[2], class_predicate=_divides)
    wide.set_dtype(mx.float32)
    precision.dequantize(wide, mx.float32)
    stored = {name: each.nbytes for name, each in tree_flatten(net.parameters()) if each.ndim > 1}
    precision.for_compute(net, UNFOLDED)
    tokens = mx.array([[1, 2, 3, 4, 5, 6, 7]])
    found, expected = net(tokens), wide(tokens)
    assert found.dtype == mx.float32
    np.testing.assert_allclose(np.array(found), np.array(expected), atol=1e-4 * mx.abs(expected).max().item())
    after = {name: each.nbytes for name, each in tree_flatten(net.parameters()) if each.ndim > 1}
    kept = [name for name in stored if after[name] == stored[name]]
    assert len(kept) >= 0.8 * len(stored)  # but for what is no matrix, such as the filters of a convolution
    with precision.one_by_one(net):
        assert mx.array_equal(net(tokens), found)
    assert mx.array_equal(net(tokens), found)


@pytest.mark.skipif(machine.device_kind() != "cpu", reason="what a CPU holds")
def test_one_by_one_no_two_layers_are_dense_at_once() -> None:
    """The parts of one input are multiplied by eight matrices, of which MLX hands out several ahead."""
    net = nn.Module()
    net.parts = [nn.QuantizedLinear(1024, 1024, False, 64, 4) for _ in range(8)]
    precision.unfold(net)
    x, dense = mx.ones((2, 1024)), 4 * 1024**2
    mx.eval(net.parameters(), x)

    def peak() -> int:
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval([part(x) for part in net.parts])
        return mx.get_peak_memory() - before

    with precision.one_by_one(net):
        assert peak() < 2.5 * dense  # as it is made, and as it is multiplied
    assert all(getattr(type(part), "unfolded", False) for part in net.parts)


def _divides(_: str, layer: nn.Module) -> bool:
    return hasattr(layer, "to_quantized") and layer.weight.shape[-1] % 32 == 0


def test_spread_matrices_are_the_same_function(tiny: Path) -> None:
    """For the reference BLAS: rows with a gap behind them, which MLX copies rather than multiplies transposed."""
    policy = machine.ComputePolicy(float32=True, expand=True, spread=True, compile=False, pad_multiple=1)
    lm = model.load(tiny, stored=True)
    stored = dict(tree_flatten(lm.net.parameters()))
    before = logits(lm.net)
    after = dict(tree_flatten(precision.for_compute(lm.net, policy).parameters()))
    assert after.keys() == stored.keys()
    for name, weight in after.items():
        assert mx.array_equal(weight, stored[name]).item()
        if weight.ndim == 2:
            assert np.array(weight, copy=False).strides == (4 * weight.shape[1] + 4, 4), name
    np.testing.assert_allclose(logits(lm.net), before, atol=2e-4)


def test_a_policy_that_expands_nothing_changes_nothing(tiny: Path) -> None:
    policy = machine.ComputePolicy(float32=False, expand=False, spread=False, compile=True, pad_multiple=32)
    lm = model.load(tiny, stored=True)
    nn.quantize(lm.net, 64, 4)
    before = {name: each for name, each in tree_flatten(lm.net.parameters())}
    after = dict(tree_flatten(precision.for_compute(lm.net, policy).parameters()))
    assert all(after[name] is each for name, each in before.items())


def test_parameters_are_counted_as_if_not_quantized(tiny: Path) -> None:
    lm = model.load(tiny, stored=True)
    assert precision.parameter_count(lm.net) == 1_377_600
    nn.quantize(lm.net, 64, 3)
    assert precision.parameter_count(lm.net) == 1_377_600
