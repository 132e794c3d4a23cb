"""LoRA layers: the formula in float64, mlx-lm's own layers, and the types and memory of half-precision training."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlxtune.borrow import LoRALinear, LoRASwitchLinear, SwitchLinear
from mlxtune.lora import CastLoRALinear, CastLoRASwitchLinear, use_own


def made(outputs: int = 12, inputs: int = 20, dropout: float = 0.0, bias: bool = True) -> LoRALinear:
    mx.random.seed(1)
    layer = LoRALinear.from_base(nn.Linear(inputs, outputs, bias=bias), r=3, dropout=dropout, scale=2.5)
    layer.lora_b = mx.random.normal(layer.lora_b.shape)
    return layer


def own(layer: nn.Module) -> Any:
    """The same layer, computing in our way."""
    use_own(layer)
    return layer


def test_the_formula_in_float64() -> None:
    layer = own(made())
    assert type(layer) is CastLoRALinear
    x = mx.random.normal((2, 5, 20))
    w, c, a, b, y = (
        np.array(each, dtype=np.float64)
        for each in (layer.linear.weight, layer.linear.bias, layer.lora_a, layer.lora_b, x)
    )
    np.testing.assert_allclose(np.array(layer(x)), y @ w.T + c + 2.5 * (y @ a) @ b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("packed", [False, True])
def test_float32_is_mlx_lms_own(packed: bool) -> None:
    layer = made(32, 64, bias=False)
    if packed:
        layer.linear = layer.linear.to_quantized(group_size=32, bits=4)
    x = mx.random.normal((2, 3, 64))

    def gradients() -> Any:
        layer.freeze()
        layer.unfreeze(keys=["lora_a", "lora_b"], recurse=False)
        found, by_x = mx.value_and_grad(lambda x: layer(x).square().sum())(x)
        _, by_factors = nn.value_and_grad(layer, lambda: layer(x).square().sum())()
        return found, by_x, by_factors["lora_a"], by_factors["lora_b"]

    before = gradients()
    use_own(layer)
    for one, other in zip(before, gradients(), strict=True):
        np.testing.assert_allclose(np.array(other), np.array(one), rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("order", [False, True])
def test_experts_are_mlx_lms_own(order: bool) -> None:
    mx.random.seed(2)
    layer = LoRASwitchLinear.from_base(SwitchLinear(16, 8, 4, bias=False), r=2, scale=3.0)
    layer.lora_b = mx.random.normal(layer.lora_b.shape)
    x = mx.random.normal((6, 1, 1, 16))
    indices = mx.array([[0], [0], [1], [2], [3], [3]])
    before = np.array(layer(x, indices, sorted_indices=order))
    use_own(layer)
    assert type(layer) is CastLoRASwitchLinear
    np.testing.assert_allclose(np.array(layer(x, indices, sorted_indices=order)), before, rtol=1e-5, atol=1e-5)


def test_half_precision_stays_half_and_its_factors_float32() -> None:
    layer = own(made())
    layer.linear.set_dtype(mx.bfloat16)
    layer.freeze()
    layer.unfreeze(keys=["lora_a", "lora_b"], recurse=False)
    x = mx.random.normal((4, 20)).astype(mx.bfloat16)
    assert layer(x).dtype == mx.bfloat16
    _, found = nn.value_and_grad(layer, lambda: layer(x).astype(mx.float32).square().sum())()
    assert {name: each.dtype for name, each in tree_flatten(found)} == {"lora_a": mx.float32, "lora_b": mx.float32}


def test_half_precision_takes_less_memory_than_mlx_lms_own() -> None:
    def peak(layer: nn.Module) -> int:
        layer.linear.set_dtype(mx.bfloat16)
        layer.freeze()
        layer.unfreeze(keys=["lora_a", "lora_b"], recurse=False)
        x = mx.random.normal((4096, 64)).astype(mx.bfloat16)
        mx.eval(x, layer.parameters())
        mx.reset_peak_memory()
        mx.eval(nn.value_and_grad(layer, lambda: layer(x).astype(mx.float32).square().sum())())
        return mx.get_peak_memory()

    assert peak(own(made(256, 64))) < 0.9 * peak(made(256, 64))


def test_dropout_is_there_while_training_only() -> None:
    layer = own(made(dropout=0.5))
    x = mx.ones((3, 20))
    layer.train()
    assert not mx.array_equal(layer(x), layer(x))
    layer.eval()
    assert mx.array_equal(layer(x), layer(x))
