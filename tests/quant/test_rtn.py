"""Round to nearest: what is quantized, what is left out and said so, how many bits, how large the error."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten

from mlxtune import layers, model, precision
from mlxtune.errors import ModelError
from mlxtune.fusing.requantize import packed_layer
from mlxtune.quant import rtn
from mlxtune.quant.packing import Packing
from mlxtune.recipe import QuantizeRecipe

WEIGHTS, NORMS = 1_376_256, 7 * 192  # of the embedded model: in layers that can be quantized, and in norms
LAYERS = 3 * 7 + 1


class Net(nn.Module):
    """Two layers of 64 and 48 inputs, and what its architecture says of the first."""

    def __init__(self, choice: bool | dict[str, Any] = True):
        super().__init__()
        self.wide = nn.Linear(64, 128, bias=False)
        self.odd = nn.Linear(48, 16, bias=False)
        self.norm = nn.RMSNorm(64)
        self._choice = choice

    @property
    def quant_predicate(self) -> Any:
        return lambda name, module: self._choice if name == "wide" else True


@dataclass(frozen=True)
class Done:
    bits_per_weight: float
    layers: int
    left_out: dict[str, str]


def quantized(net: nn.Module, config: dict[str, Any], spec: QuantizeRecipe) -> tuple[dict[str, Any], Done]:
    """Packs the layers of `net` that `layers.chosen` chooses; its config, and what was done."""
    asked = Packing(spec.bits, spec.group_size, spec.mode)
    found = layers.chosen(net, asked, {name: each.dtype for name, each in tree_flatten(net.parameters())})
    modules = dict(net.named_modules())
    packed = [
        (each.name, packed_layer(modules[each.name], rtn.pack(modules[each.name].weight, each.packing), each.packing))
        for each in found
        if each.packing is not None
    ]
    net.update_modules(tree_unflatten(packed))
    left_out = {each.name: each.left_out for each in found if each.left_out is not None}
    return layers.described(config, asked, found), Done(precision.bits_per_weight(net), len(packed), left_out)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_bits_per_weight_by_hand(tiny: Path, bits: int, dtype: mx.Dtype) -> None:
    """A group of 64 weights has `bits` each, a scale and a bias; the norms stay as they are."""
    lm = model.load(tiny, stored=True)
    lm.net.set_dtype(dtype)
    config, done = quantized(lm.net, lm.config, QuantizeRecipe(bits=bits))
    stored = 8 * dtype.size
    expected = (WEIGHTS * (bits + 2 * stored / 64) + NORMS * stored) / (WEIGHTS + NORMS)
    assert done.bits_per_weight == pytest.approx(expected, rel=1e-12)
    assert (done.layers, done.left_out) == (LAYERS, {})
    packing = {"group_size": 64, "bits": bits, "mode": "affine"}
    assert config == lm.config | {"quantization": packing, "quantization_config": packing}
    assert "quantization" not in lm.config


@pytest.mark.parametrize(
    ("mode", "bits", "group_size", "per_weight"),
    [("mxfp4", 4, 32, 4 + 8 / 32), ("nvfp4", 4, 16, 4 + 8 / 16), ("mxfp8", 8, 32, 8 + 8 / 32)],
)
def test_bits_per_weight_of_the_other_modes(
    tiny: Path, mode: str, bits: int, group_size: int, per_weight: float
) -> None:
    """A group has one scale of 8 bits and no bias."""
    lm = model.load(tiny, stored=True)
    config, done = quantized(lm.net, lm.config, QuantizeRecipe(bits=bits, group_size=group_size, mode=mode))
    assert done.bits_per_weight == pytest.approx((WEIGHTS * per_weight + NORMS * 32) / (WEIGHTS + NORMS), rel=1e-12)
    assert config["quantization"] == {"group_size": group_size, "bits": bits, "mode": mode}
    assert lm.net.layers[0].mlp.up_proj.scales.dtype == mx.uint8


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_values_are_rounded_to_the_nearest_step(bits: int) -> None:
    """Rounding to 2^bits even steps between a group's ends leaves an error spread evenly over a step: step/√12."""
    net = Net()
    before = np.array(net.wide.weight, dtype=np.float64).reshape(-1, 32)
    quantized(net, {}, QuantizeRecipe(bits=bits, group_size=32))
    after = np.array(precision.dense(net.wide, mx.float32).weight, dtype=np.float64).reshape(-1, 32)
    step = (before.max(axis=1) - before.min(axis=1)) / (2**bits - 1)
    error = np.abs(after - before)
    assert error.max(axis=1).max() <= step.max()
    assert 0.7 < np.sqrt((error**2).mean() / (step**2).mean()) * np.sqrt(12) < 1.1


def test_layers_that_do_not_divide_are_left_out_and_said_so() -> None:
    net = Net()
    config, done = quantized(net, {"model_type": "net"}, QuantizeRecipe())
    assert done.left_out == {"odd": "48 inputs are no multiple of 64"}
    assert done.layers == 1
    assert isinstance(net.wide, nn.QuantizedLinear) and type(net.odd) is nn.Linear
    packing = {"group_size": 64, "bits": 4, "mode": "affine"}
    assert config == {"model_type": "net", "quantization": packing, "quantization_config": packing}


def test_the_172_inputs_of_stories_are_left_out(stories: Path) -> None:
    for group_size in (32, 64):
        lm = model.load(stories, stored=True)
        _, done = quantized(lm.net, lm.config, QuantizeRecipe(group_size=group_size))
        assert done.left_out == {
            f"model.layers.{block}.mlp.down_proj": f"172 inputs are no multiple of {group_size}" for block in range(5)
        }
        assert done.layers == 5 * 6 + 1


def test_no_group_fits(tiny: Path) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.only = nn.Linear(48, 4)

    net = Odd()
    with pytest.raises(ModelError) as caught:
        quantized(net, {}, QuantizeRecipe())
    assert str(caught.value) == "group_size: no layer can be quantized in groups of 64; try 32, or leave it out"
    assert type(net.only) is nn.Linear


def test_the_architecture_may_keep_a_layer() -> None:
    net = Net(choice=False)
    _, done = quantized(net, {}, QuantizeRecipe(group_size=16, mode="nvfp4"))
    assert done.left_out == {"wide": "the architecture keeps it in full precision"}
    assert isinstance(net.odd, nn.QuantizedLinear)


def test_the_architecture_may_want_other_bits() -> None:
    net = Net(choice={"group_size": 64, "bits": 8})
    config, done = quantized(net, {}, QuantizeRecipe(group_size=16, mode="nvfp4"))
    assert (done.layers, done.left_out) == (2, {})
    assert (net.wide.bits, net.wide.group_size, net.wide.mode) == (8, 64, "affine")
    assert (net.odd.bits, net.odd.group_size, net.odd.mode) == (4, 16, "nvfp4")
    assert config["quantization"] == {
        "group_size": 16, "bits": 4, "mode": "nvfp4", "wide": {"group_size": 64, "bits": 8, "mode": "affine"},
    }  # fmt: skip


def test_the_groups_that_the_architecture_wants_may_not_divide() -> None:
    net = Net(choice={"group_size": 128, "bits": 8})
    config, done = quantized(net, {}, QuantizeRecipe(group_size=16, mode="nvfp4"))
    assert done.left_out == {"wide": "64 inputs are no multiple of 128"}
    assert "wide" not in config["quantization"]
