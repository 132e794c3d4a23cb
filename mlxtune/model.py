"""LanguageModel: a network with its tokenizer. Checks a folder before MLX reads it, loads it, and saves one.

Knows the Hugging Face folder layout and mlx-lm's architectures; knows nothing of adapters, data or training.
"""

import hashlib
import importlib.util
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from safetensors import SafetensorError, safe_open

from mlxtune import borrow, machine
from mlxtune.borrow import TokenizerWrapper
from mlxtune.errors import ModelError, TrustError
from mlxtune.precision import for_compute, parameter_count
from mlxtune.rundir import read_json
from mlxtune.tokenizer import MALFORMED, brief, check_vocabulary, load_tokenizer

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000
SAMPLES, SAMPLE_BYTES = 64, 65_536
# Everything of a model folder but weights and config that a copy of it needs.
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
    "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "chat_template.json", "generation_config.json",
)  # fmt: skip


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


def check(path: Path) -> dict[str, Any]:
    """The config of a model folder whose files are all there and well-formed. Reads headers, no weights.

    Raises ModelError for what is missing or wrong, TrustError for a model that asks to run its own code.
    """
    if not path.is_dir():
        raise ModelError("is not a model folder", where=path, hint="give a folder with config.json and weights")
    if not (path / "config.json").is_file():
        hint = (
            "give the folder of the base model, not of the adapter"
            if (path / "adapter_config.json").is_file()
            else None
        )
        raise ModelError("has no config.json", where=path, hint=hint or "download the model again")
    config = read_json(path / "config.json")
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ModelError("names no model_type", where=path / "config.json", hint="download the model again")
    if config.get("model_file"):
        raise TrustError(
            f"asks to run its own code, {config['model_file']}",
            where=path,
            hint="mlxtune runs no code from model folders",
        )
    kind = borrow.MODEL_REMAPPING.get(config["model_type"], config["model_type"])
    if not kind.isidentifier() or importlib.util.find_spec(f"mlx_lm.models.{kind}") is None:
        raise ModelError(
            f"has the unsupported architecture {config['model_type']!r}",
            where=path / "config.json",
            hint="mlx-lm has no such model; choose a Llama, Qwen, Mistral, Gemma, Phi or similar one",
        )
    for file in {*weight_files(path), *path.glob("model*.safetensors")}:  # mlx-lm reads those beside the index too
        _check_header(file)
    if not any((path / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")):
        raise ModelError("has no tokenizer", where=path, hint="copy tokenizer.json from the original model")
    return config


def fingerprint(path: Path) -> str:
    """A sha256 that tells a model's weights from others, quickly: of every file's length, and of 64 places in it.

    A safetensors file begins with the names, types and places of its tensors, and that beginning is among them.
    """
    digest = hashlib.sha256()
    for file in weight_files(path):
        length = file.stat().st_size
        digest.update(length.to_bytes(8, "little"))
        with file.open("rb") as opened:
            for place in range(0, length, max(SAMPLE_BYTES, length // SAMPLES)):
                opened.seek(place)
                digest.update(opened.read(SAMPLE_BYTES))
    return digest.hexdigest()


def weight_files(path: Path) -> list[Path]:
    """The weight files of a folder, each present. Raises ModelError."""
    index = path / INDEX
    if index.is_file():
        value = read_json(index)
        names = value.get("weight_map") if isinstance(value, dict) else None
        if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
            raise ModelError("has no weight_map", where=index, hint="download the model again")
        for name in sorted(set(names.values())):
            if Path(name).name != name:
                raise ModelError(f"names {name!r}, which is no file of its folder", where=index)
            if not (path / name).is_file():
                raise ModelError(
                    f"lacks the weights {name}, which its index names", where=path, hint="download the model again"
                )
        return [path / name for name in sorted(set(names.values()))]
    files = sorted(path.glob("model*.safetensors"))
    if files:
        return files
    if any(path.glob("*.bin")) or any(path.glob("*.pt*")):
        raise ModelError(
            "has pickled weights only, which can run code when read",
            where=path,
            hint="use a revision with .safetensors files",
        )
    raise ModelError("has no weights (model*.safetensors)", where=path, hint="download the model again")


def _check_header(file: Path) -> None:
    try:
        with safe_open(str(file), framework="numpy") as opened:
            if not opened.keys():
                raise ModelError("holds no tensors", where=file, hint="download the model again")
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"is no whole safetensors file: {error}", where=file, hint="download the model again"
        ) from None


def load(path: Path, *, chat_template: str | None = None, stored: bool = False) -> LanguageModel:
    """Loads a checked folder for computing as `machine.compute_policy` says; `stored` keeps the stored precision.

    `chat_template` is used in place of the tokenizer's own.

    Raises ModelError for a malformed folder, weights that do not fit the architecture, and NaN or infinite weights.
    """
    machine.configure()
    config = check(path)
    tokenizer = load_tokenizer(path, config, chat_template)
    net, config = _network(path)
    check_vocabulary(tokenizer, config.get("vocab_size"), path)
    _check_finite(net, path)
    if not stored:
        net = for_compute(net, machine.policy_here(parameter_count(net)))
    net.eval()
    mx.eval(net.parameters())
    return LanguageModel(net=net, tokenizer=tokenizer, config=config, path=path)


def outline(path: Path) -> tuple[nn.Module, dict[str, Any]]:
    """The network of a folder and its config, as they are stored; no weights are read until they are used.

    Raises ModelError as `load` does, but for what only the weights show.
    """
    check(path)
    return _network(path)


def _network(path: Path) -> tuple[nn.Module, dict[str, Any]]:
    try:
        net, config = borrow.load_model(path, lazy=True)
    except MALFORMED as error:
        raise ModelError(f"does not load: {brief(error)}", where=path, hint="download the model again") from None
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
    weights = dict(tree_flatten(net.parameters()))
    total = sum(weight.nbytes for weight in weights.values())
    shards: list[dict[str, mx.array]] = [{}]
    filled = 0
    for name, weight in weights.items():
        if shards[-1] and filled + weight.nbytes > SHARD_BYTES:
            shards.append({})
            filled = 0
        shards[-1][name] = weight
        filled += weight.nbytes
    names = (
        [WEIGHTS]
        if len(shards) == 1
        else [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    )
    for name, shard in zip(names, shards, strict=True):
        mx.save_safetensors(str(folder / name), shard, metadata={"format": "mlx"})
    index = {
        "metadata": {"total_size": total},
        "weight_map": dict(sorted((key, name) for name, shard in zip(names, shards, strict=True) for key in shard)),
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(dict(sorted(config.items())), indent=2) + "\n", encoding="utf-8")
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
