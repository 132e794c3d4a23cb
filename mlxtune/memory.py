"""Predicts the peak memory of training from shapes. Knows networks and recipes, loads nothing.

The terms follow from what MLX and the trainer keep at once; the few constants were measured on a CPU by
`scripts/bench_memory.py`, which compares predictions with what MLX says. On a GPU nothing of it has been measured.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlxtune import adapter, machine
from mlxtune.borrow import QuantizedSwitchLinear, SwitchLinear
from mlxtune.crossentropy import chunk_size
from mlxtune.data.batches import up
from mlxtune.data.render import Sample
from mlxtune.likelihood import part_count
from mlxtune.model import width
from mlxtune.precision import QUANTIZED, parameter_count
from mlxtune.recipe import LoraRecipe, QuantizeRecipe, Recipe

# arrays of the size of what is trained that an optimizer keeps; Adafactor's are sums over rows and columns
STATES = {"adamw": 2, "adam": 2, "adamax": 2, "adadelta": 2, "adafactor": 0}
OTHER_STATES = 1
# names under which layers write to the residual stream: their input is not that of their neighbours
OUTWARD = {"o_proj", "out_proj", "dense", "wo", "c_proj", "down_proj", "fc2", "w2", "dense_4h_to_h"}

# Measured, on the configurations that `scripts/bench_memory.py` fits with. MLX's main thread hands out operations
# ahead of those that compute, and what these will free is held so long: in the backward pass, a block's activations
# once more, or where blocks are computed again, 2.2 times; in an optimizer's update, so many arrays of what is trained.
AHEAD_BLOCKS, AGAIN_BLOCKS, AHEAD_ARRAYS = 1.0, 2.2, 16
# Of float32 logits: they, what becomes of them in the loss and their gradients; where they are made in chunks, so many
# chunks at most. `SAVING`: in MLX's usual order, which gradient checkpointing takes (see `machine.configure`).
LOGITS_COPIES, SAVING_LOGITS_COPIES = 5.0, 3.1
CHUNKS, SAVING_CHUNKS = 13, 10
LATE = 0.6  # share of what blocks keep that is still held when, breadth first, gradients are computed at the end


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """What of the rows decides: tokens of the longest, supervised tokens of the row that has most, and their number."""

    longest: int
    supervised: int
    count: int

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> "Rows":
        return cls(
            longest=max(len(sample.tokens) for sample in samples),
            supervised=max(sample.trained_count for sample in samples),
            count=len(samples),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Peak:
    """Bytes at the highest point of a training, by what holds them; and the peak while the model is loaded before it.

    `adapter`: what is trained, its gradient, the optimizer's state, and the copies that can be gone back to.
    """

    weights: int
    adapter: int
    activations: int
    logits: int
    loading: int

    @property
    def training(self) -> int:
        return self.weights + self.adapter + self.activations + self.logits

    @property
    def total(self) -> int:
        return max(self.training, self.loading)


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """What of the machine decides: usable bytes, parts of a batch at once, their tokens, padding, sizes of chunks.

    `attention`: as `machine.attention_blocks` has it.
    """

    usable_bytes: int
    parts: int
    most_tokens: int | None
    attention: tuple[int | None, int]
    pad_multiple: int
    chunk_bytes: int
    policy: machine.ComputePolicy

    @classmethod
    def here(cls, parameters: int) -> "Place":
        """This machine, for a model of so many parameters."""
        device, policy = machine.device_kind(), machine.policy_here(parameters)
        return cls(
            usable_bytes=machine.usable_here(),
            parts=machine.batch_parts(device, machine.own_cores()),
            most_tokens=machine.most_tokens(device),
            attention=machine.attention_blocks(device),
            pad_multiple=policy.pad_multiple,
            chunk_bytes=machine.chunk_bytes(device),
            policy=policy,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """A linear layer in a block: its sizes, and whether it is adapted or trained. `active`: experts for a token."""

    name: str
    inputs: int
    outputs: int
    experts: int
    active: int
    trained: bool

    @property
    def shared_input(self) -> tuple[str, bool]:
        """Layers with the same one read the same input."""
        parent, _, own = self.name.rpartition(".")
        return parent, own in OUTWARD


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """What of a network decides.

    `largest`: numbers of its largest array; `trained`: numbers that training changes, in so many `arrays`; `element`:
    bytes of a number that it computes with; `width`: of the hidden states; `heads`, `queries`, `keys`: attention's
    sizes. `blocks` are those that the backward pass goes through: from the first one with something to train.
    """

    stored_bytes: int
    held_bytes: int
    largest: int
    trained: int
    arrays: int
    element: int
    vocabulary: int
    width: int
    heads: int
    queries: int
    keys: int
    blocks: Sequence[Sequence[Layer]]


def describe(net: nn.Module, config: dict[str, Any], recipe: Recipe, policy: machine.ComputePolicy) -> Network:
    """The shapes of a network, loaded or not, when it is quantized and trained as the recipe says.

    Raises RecipeError as `adapter.targets` does.
    """
    lora = recipe.lora
    quantize = recipe.quantize if "quantization" not in config else None
    stored = sum(value.nbytes for _, value in tree_flatten(net.parameters())) - _saved(net, quantize)
    text = config | config.get("text_config", {})
    hidden = width(config) or 1
    heads = _number(text, "num_attention_heads", "n_head", "n_heads", "num_heads") or max(1, hidden // 64)
    per_head = _number(text, "head_dim") or max(1, hidden // heads)
    chosen = set(adapter.targets(net, lora)) if lora.method != "full" else set()
    count = len(net.layers) if lora.num_layers == -1 else lora.num_layers
    blocks = [_layers(block, chosen, text, lora.method == "full") for block in net.layers[-count:]]
    if lora.method == "full":
        parts = [net] if lora.num_layers == -1 else net.layers[-count:]
        shapes = [value.size for part in parts for _, value in tree_flatten(part.parameters())]
    else:
        adapted = [each for block in blocks for each in block if each.trained]
        shapes = [each.experts * lora.rank * size for each in adapted for size in (each.inputs, each.outputs)]
        shapes += [each.outputs for each in adapted if lora.method == "dora"]
    element = 4 if policy.float32 else min(4, max(2, _element(net)))
    return Network(
        stored_bytes=stored,
        held_bytes=element * parameter_count(net) if policy.float32 or policy.expand else stored,
        largest=max(value.size for _, value in tree_flatten(net.parameters())),
        trained=sum(shapes),
        arrays=len(shapes),
        element=element,
        vocabulary=_number(text, "vocab_size") or net(mx.zeros((1, 1), dtype=mx.int32)).shape[-1],
        width=hidden,
        heads=heads,
        queries=heads * per_head,
        keys=(_number(text, "num_key_value_heads", "num_kv_heads") or heads) * per_head,
        blocks=blocks,
    )


def _saved(net: nn.Module, quantize: QuantizeRecipe | None) -> int:
    """Bytes that quantizing saves: a weight's bits, and of each group two halves, or a byte where there is no bias."""
    if quantize is None:
        return 0
    weights = [
        module.weight
        for module in net.modules()
        if hasattr(module, "to_quantized") and module.weight.shape[-1] % quantize.group_size == 0
    ]
    bits = quantize.bits + (32 if quantize.mode == "affine" else 8) / quantize.group_size
    return sum(weight.nbytes - int(weight.size * bits / 8) for weight in weights)


