"""The settings in a config.json that a network is built from: their types and ranges, before anything is built.

Knows mlx-lm's architectures and the names that configs share; reads no files.
"""

import contextlib
import dataclasses
import importlib.util
import inspect
import io
import math
import re
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxtune import borrow
from mlxtune.errors import ModelError

Weights = dict[str, mx.array]
Change = Callable[[Weights], Weights]

LARGEST = 2**31 - 1  # MLX counts in 32 bits
# whole numbers above 0
SIZES = {
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size",
    "max_position_embeddings", "n_embd", "n_layer", "n_layers", "n_head", "n_heads", "n_positions", "d_model",
    "num_layers", "num_heads", "num_kv_heads", "n_kv_heads",
}  # fmt: skip
# whole numbers, 0 where there are none
COUNTS = {
    "intermediate_size", "moe_intermediate_size", "num_experts", "num_local_experts", "n_routed_experts",
    "num_experts_per_tok", "n_shared_experts",
}  # fmt: skip
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
EPSILONS = {"rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "layernorm_epsilon", "norm_eps"}
POSITIVE = {"rope_theta", "partial_rotary_factor"}
DTYPES = {"float16", "bfloat16", "float32", "float64", "auto"}
AGAIN = "download the model again"


def kind(config: dict[str, Any]) -> str:
    """The name of mlx-lm's architecture for a config with a model_type."""
    name = config["model_type"]
    return str(borrow.MODEL_REMAPPING.get(name, name))


def classes(config: dict[str, Any]) -> tuple[type, type]:
    """The classes of a network and of its settings, as mlx-lm chooses them; what it raises where it has none."""
    choose = inspect.signature(borrow.load_model).parameters["get_model_classes"].default
    network, settings = choose(config)
    return network, settings


def classes_behind(change: Change) -> Callable[[dict[str, Any]], tuple[type, type]]:
    """Like `classes`, but a network's `sanitize` is given what `change` makes of the weights of the files."""

    def chosen(config: dict[str, Any]) -> tuple[type, type]:
        network, settings = classes(config)
        own = getattr(network, "sanitize", lambda net, weights: weights)

        def sanitize(net: Any, weights: Weights) -> Weights:
            net.__class__ = network  # what is loaded is of mlx-lm's own class
            made: Weights = own(net, change(weights))
            return made

        return type(network.__name__, (network,), {"sanitize": sanitize}), settings

    return chosen


def arguments(config: dict[str, Any], file: Path) -> type:
    """The class of the settings of an architecture. Raises ModelError for an architecture that mlx-lm lacks."""
    names = config.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(each, str) for each in names):
        raise ModelError(f"has architectures = {_short(names)}, which is no list of names", where=file, hint=AGAIN)
    name = kind(config)
    if re.fullmatch(r"[\w-]+", name, re.ASCII) and importlib.util.find_spec(f"mlx_lm.models.{name}") is not None:
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # one of them prints, and ends the process
                return classes(config)[1]
        except SystemExit:
            raise ModelError(
                f"has the architecture {_short(config['model_type'])}, which needs a package that is not installed",
                where=file,
                hint="choose another model",
            ) from None
        except (AttributeError, ValueError):  # a module that is no architecture, such as the caches'
            pass
    raise ModelError(
        f"has the unsupported architecture {_short(config['model_type'])}",
        where=file,
        hint="mlx-lm has no such model; choose a Llama, Qwen, Mistral, Gemma, Phi or similar one",
    )


def check(config: dict[str, Any], tensors: int, file: Path) -> None:
    """Refuses settings of a wrong type or out of range, for a model of so many tensors. Raises ModelError."""
    settings = arguments(config, file)
    for name, value, hint in _typed(settings, config):
        if not accepts(hint, value):
            raise ModelError(f"has {name} = {_short(value)}, which is {_what(hint)}", where=file, hint=AGAIN)
    for part in (config, config.get("text_config")):
        if isinstance(part, dict):
            _check_ranges(part, tensors, file)
    _check_dtype(config, file)


def stored_dtype(config: dict[str, Any]) -> str | None:
    """The precision that a config names, in the old way or the new: `float16`, `bfloat16`, `float32`, or None."""
    for part in (config, config.get("text_config")):
        for name in ("dtype", "torch_dtype"):
            value = part.get(name) if isinstance(part, dict) else None
            if isinstance(value, str) and value.removeprefix("torch.") in DTYPES - {"auto"}:
                return value.removeprefix("torch.")
    return None


