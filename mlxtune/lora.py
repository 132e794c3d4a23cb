"""How adapted layers compute: LoRA's factors are float32 masters, used in the precision of the activations.

mlx-lm's own layers multiply bfloat16 activations by float32 factors, which computes, and keeps for the backward pass,
everything behind them in float32. Knows layers, not networks.
"""

import mlx.core as mx
import mlx.nn as nn

from mlxtune.borrow import LoRALinear, LoRASwitchLinear


class CastLoRALinear(LoRALinear):  # type: ignore[misc]
    """x (…, inputs) -> W·x + scale·Bᵀ·Aᵀ·dropout(x), (…, outputs), in the type of x; gradients of A, B in float32."""

    def __call__(self, x: mx.array) -> mx.array:
        a, b = self.lora_a.astype(x.dtype), (self.scale * self.lora_b).astype(x.dtype)
        return mx.addmm(self.linear(x), self.dropout(x) @ a, b)


class CastLoRASwitchLinear(LoRASwitchLinear):  # type: ignore[misc]
    """The same for a layer of experts: x (…, 1, 1, inputs) goes to the experts at `indices` (…, chosen)."""

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        a, b = self.lora_a.astype(x.dtype), (self.scale * self.lora_b).astype(x.dtype)
        z = self.dropout(x)
        for factor in (a, b):
            z = mx.gather_mm(z, factor.swapaxes(-1, -2), rhs_indices=indices, sorted_indices=sorted_indices)
        made: mx.array = self.linear(x, indices, sorted_indices=sorted_indices) + z
        return made


OWN = {LoRALinear: CastLoRALinear, LoRASwitchLinear: CastLoRASwitchLinear}


def use_own(net: nn.Module) -> None:
    """Lets the LoRA layers of `net` compute as above."""
    for each in net.modules():
        each.__class__ = OWN.get(type(each), type(each))
