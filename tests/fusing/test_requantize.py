"""Layers that are made again: the exact sum where it fits, least loss where it is packed, and figures that say so."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import SwitchLinear
from mlx_lm.tuner.lora import LoRALinear, LoRASwitchLinear

from mlxtune.errors import FuseError, ModelError
from mlxtune.fusing.requantize import Change, described, extra_bits, packing_of, planned, raised, remake
from mlxtune.precision import QUANTIZED
from mlxtune.quant import search
from mlxtune.quant.calibrate import Inputs
from mlxtune.quant.packing import Packing, dequantized
from mlxtune.recipe import FuseRecipe

# mode, bits, group size: of bases and of what they are packed in
MODES = [("affine", 8, 64), ("affine", 4, 32), ("affine", 3, 64), ("mxfp4", 4, 32), ("nvfp4", 4, 16), ("mxfp8", 8, 32)]


class Net(nn.Module):
    """Adapters on a linear layer with a bias, on one without and on three experts; one layer without an adapter."""

    def __init__(self, dtype: mx.Dtype, packing: dict[str, Any] | None):
        super().__init__()
        mx.random.seed(7)
        self.biased, self.plain = nn.Linear(128, 96), nn.Linear(128, 64, bias=False)
        self.experts, self.alone = SwitchLinear(128, 32, 3), nn.Linear(128, 32)
        self.set_dtype(dtype)
        if packing is not None:
            nn.quantize(self, **packing)
        for name, kind in (("biased", LoRALinear), ("plain", LoRALinear), ("experts", LoRASwitchLinear)):
            adapted = kind.from_base(self[name], r=2, scale=2.0)
            adapted.lora_b = mx.random.normal(adapted.lora_b.shape, scale=0.05)
            self[name] = adapted


NAMES = ("biased", "plain", "experts")


def plain_of(net: Net) -> nn.Module:
    """The layers of `net` without their adapters, by the same names."""
    made = nn.Module()
    made.update_modules({})
    for name in (*NAMES, "alone"):
        made[name] = net[name].linear if name in NAMES else net[name]
    return made


def remade(net: Net, settings: FuseRecipe, inputs: dict[str, Inputs] | None = None) -> dict[str, Change]:
    """Makes the layers of `net` again as `settings` say; returns what became of the changes."""
    return {each.name: each for each in remake(net, planned(net, plain_of(net), settings), inputs or {})}


def with_inputs(seed: int = 3, rows: int = 400) -> tuple[mx.array, Inputs]:
    """Inputs (N, 128) that depend on each other, as those of a network do, and what `gather` makes of them."""
    mx.random.seed(seed)
    x = mx.random.normal((rows, 24)) @ mx.random.normal((24, 128)) + 0.3 * mx.random.normal((rows, 128))
    hessian = x.T @ x / rows
    return x, Inputs(mx.diag(hessian), hessian, rows)


def dense64(layer: nn.Module) -> Any:
    """The values of a stored layer in float64, from mx.dequantize on its scales in float32."""
    if not isinstance(layer, QUANTIZED):
        return np.array(layer.weight.astype(mx.float32), dtype=np.float64)
    scales, biases = layer.scales, layer.biases
    if layer.mode == "affine":
        scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    values = mx.dequantize(
        layer.weight, scales, biases, layer.group_size, layer.bits, mode=layer.mode, dtype=mx.float32
    )
    return np.array(values, dtype=np.float64)


def exact(net: Net) -> dict[str, Any]:
    """W + scale·(A·B)ᵀ of every adapted layer in float64, written out expert by expert."""
    sums = {}
    for name in NAMES:
        layer = net[name]
        a, b = (np.array(each, dtype=np.float64) for each in (layer.lora_a, layer.lora_b))
        update = np.stack([b[e] @ a[e] for e in range(3)]) if name == "experts" else (a @ b).T
        sums[name] = dense64(layer.linear) + 2.0 * update
    return sums


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16], ids=str)
def test_dense_layers_are_summed_in_float32(dtype: mx.Dtype) -> None:
    net = Net(dtype, None)
    expected, bias = exact(net), net.biased.linear.bias
    before = {name: dense64(net[name].linear) for name in NAMES}
    changes = remade(net, FuseRecipe())
    for name in NAMES:
        assert type(net[name]) in (nn.Linear, SwitchLinear) and net[name].weight.dtype == dtype
        precision = {mx.float32: 2**-22, mx.bfloat16: 2**-8, mx.float16: 2**-10}[dtype]
        np.testing.assert_allclose(dense64(net[name]), expected[name], rtol=precision, atol=1e-6)
        delta, made = expected[name] - before[name], dense64(net[name]) - before[name]
        change = changes[name]
        assert change.bits is None and change.asked == pytest.approx(np.linalg.norm(delta), rel=1e-4)
        assert change.norm == pytest.approx(np.linalg.norm(made) / np.linalg.norm(delta), rel=1e-4)
        cosine = (delta * made).sum() / np.linalg.norm(delta) / np.linalg.norm(made)
        assert change.cosine == pytest.approx(cosine, rel=1e-4)
        assert change.lost == pytest.approx(((made - delta) ** 2).sum() / (delta**2).sum(), rel=1e-2, abs=1e-9)
    assert net.biased.bias is bias and "bias" not in net.plain


@pytest.mark.parametrize(("mode", "bits", "group_size"), MODES)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
def test_packed_layers_come_back_in_their_own_format(mode: str, bits: int, group_size: int, dtype: mx.Dtype) -> None:
    """Without inputs the error is at most that of rounding the exact sum once, up to the precision of the scales."""
    packing = {"group_size": group_size, "bits": bits, "mode": mode}
    net = Net(dtype, packing)
    expected, before = exact(net), dict(tree_flatten(net.parameters()))
    remade(net, FuseRecipe())
    after = dict(tree_flatten(net.parameters()))
    assert sorted(after) == sorted(name.replace(".linear.", ".") for name in before if "lora_" not in name)
    for name, each in after.items():
        stored_name = name.replace(".", ".linear.") if name.split(".")[0] in NAMES else name
        assert (each.dtype, each.shape) == (before[stored_name].dtype, before[stored_name].shape)
        if name.startswith("alone"):
            np.testing.assert_array_equal(each.astype(mx.float32), before[name].astype(mx.float32))
    for name in NAMES:
        assert packing_of(net[name]) == Packing(bits, group_size, mode)
        once = mx.quantize(mx.array(expected[name].astype(np.float32)), group_size, bits, mode=mode)
        best = mx.dequantize(*once, **packing, dtype=mx.float32)
        error = np.sqrt(((dense64(net[name]) - expected[name]) ** 2).mean())
        least = np.sqrt(((np.array(best, np.float64) - expected[name]) ** 2).mean())
        assert least > 0
        assert error <= least * (1.5 if (dtype, mode, bits) == (mx.bfloat16, "affine", 8) else 1.01)


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
def test_known_inputs_keep_the_outputs(bits: int, dtype: mx.Dtype) -> None:
    """With what goes into a layer its outputs are nearer to those of base and adapter than by rounding, by far."""
    packing = {"group_size": 64, "bits": bits, "mode": "affine"}
    net = Net(dtype, packing)
    x, inputs = with_inputs()
    rows = np.array(x, dtype=np.float64)
    expected, before = exact(net), {name: dense64(net[name].linear) for name in NAMES}
    changes = remade(net, FuseRecipe(), dict.fromkeys(NAMES, inputs))
    for name in NAMES:
        wanted = expected[name] @ rows.T
        once = mx.quantize(mx.array(expected[name].astype(np.float32)), 64, bits)
        rounded = np.array(mx.dequantize(*once, 64, bits), np.float64) @ rows.T
        off = ((dense64(net[name]) @ rows.T - wanted) ** 2).sum()
        assert off < 0.35 * ((rounded - wanted) ** 2).sum()
        asked = (wanted - before[name] @ rows.T) ** 2
        assert changes[name].lost == pytest.approx(off / asked.sum(), rel=2e-3)


def test_an_adapter_that_changes_nothing_has_no_figures() -> None:
    net = Net(mx.float32, None)
    net.plain.lora_b = mx.zeros(net.plain.lora_b.shape)
    change = remade(net, FuseRecipe())["plain"]
    assert change == Change(name="plain", bits=None, asked=0.0, norm=None, cosine=None, lost=None)


@pytest.mark.parametrize(("mode", "bits", "group_size"), MODES)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
def test_dense_again_is_the_sum_rounded_once(mode: str, bits: int, group_size: int, dtype: mx.Dtype) -> None:
    net = Net(dtype, {"group_size": group_size, "bits": bits, "mode": mode})
    expected = exact(net)
    remade(net, FuseRecipe(dequantize=True))
    wanted = dtype if mode == "affine" else mx.bfloat16  # what formats without scales in floats compute in
    precision = 2**-22 if wanted == mx.float32 else 2**-8
    for name in NAMES:
        assert not isinstance(net[name], QUANTIZED) and net[name].weight.dtype == wanted
        np.testing.assert_allclose(dense64(net[name]), expected[name], rtol=precision, atol=1e-6)
    assert net.biased.bias.dtype == dtype


@pytest.mark.parametrize(("mode", "bits", "group_size"), MODES)
def test_other_bits_are_affine(mode: str, bits: int, group_size: int) -> None:
    packing = {"group_size": group_size, "bits": bits, "mode": mode}
    net = Net(mx.bfloat16, packing)
    plain, expected = plain_of(net), exact(net)
    packings = planned(net, plain, FuseRecipe(bits=6))
    own = Packing(6, group_size if mode == "affine" else 64, "affine")
    assert packings == dict.fromkeys(NAMES, own)
    config = described({"quantization": packing}, plain, packings, 6)
    assert config["quantization"] == config["quantization_config"] == packing | dict.fromkeys(NAMES, own.described)
    remake(net, packings, {})
    for name in NAMES:
        assert (net[name].bits, net[name].mode, net[name].scales.dtype) == (6, "affine", mx.bfloat16)
        error = np.abs(dense64(net[name]) - expected[name]).max() / np.abs(expected[name]).max()
        assert error < 2 * 2**-6
    assert (net.alone.bits, net.alone.mode) == (bits, mode)
    logits = net.biased(mx.ones((1, 128), dtype=mx.bfloat16))  # the layer computes with what it says of itself
    sums = expected["biased"].sum(axis=-1) + np.array(net.biased.bias.astype(mx.float32))
    np.testing.assert_allclose(np.array(logits[0].astype(mx.float32)), sums, atol=0.6)


def test_a_group_of_16_that_no_affine_format_has() -> None:
    stored = nn.Linear(48, 32).to_quantized(16, 4, "nvfp4")
    net = nn.Sequential(LoRALinear.from_base(stored, r=2))
    with pytest.raises(FuseError) as caught:
        planned(net, nn.Sequential(stored), FuseRecipe(bits=8))
    assert str(caught.value) == "48 inputs of a layer divide by no group of 8-bit weights; use --dequantize"


def test_the_original_weights_carry_the_change() -> None:
    """What is packed is W + ΔW, with nothing of what rounding W lost before."""
    packing = {"group_size": 64, "bits": 4, "mode": "affine"}
    whole, net = Net(mx.float32, None), Net(mx.float32, packing)  # the same seed, so the same weights
    for name in NAMES:
        whole[name].lora_a, whole[name].lora_b = net[name].lora_a, net[name].lora_b
    expected = exact(whole)
    remake(net, planned(net, plain_of(net), FuseRecipe()), {}, {name: whole[name].linear for name in NAMES})
    copied = Net(mx.float32, packing)
    remade(copied, FuseRecipe())
    for name in NAMES:
        once = search.pack(mx.array(expected[name].astype(np.float32)), Packing(4, 64))
        np.testing.assert_allclose(dense64(net[name]), dequantized(once, Packing(4, 64)), atol=1e-5)
        off, of_copy = (((dense64(each[name]) - expected[name]) ** 2).sum() for each in (net, copied))
        assert off < of_copy


def test_another_original_is_refused() -> None:
    net = Net(mx.float32, {"group_size": 64, "bits": 4, "mode": "affine"})
    other = nn.Linear(128, 64, bias=False)
    packings = {"plain": packing_of(net.plain)}
    with pytest.raises(ModelError) as caught:
        remake(net, packings, {}, {"plain": other})
    assert str(caught.value) == (
        "the base was not quantized from this model: plain differs; give the model that the base was made of"
    )


def test_what_is_not_finite_is_refused() -> None:
    net = Net(mx.float32, None)
    net.plain.lora_b = mx.full(net.plain.lora_b.shape, float("nan"))
    with pytest.raises(ModelError, match="plain: holds NaN or infinite values"):
        remade(net, FuseRecipe())


def test_the_worst_layers_get_the_next_bits_as_far_as_there_is_room() -> None:
    net = Net(mx.float32, {"group_size": 64, "bits": 4, "mode": "affine"})
    plain = plain_of(net)
    packings = planned(net, plain, FuseRecipe())

    def change(name: str, lost: float | None) -> Change:
        return Change(name=name, bits=4, asked=1.0, norm=1.0, cosine=1.0, lost=lost)

    changes = [change("biased", 0.1), change("plain", 0.4), change("experts", 0.2)]
    one = Packing(5, 64, "affine")
    assert raised(packings, changes, plain, 1e9) == {"plain": one}
    # 64 rows of 128 weights: a bit more each, scales and biases as before
    assert extra_bits(plain, "plain", Packing(4, 64), 5) == 64 * 128
    assert raised(packings, changes, plain, 64 * 128) == {"plain": one}
    assert raised(packings, changes, plain, 64 * 128 - 1) == {}
    again = packings | {"plain": Packing(6, 64)}
    assert raised(again, changes, plain, 1e9) == {"plain": Packing(8, 64)}
    assert raised(again | {"plain": Packing(8, 64)}, changes, plain, 1e9) == {"experts": one}
    assert raised(packings, [change("plain", None)], plain, 1e9) == {}