def accepts(hint: Any, value: Any) -> bool:
    """Whether a value of JSON may stand for what is annotated so. In doubt it may: annotations of numbers are loose.

    None is left to the network: most settings may be left open.
    """
    if value is None:
        return True
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return any(accepts(each, value) for each in typing.get_args(hint) if each is not type(None))
    hint = typing.get_origin(hint) or hint
    if hint in (int, float):
        return type(value) in (int, float) and not math.isnan(value)
    if hint is bool:
        return isinstance(value, bool) or value in (0, 1)
    if hint is str:
        return isinstance(value, str)
    if hint is dict or dataclasses.is_dataclass(hint):
        return isinstance(value, dict)
    if hint in (list, tuple):
        return isinstance(value, list)
    return True


def _typed(settings: type, config: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """(name, value, annotation) of each setting that the config has; numbers of tokens may be lists, as the hub's."""
    if not dataclasses.is_dataclass(settings):
        return []
    hints: dict[str, Any] = {each.name: each.type for each in dataclasses.fields(settings)}
    # annotations may be texts, or nonsense
    with contextlib.suppress(NameError, TypeError, AttributeError, SyntaxError):
        hints |= typing.get_type_hints(settings)
    return [
        (name, config[name], hint)
        for name, hint in hints.items()
        if name in config and not name.endswith(("_token_id", "_token_ids"))
    ]


def _check_ranges(part: dict[str, Any], tensors: int, file: Path) -> None:
    def refuse(name: str, wanted: str) -> typing.NoReturn:
        raise ModelError(f"has {name} = {_short(part[name])}, which is {wanted}", where=file, hint=AGAIN)

    for name, value in part.items():
        if value is None or isinstance(value, list):  # lists: one for each layer
            continue
        if name in SIZES and not (type(value) is int and 0 < value <= LARGEST):
            refuse(name, "no whole number above 0" if not _above(value, LARGEST) else "too large")
        if name in COUNTS and not (type(value) is int and 0 <= value <= LARGEST):
            refuse(name, "no whole number from 0 on" if not _above(value, LARGEST) else "too large")
        if name in LAYERS and value > tensors:
            refuse(name, f"more than its {tensors} tensors")
        if name in EPSILONS and not (type(value) in (int, float) and 0 <= value < 1):
            refuse(name, "no number from 0 to 1")
        if name in POSITIVE and not (type(value) in (int, float) and 0 < value < math.inf):
            refuse(name, "no number above 0")
    heads, groups = part.get("num_attention_heads"), part.get("num_key_value_heads")
    if type(heads) is int and type(groups) is int and heads % groups:
        refuse("num_key_value_heads", f"no divisor of num_attention_heads = {heads}")
    _check_rope(part, file)


def _check_rope(part: dict[str, Any], file: Path) -> None:
    for name in ("rope_scaling", "rope_parameters"):
        value = part.get(name)
        if not isinstance(value, dict):
            continue
        for key in ("factor", "rope_theta"):
            number = value.get(key)
            if number is not None and not (type(number) in (int, float) and 0 < number < math.inf):
                raise ModelError(
                    f"has {name}.{key} = {_short(number)}, which is no number above 0", where=file, hint=AGAIN
                )


def _check_dtype(config: dict[str, Any], file: Path) -> None:
    for name in ("dtype", "torch_dtype"):
        value = config.get(name)
        if value is None or isinstance(value, dict):  # a dict: one for each part of a model
            continue
        plain = value.removeprefix("torch.") if isinstance(value, str) else ""
        if plain not in DTYPES and not plain.startswith("float8"):
            raise ModelError(f"has {name} = {_short(value)}, which is no precision", where=file, hint=AGAIN)


def _above(value: Any, limit: int) -> bool:
    return type(value) in (int, float) and value > limit


def _what(hint: Any) -> str:
    """What a value is not, in words."""
    inner = [each for each in typing.get_args(hint) if each is not type(None)]
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return _what(inner[0])
    names = {int: "no number", float: "no number", bool: "neither true nor false", str: "no text", list: "no list"}
    return names.get(typing.get_origin(hint) or hint, "no group of settings")


def _short(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:80]}…"