def _number(values: dict[str, Any], *names: str) -> int | None:
    return next((values[name] for name in names if type(values.get(name)) is int and values[name] > 0), None)


def _element(net: nn.Module) -> int:
    """Bytes of a floating number that the network computes in, as most of its norms and embeddings say."""
    sizes = [value.dtype.size for _, value in tree_flatten(net.parameters()) if mx.issubdtype(value.dtype, mx.floating)]
    return max(set(sizes), key=sizes.count, default=4)


def _layers(block: nn.Module, chosen: set[str], config: dict[str, Any], full: bool) -> list[Layer]:
    found = []
    for name, module in block.named_modules():
        if not isinstance(module, adapter.LAYERS):
            continue
        inputs = module.weight.shape[-1]
        if isinstance(module, QUANTIZED):
            inputs = inputs * 32 // module.bits
        experts = module.weight.shape[0] if isinstance(module, SwitchLinear | QuantizedSwitchLinear) else 1
        active = min(experts, _number(config, "num_experts_per_tok", "moe_topk", "top_k") or 2) if experts > 1 else 1
        found.append(
            Layer(
                name=name,
                inputs=inputs,
                outputs=module.weight.shape[-2],
                experts=experts,
                active=active,
                trained=full or name in chosen,
            )
        )
    return found


