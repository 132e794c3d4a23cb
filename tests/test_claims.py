"""Formats of other tools: each that is let through has the dequantized values, in float64; the others are refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlxtune import folder as folders
from mlxtune import model, precision
from mlxtune.cli import main
from mlxtune.errors import ModelError
from tests import zoo
from tests.spoil import in_header, set_json

Arrays = dict[str, Any]
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# by the bits: sign, four of the exponent (bias 7), three of the fraction; the largest code of each sign is NaN
E4M3 = np.array(
    [
        (-1) ** (code >> 7)
        * (np.nan if code & 127 == 127 else
           2.0 ** ((code >> 3 & 15) - 7) * (1 + (code & 7) / 8) if code & 120 else 2.0**-6 * (code & 7) / 8)
        for code in range(256)
    ]
)  # fmt: skip


def adapted(name: str) -> bool:
    return name.split(".")[-2] in PROJECTIONS


def write(folder: Path, source: Path, tensors: Arrays, **config: Any) -> None:
    """A copy of a model folder with other tensors and these settings in its config."""
    shutil.copytree(source, folder)
    mx.save_safetensors(str(folder / "model.safetensors"), {name: mx.array(each) for name, each in tensors.items()})
    set_json("config.json", **config)(folder)


def stored(path: Path) -> Arrays:
    return {name: np.array(each) for name, each in mx.load(str(path / "model.safetensors")).items()}


def values(net: nn.Module) -> Arrays:
    """Every weight of a network in float64; of quantized layers, what MLX makes of them."""
    precision.dequantize(net, mx.float32)
    return {name: np.array(each.astype(mx.float32)).astype(np.float64) for name, each in tree_flatten(net.parameters())}


def loaded(folder: Path) -> tuple[Arrays, dict[str, Any]]:
    net, config = model.network(folder, folders.check(folder))
    return values(net), config


def in_fp8(
    folder: Path, source: Path, scales: str, suffix: str, claim: dict[str, Any], dtype: str = "bfloat16"
) -> Arrays:
    """Writes the model in 8-bit floats; returns what it stands for, in float64."""
    draw, tensors, meant = np.random.default_rng(0), {}, {}
    for name, weight in stored(source).items():
        if not adapted(name):
            tensors[name] = meant[name] = weight
            continue
        codes = draw.integers(0, 256, weight.shape, dtype=np.uint8)
        codes[codes & 127 == 127] = 0
        rows, columns = weight.shape
        shape = {"one": (), "rows": (rows, 1), "blocks": (-(-rows // 128), -(-columns // 128))}[scales]
        own = draw.uniform(1e-4, 1e-3, shape).astype(np.float32)
        spread = np.kron(own, np.ones((128, 128)))[:rows, :columns] if scales == "blocks" else own
        meant[name] = E4M3[codes] * spread.astype(np.float64)
        tensors |= {name: codes, name + suffix: own, name.replace("weight", "input_scale"): np.float32(3.0)}
    write(folder, source, tensors, quantization_config=claim, torch_dtype=dtype)
    in_header(
        lambda header: [each.update(dtype="F8_E4M3") for each in header.values() if each and each.get("dtype") == "U8"]
    )(folder)
    return meant


BLOCKS = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
COMPRESSED = {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {}}


@pytest.mark.parametrize(
    ("scales", "suffix", "claim"),
    [
        ("blocks", "_scale_inv", BLOCKS),  # DeepSeek, Qwen 3
        ("one", "_scale_inv", {"quant_method": "fp8", "activation_scheme": "static"}),  # Mistral
        ("rows", "_scale", COMPRESSED),
        ("one", "_scale", COMPRESSED),
    ],
)
@pytest.mark.parametrize(("dtype", "error"), [("float32", 2.0**-23), ("bfloat16", 2.0**-8)])
def test_8_bit_floats_have_the_values_of_their_scales(
    scales: str, suffix: str, claim: dict[str, Any], dtype: str, error: float, tiny: Path, tmp_path: Path
) -> None:
    meant = in_fp8(tmp_path / "fp8", tiny, scales, suffix, claim, dtype)
    found, config = loaded(tmp_path / "fp8")
    assert found.keys() == meant.keys()
    for name, expected in meant.items():
        np.testing.assert_allclose(found[name], expected, rtol=error, atol=0)
    assert "quantization_config" not in config


def test_8_bit_floats_of_an_architecture_that_mlx_lm_misreads(tmp_path: Path) -> None:
    """mlx-lm 0.32.2 multiplies the bytes of a Ministral 3 by the scale as if they were whole numbers."""
    net = zoo.build("ministral3")
    source = tmp_path / "source"
    source.mkdir()
    config = {"model_type": "ministral3", **zoo.COMMON, **zoo.ARCHITECTURES["ministral3"]}
    (source / "config.json").write_text(json.dumps(config))
    (source / "tokenizer.json").write_text("{}")
    mx.save_safetensors(str(source / "model.safetensors"), dict(tree_flatten(net.parameters())))
    meant = in_fp8(tmp_path / "fp8", source, "one", "_scale_inv", {"quant_method": "fp8"}, "float32")
    found, _ = loaded(tmp_path / "fp8")
    for name, expected in meant.items():
        np.testing.assert_allclose(found[name], expected, rtol=2.0**-23, atol=0)


def test_8_bit_floats_are_converted_and_then_quantized(tiny: Path, tmp_path: Path) -> None:
    meant = in_fp8(tmp_path / "fp8", tiny, "blocks", "_scale_inv", BLOCKS)
    for name, flags in {"dense": (), "packed": ("-q", "--q-bits", "8")}.items():
        with pytest.raises(SystemExit) as caught:
            main(["convert", str(tmp_path / "fp8"), "--mlx-path", str(tmp_path / name), *flags])
        assert caught.value.code == 0
    lm = model.load(tmp_path / "dense", stored=True)
    assert "quantization_config" not in lm.config
    found = values(lm.net)
    for name, expected in meant.items():
        np.testing.assert_allclose(found[name], expected, rtol=2.0**-8, atol=0)
    packed = values(model.load(tmp_path / "packed", stored=True).net)
    for name, expected in meant.items():
        assert np.abs(packed[name] - expected).max() <= 0.02 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("scales", "suffix", "claim", "line"),
    [
        ("blocks", "_scale_inv", {"quant_method": "fp8"}, "of shape [192, 512] with scales of shape [2, 4]"),
        (
            "blocks",
            "_scale_inv",
            {"quant_method": "fp8", "weight_block_size": [64, 64]},
            "of shape [192, 512] with scales of shape [2, 4]",
        ),
        ("one", "_other", {"quant_method": "fp8"}, "in 8-bit floats without scales"),
    ],
)
def test_8_bit_floats_with_other_scales_are_refused(
    scales: str, suffix: str, claim: dict[str, Any], line: str, tiny: Path, tmp_path: Path
) -> None:
    in_fp8(tmp_path / "fp8", tiny, scales, suffix, claim)
    with pytest.raises(ModelError) as caught:
        folders.check(tmp_path / "fp8")
    assert line in str(caught.value)


def packed_by_awq(numbers: Any) -> Any:
    """Eight numbers of 4 bits in a word, in AutoAWQ's order: the first goes lowest, then the third, fifth, …"""
    words = numbers.astype(np.uint32).reshape(*numbers.shape[:-1], -1, 8)[..., [0, 2, 4, 6, 1, 3, 5, 7]]
    return (words << np.arange(0, 32, 4, dtype=np.uint32)).sum(-1, dtype=np.uint32).view(np.int32)


