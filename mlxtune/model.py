"""LanguageModel: a network with its tokenizer. Loads a folder that `folder` has checked, and saves one.

Knows mlx-lm's way to make a network of a folder; knows nothing of adapters, data or training.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlxtune import architecture, borrow, claims, folder, fp8, machine, shards
from mlxtune.borrow import TokenizerWrapper
from mlxtune.errors import ModelError
from mlxtune.folder import INDEX, WEIGHTS, check, fingerprint, weight_files
from mlxtune.precision import for_compute, parameter_count
from mlxtune.tokenizer import MALFORMED, brief, check_vocabulary, load_tokenizer, vocabulary

__all__ = [
    "INDEX", "WEIGHTS", "LanguageModel", "check", "context_length", "fingerprint", "load", "network", "outline", "save",
    "unread", "weight_files", "width",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class LanguageModel:
    """`net` maps tokens (B, T) to logits (B, T, V); `config` is the folder's config.json; `path` the folder."""

    net: nn.Module
    tokenizer: TokenizerWrapper
    config: dict[str, Any]
    path: Path

    @property
    def has_chat_template(self) -> bool:
        return bool(self.tokenizer.has_chat_template)

    @property
    def context_length(self) -> int | None:
        return context_length(self.config)


def context_length(config: dict[str, Any]) -> int | None:
    """Tokens the model was made for, where its config says so."""
    value = config.get("max_position_embeddings")
    return value if isinstance(value, int) else None


def width(config: dict[str, Any]) -> int | None:
    """The length of the hidden states, where the config says so; that of the text model in one for more than text."""
    for part in (config, config.get("text_config")):
        for name in ("hidden_size", "n_embd", "d_model", "dim"):
            if isinstance(part, dict) and type(part.get(name)) is int and part[name] > 0:
                return int(part[name])
    return None


def load(path: Path, *, chat_template: str | None = None, stored: bool = False, thrifty: bool = False) -> LanguageModel:
    """Loads a checked folder for computing as `machine.compute_policy` says; `stored` keeps the stored precision.

    `thrifty` holds no more than the stored weights, for whoever needs no gradients and few, large batches.
    `chat_template` is used in place of the tokenizer's own.

    Raises ModelError for a malformed folder, weights that do not fit the architecture, and NaN or infinite weights.
    """
    machine.configure()
    config = check(path)
    tokenizer = _tokenizer(path, config, chat_template)
    net, config = network(path, config)
    _check_finite(net, path)
    if not stored:
        net = for_compute(net, machine.policy_here(parameter_count(net), thrifty=thrifty))
    net.eval()
    mx.eval(net.parameters())
    return LanguageModel(net=net, tokenizer=tokenizer, config=config, path=path)


def outline(path: Path) -> tuple[nn.Module, dict[str, Any]]:
    """The network of a folder and its config, as they are stored; no weights are read until they are used.

    Raises ModelError as `load` does, but for what only the weights show.
    """
    config = check(path)
    _tokenizer(path, config, None)
    return network(path, config)


def unread(path: Path, config: dict[str, Any]) -> nn.Module:
    """The network of a checked folder, ready to compute with the memory of a few layers: each is read when it is used.

    What was used is held with the network. Raises ModelError as `network` does.
    """
    net, _ = network(path, config)
    net = for_compute(net, machine.policy_here(parameter_count(net), thrifty=True))
    net.eval()
    return net


def _tokenizer(path: Path, config: dict[str, Any], chat_template: str | None) -> TokenizerWrapper:
    tokenizer = load_tokenizer(path, config, chat_template)
    check_vocabulary(tokenizer, vocabulary(config), path)
    return tokenizer


def network(
    path: Path, config: dict[str, Any], watch: Callable[[dict[str, mx.array]], None] = lambda weights: None
) -> tuple[nn.Module, dict[str, Any]]:
    """The network of a checked folder, and the config that describes it: that of other tools' formats is MLX's then.

    Weights are read when they are used. `watch` is told them by the names that they have in the files, 8-bit floats
    made dense, before the architecture names and joins them. Raises ModelError.
    """
    packed = claims.stored_in_fp8(config, folder.tensors(path))

    def change(weights: dict[str, mx.array]) -> dict[str, mx.array]:
        made = weights if packed is None else fp8.all_dense(weights, packed)
        watch(made)
        return made

    plain = config if packed is None else claims.without_claim(config)
    try:
        with folder.only_what_is_named(path, plain) as named:
            net, config = borrow.load_model(named, lazy=True, get_model_classes=architecture.classes_behind(change))
    except MALFORMED as error:
        raise ModelError(f"does not load: {brief(error)}", where=path, hint="download the model again") from None
    claims.check_loaded(net, config, path)
    return net, config


def _check_finite(net: nn.Module, path: Path) -> None:
    for name, weight in tree_flatten(net.parameters()):
        if mx.issubdtype(weight.dtype, mx.floating) and not mx.all(mx.isfinite(weight)).item():
            raise ModelError(
                f"holds NaN or infinite values in {name}", where=path, hint="download or train the model again"
            )


def save(folder: Path, net: nn.Module, config: dict[str, Any], source: Path) -> None:
    """Writes weights, config and the tokenizer files of `source` into `folder`, as mlx-lm and transformers read them.

    `folder` exists and is empty: use it inside `rundir.staged`.
    """
    shards.write(folder, shards.of_network(net))
    shards.describe(folder, config, source)
