"""mlx-lm's own AWQ: scales that move between layers, and clipping, chosen by what goes through each block.

Lin et al. 2023, arXiv 2306.00978. A column of a layer's weight times s, and what makes its input divided by s, compute
the same; the s and the clipping that lose least in quantized blocks are searched. So weights that stay dense change as
well: norms, and biases of the layer before. Knows networks and samples, not folders; chooses nothing itself.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlxtune.borrow import AWQ_MODEL_CONFIGS, awq_quantize
from mlxtune.data.render import Sample
from mlxtune.errors import InputError, ModelError
from mlxtune.quant.packing import Packed, Packing

WINDOW = 256  # tokens that are read together
MOST_WINDOWS = 16  # of them; more make no difference to the KL of the embedded model
GRID = 20  # scales that are tried, and twice the clippings: mlx-lm's own number
OTHERWISE = "use gptq"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaled:
    """`packed` layers by name, and the weights that stay dense but have `changed`, by theirs."""

    packed: dict[str, Packed]
    changed: dict[str, mx.array]


def knows(config: Mapping[str, Any]) -> bool:
    """Whether mlx-lm's AWQ has a model's architecture in its table."""
    return config["model_type"] in AWQ_MODEL_CONFIGS


def layers_of(net: nn.Module, config: Mapping[str, Any]) -> set[str]:
    """The names of the layers that AWQ packs in `net`, of which no weight is read.

    Raises ModelError for an architecture that mlx-lm's AWQ does not know, or whose blocks lack what it scales.
    """
    if not knows(config):
        names = ", ".join(sorted(AWQ_MODEL_CONFIGS))
        raise ModelError(
            f"mlx-lm's awq does not know the architecture {config['model_type']!r}",
            where="quantize.method",
            hint=f"{OTHERWISE}; awq knows {names}",
        )
    known = AWQ_MODEL_CONFIGS[config["model_type"]]
    text = net[known.lm_key] if known.lm_key is not None else net
    found = [text.model[known.embed], *([text[known.lm_head]] if known.lm_head in text else [])]
    for block in text.layers:
        _check_scaled(block, known.scale_configs)
        leaves = tree_flatten(block.leaf_modules(), is_leaf=nn.Module.is_module)
        found += [each for _, each in leaves if hasattr(each, "to_quantized")]
    packed = {id(each) for each in found}
    return {name for name, each in net.named_modules() if id(each) in packed}


def _check_scaled(block: nn.Module, configs: Sequence[Any]) -> None:
    """Refuses a block without a part that is scaled in one of its architecture."""
    inside = {name for name, _ in block.named_modules()}
    for each in configs:
        if each.use_config is not None and not each.use_config(block):
            continue
        prefix = f"{each.block}." if each.block is not None else ""
        for name in (each.prev, *(prefix + layer for layer in each.layers)):
            if name not in inside:
                raise ModelError(
                    f"mlx-lm's awq scales {name}, which this model's blocks do not have",
                    where="quantize.method",
                    hint=OTHERWISE,
                )


def windows(samples: Sequence[Sample], longest: int = WINDOW) -> mx.array:
    """(N, T) int32: the tokens of all samples one behind the other, cut into windows of T; the last, shorter one falls.

    T is `longest`, or all there is where that is less. Of more than `MOST_WINDOWS`, that many that lie evenly over the
    tokens. Raises InputError below 2 tokens.
    """
    tokens = [token for sample in samples for token in sample.tokens]
    if len(tokens) < 2:
        raise InputError("awq needs rows of at least 2 tokens", where="quantize.method", hint="give more")
    length = max(2, min(longest, len(tokens)))
    count = len(tokens) // length
    step = max(1.0, count / MOST_WINDOWS)
    starts = [length * int(number * step) for number in range(min(count, MOST_WINDOWS))]
    return mx.array([tokens[start : start + length] for start in starts], dtype=mx.int32)


def quantize(
    net: nn.Module,
    config: Mapping[str, Any],
    samples: Sequence[Sample],
    packing: Packing,
    dtypes: Mapping[str, mx.Dtype] | None = None,
) -> Scaled:
    """Quantizes `net` in place, in the precision of its weights, each layer of `layers_of` as `packing` says.

    `dtypes` are the types of what is given back, by the weights' names; those of `net` where there are none.
    Raises ModelError as `layers_of`, and where the network's values overflow; InputError for another mode than affine
    and for too few tokens.
    """
    if packing.mode != "affine":
        raise InputError(f"awq packs the affine mode only, not {packing.mode}", where="quantize.method")
    names = layers_of(net, config)
    context = config.get("max_position_embeddings")
    tokens = windows(samples, min(WINDOW, context) if isinstance(context, int) else WINDOW)
    before = dict(tree_flatten(net.parameters()))
    written = {name: each.dtype for name, each in before.items()} | dict(dtypes or {})
    for name in names:
        del before[f"{name}.weight"]
    try:
        awq_quantize(
            net,
            tokens,
            AWQ_MODEL_CONFIGS[config["model_type"]],
            group_size=packing.group_size,
            bits=packing.bits,
            embed_group_size=packing.group_size,
            embed_bits=packing.bits,
            n_grid=GRID,
        )
    except AttributeError as error:
        if "NoneType" not in str(error):
            raise
        raise _overflow() from None  # no scale has an error below infinity
    after = dict(tree_flatten(net.parameters()))
    # where norms are more precise than layers, what is scaled has become as precise
    packed = {
        name: Packed(
            after[f"{name}.weight"],
            *(after[f"{name}.{part}"].astype(written[f"{name}.weight"]) for part in ("scales", "biases")),
        )
        for name in names
    }
    changed = {
        name: after[name].astype(written[name])
        for name, each in before.items()
        if not mx.array_equal(each, after[name]).item()
    }
    mx.eval([[each.weight, each.scales, each.biases] for each in packed.values()], changed)
    made = [*(each.scales for each in packed.values()), *changed.values()]
    if not mx.all(mx.stack([mx.all(mx.isfinite(each)) for each in made])).item():
        raise _overflow()
    return Scaled(packed=packed, changed=changed)


def _overflow() -> ModelError:
    return ModelError(
        "what this model computes is too large for the precision of its weights",
        where="quantize.method",
        hint="cast them with --dtype bfloat16 or float32",
    )