@pytest.mark.parametrize("group", [32, 64])
@pytest.mark.parametrize("symmetric", [False, True])
def test_awq_has_the_values_of_its_scales(group: int, symmetric: bool, tiny: Path, tmp_path: Path) -> None:
    draw, tensors, meant = np.random.default_rng(1), {}, {}
    for name, weight in stored(tiny).items():
        if not adapted(name):
            tensors[name] = meant[name] = weight.astype(np.float16)
            continue
        outputs, inputs = weight.shape
        numbers = draw.integers(0, 16, (inputs, outputs))
        zeros = draw.integers(0, 16, (inputs // group, outputs)) if not symmetric else np.full((1, 1), 8)
        scales = draw.uniform(1e-3, 1e-2, (inputs // group, outputs)).astype(np.float16)
        spread = np.repeat(scales.astype(np.float64), group, axis=0)
        offset = np.repeat(zeros, group if not symmetric else inputs, axis=0)
        meant[name] = ((numbers - offset) * spread).T
        layer = name.removesuffix(".weight")
        tensors |= {f"{layer}.qweight": packed_by_awq(numbers), f"{layer}.scales": scales}
        if not symmetric:
            tensors[f"{layer}.qzeros"] = packed_by_awq(zeros)
    claim = {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm", "zero_point": not symmetric}
    write(tmp_path / "awq", tiny, tensors, quantization_config=claim, torch_dtype="float16")
    found, config = loaded(tmp_path / "awq")
    assert found.keys() == meant.keys()
    for name, expected in meant.items():
        # -zero · scale is rounded to float16: half of the last of 11 bits
        allowed = 15 * 1e-2 * 2.0**-11 if adapted(name) else 0
        np.testing.assert_allclose(found[name], expected, rtol=1e-6, atol=allowed)
    assert config["quantization"] == {"group_size": group, "bits": 4}


def test_awq_of_another_shape_is_refused(tiny: Path, tmp_path: Path) -> None:
    """GPTQ packs along the other axis."""
    tensors = stored(tiny)
    weight = tensors.pop("model.layers.0.mlp.up_proj.weight")
    outputs, inputs = weight.shape
    tensors["model.layers.0.mlp.up_proj.qweight"] = np.zeros((inputs // 8, outputs), np.int32)
    tensors["model.layers.0.mlp.up_proj.scales"] = np.ones((inputs // 64, outputs), np.float16)
    write(tmp_path / "awq", tiny, tensors, quantization_config={"quant_method": "awq", "bits": 4, "group_size": 64})
    with pytest.raises(ModelError, match=r"the tensors of 'model.layers.0.mlp.up_proj' do not fit groups of 64"):
        folders.check(tmp_path / "awq")


def compressed(claim: dict[str, Any], folder: Path) -> Arrays:
    """A DeepSeek V3 whose experts are compressed-tensors' 4-bit integers, as Kimi K2's; what it stands for."""
    net, draw = zoo.build("deepseek_v3", moe_intermediate_size=64), np.random.default_rng(2)
    tensors: Arrays = {}
    meant: Arrays = {}
    for name, each in tree_flatten(net.parameters()):
        weight = np.array(each)
        if ".switch_mlp." not in name:
            tensors[name] = meant[name] = weight
            continue
        experts, outputs, inputs = weight.shape
        numbers = draw.integers(-8, 8, weight.shape)
        scales = draw.uniform(1e-3, 1e-2, (experts, outputs, inputs // 32)).astype(np.float32)
        meant[name] = numbers * np.repeat(scales.astype(np.float64), 32, axis=-1)
        words = (
            (numbers + 8).astype(np.uint32).reshape(experts, outputs, -1, 8) << np.arange(0, 32, 4, np.uint32)
        ).sum(-1, dtype=np.uint32)
        for expert in range(experts):
            own = name.replace("switch_mlp", f"experts.{expert}")
            tensors[f"{own}_packed"] = words[expert].view(np.int32)
            tensors[f"{own}_scale"] = scales[expert]
            tensors[f"{own}_shape"] = np.array([outputs, inputs], np.int32)
    folder.mkdir()
    config = {"model_type": "deepseek_v3", **zoo.COMMON, "moe_intermediate_size": 64, "quantization_config": claim}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    mx.save_safetensors(str(folder / "model.safetensors"), {name: mx.array(each) for name, each in tensors.items()})
    return meant


def integers(**changes: Any) -> dict[str, Any]:
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32, "actorder": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"weights": weights | changes, "targets": ["Linear"]}},
    }


def test_compressed_integers_have_the_values_of_their_scales(tmp_path: Path) -> None:
    meant = compressed(integers(), tmp_path / "packed")
    found, config = loaded(tmp_path / "packed")
    assert found.keys() == meant.keys()
    for name, expected in meant.items():
        np.testing.assert_allclose(found[name], expected, rtol=1e-6, atol=1e-8)
    assert config["quantization"] == {"group_size": 32, "bits": 4, "mode": "affine"}


@pytest.mark.parametrize("changes", [{"num_bits": 8}, {"symmetric": False}, {"actorder": "weight"}, {"type": "float"}])
def test_compressed_integers_of_another_kind_are_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    compressed(integers(**changes), tmp_path / "packed")
    with pytest.raises(ModelError, match=r"is quantized by compressed-tensors \('pack-quantized'\)"):
        folders.check(tmp_path / "packed")


def test_gptq_is_refused_by_name(tiny: Path, tmp_path: Path) -> None:
    """mlx-lm reads it as AWQ, whose words lie otherwise."""
    write(tmp_path / "gptq", tiny, stored(tiny), quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ModelError) as caught:
        folders.check(tmp_path / "gptq")
    line = "is quantized by 'gptq', which is not supported; start from the original model, or from one that was"
    assert line in str(caught.value)