def predict(network: Network, recipe: Recipe, rows: Rows, place: Place) -> Peak:
    """The peak of training on batches of the longest rows, each a line of its own.

    Validation takes no more than a batch of training, as nothing is kept for a backward pass.
    """
    train, size = recipe.train, network.element
    width = up(rows.longest, place.pad_multiple)
    lines, parts, length = min(train.batch_size, rows.count), place.parts, width - 1
    parts = min(parts, lines)
    lines = min(lines, parts * -(-lines // part_count((lines, width), parts, place.most_tokens)))  # at once
    attending = _attending(network, place, length)
    block = max((_kept(network, layers, recipe.lora, attending) for layers in network.blocks), default=0.0)
    block_bytes = size * lines * length * block + _made_dense(network, recipe.lora)
    kept = size * lines * length * len(network.blocks) * (network.width if train.grad_checkpoint else block)
    ahead = block_bytes * (AGAIN_BLOCKS if train.grad_checkpoint else AHEAD_BLOCKS)
    logits = _logits(network, recipe, lines * min(rows.supervised, length), parts, place)

    full = recipe.lora.method == "full"
    trained = (size if full else 4) * network.trained
    states = STATES.get(train.optimizer, OTHER_STATES)
    copies = 2 if full else 3  # the newest, the good, and the best, which at first are the weights themselves
    gradients = parts + (train.grad_accumulation_steps > 1)
    late = 0.0 if train.grad_checkpoint else LATE * kept
    phases: list[tuple[float, float, float]] = [
        ((copies + states) * trained, kept, logits),
        ((copies + states) * trained, kept + ahead, 0),
        ((copies + states + gradients) * trained, late, 0),
        ((copies + states + 2) * trained + _ahead(trained, network.arrays), 0, 0),
    ]
    held, activations, logits = max(phases, key=sum)
    return Peak(
        weights=network.held_bytes,
        adapter=int(held),
        activations=int(activations),
        logits=int(logits),
        loading=_loading(network),
    )


def _logits(network: Network, recipe: Recipe, supervised: int, parts: int, place: Place) -> float:
    """Bytes of the loss at `supervised` positions; in chunks where there are more, unless the head is trained."""
    saving = recipe.train.grad_checkpoint
    whole = 4 * network.vocabulary * supervised * (SAVING_LOGITS_COPIES if saving else LOGITS_COPIES)
    trained_head = recipe.lora.method == "full" and recipe.lora.num_layers == -1
    if trained_head or supervised <= parts * chunk_size(network.vocabulary, place.chunk_bytes):
        return whole
    return min(whole, place.chunk_bytes * (SAVING_CHUNKS if saving else CHUNKS))


def _made_dense(network: Network, lora: LoraRecipe) -> float:
    """Bytes of the weights of a block that DoRA adds its update to, to take their norms."""
    if lora.method != "dora":
        return 0.0
    return max(4.0 * sum(each.inputs * each.outputs for each in block if each.trained) for block in network.blocks)


def _attending(network: Network, place: Place, length: int) -> int:
    """Numbers that attention keeps of each token: its weights in MLX's own; in ours its output and their sum."""
    size, shortest = place.attention
    own = size is None or length < shortest
    return network.heads * length if own else network.heads + network.queries


def _kept(network: Network, layers: Sequence[Layer], lora: LoraRecipe, attending: int) -> float:
    """Numbers that a block keeps of each token for the backward pass.

    The output of each layer, where the residual stream is two; what the attention keeps; what the activation function
    computes on its way; the inputs of trained layers, once where they share them; what is in between an adapter's
    factors; and the outputs that DoRA scales.
    """
    outputs = sum(each.active * each.outputs for each in layers)
    inner = sum(
        2 * each.active * each.inputs
        for each in layers
        if each.shared_input[1] and not adapter.matches(each.name, "attention")
    )
    trained = [each for each in layers if each.trained]
    inputs = {each.shared_input: each.inputs * (each.active if each.shared_input[1] else 1) for each in trained}
    between = 0.0 if lora.method == "full" else sum(each.active * lora.rank for each in trained)
    dropped = sum(1.25 * each.active * each.inputs for each in trained) if lora.dropout else 0.0
    scaled = sum(each.outputs for each in trained) if lora.method == "dora" else 0
    return outputs + inner + attending + sum(inputs.values()) + 2 * between + dropped + scaled


def _ahead(trained: int, arrays: int) -> int:
    """Bytes of an update that have been handed out and not yet been computed."""
    return min(trained, AHEAD_ARRAYS * trained // max(1, arrays))


def _loading(network: Network) -> int:
    """All that is stored is read, and looked through for NaN, before the first weight is changed to what is held."""
    read = network.stored_bytes if network.stored_bytes != network.held_bytes else 0
    return network.held_bytes + read + 2 * network.largest


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What is trained, loaded or not, on which rows and where."""

    net: nn.Module
    config: dict[str, Any]
    rows: Rows
    place: Place

    @classmethod
    def here(cls, net: nn.Module, config: dict[str, Any], rows: Rows) -> "Job":
        """A training on this machine."""
        return cls(net=net, config=config, rows=rows, place=Place.here(parameter_count(net)))

    def peak(self, recipe: Recipe) -> Peak:
        """The peak of this training as the recipe says."""
        return predict(describe(self.net, self.config, recipe, self.place.policy), recipe, self.rows, self.place)
