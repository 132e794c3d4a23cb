"""LanguageModel: a network with its tokenizer. Checks a folder before MLX reads it, loads it, and saves one.

Knows the Hugging Face folder layout and mlx-lm's architectures; knows nothing of adapters, data or training.
"""

import contextlib
import importlib.util
import json
import os
import resource
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import mlx.core as mx
import mlx.nn as nn
from huggingface_hub.errors import StrictDataclassError
from mlx.utils import tree_flatten, tree_unflatten
from safetensors import SafetensorError, safe_open

from mlxtune import machine
from mlxtune.errors import ModelError, TrustError
from mlxtune.rundir import read_json

# transformers speaks of frameworks that mlxtune does not need
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


@contextlib.contextmanager
def _open_file_limit_kept() -> Iterator[None]:
    """Importing `mlx_lm.utils` lowers the process's limit of open files for good; here it cannot."""
    set_limit = resource.setrlimit
    resource.setrlimit = lambda *_: None
    try:
        yield
    finally:
        resource.setrlimit = set_limit


with _open_file_limit_kept():
    from mlx_lm import utils as mlx_lm_utils
    from mlx_lm.models.mla import MultiLinear, QuantizedMultiLinear
    from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear
    from mlx_lm.tokenizer_utils import TokenizerWrapper

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000
# Everything of a model folder but weights and config that a copy of it needs.
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
    "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "chat_template.json", "generation_config.json",
)  # fmt: skip
QUANTIZED = (nn.QuantizedLinear, nn.QuantizedEmbedding, QuantizedSwitchLinear, QuantizedMultiLinear)
# What mlx-lm and transformers raise for files that do not say what they should.
MALFORMED = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NameError, OSError, RuntimeError,
    StrictDataclassError, TypeError, ValueError,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class LanguageModel:
    """`net` maps tokens (B, T) to logits (B, T, V); `config` is the folder's config.json; `path` the folder."""

    net: nn.Module
    tokenizer: TokenizerWrapper
    config: dict[str, Any]
    path: Path

    @property
    def text_tokenizer(self) -> Any:
        """The tokenizer of transformers inside, for offsets and templates."""
        return self.tokenizer._tokenizer

    @property
    def has_chat_template(self) -> bool:
        return bool(self.tokenizer.has_chat_template)

    @property
    def context_length(self) -> int | None:
        """Tokens the model was made for, where its config says so."""
        value = self.config.get("max_position_embeddings")
        return value if isinstance(value, int) else None


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
    kind = mlx_lm_utils.MODEL_REMAPPING.get(config["model_type"], config["model_type"])
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


def _brief(error: Exception) -> str:
    """An error of a library in a line: some list hundreds of tensors."""
    line = " ".join(str(error).split()) or type(error).__name__
    return line if len(line) <= 200 else f"{line[:200]}…"


def load_tokenizer(path: Path, config: dict[str, Any], chat_template: str | None = None) -> TokenizerWrapper:
    """The tokenizer of a model folder, with another chat template where one is given.

    Raises ModelError for a malformed one, TrustError for one that asks to run its own code.
    """
    generation = path / "generation_config.json"
    settings = {"eos_token_id": config.get("eos_token_id")}
    if generation.is_file():
        own = read_json(generation)
        settings |= own if isinstance(own, dict) else {}
    ends = settings["eos_token_id"]
    if not all(isinstance(end, int) for end in (ends if isinstance(ends, list) else [ends or 0])):
        raise ModelError(f"has the eos_token_id {ends!r}, not token numbers", where=path)
    try:
        # without this word transformers asks at the terminal whether to run the code
        tokenizer = mlx_lm_utils.load_tokenizer(path, {"trust_remote_code": False}, eos_token_ids=ends)
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise TrustError(
                "has a tokenizer that asks to run its own code",
                where=path,
                hint="mlxtune runs no code from model folders",
            ) from None
        # all that the tokenizers library raises is a bare Exception
        if isinstance(error, MALFORMED) or type(error) is Exception:
            raise ModelError(
                f"has a tokenizer or config that does not load: {_brief(error)}",
                where=path,
                hint="download the model again",
            ) from None
        raise
    use_template(tokenizer, chat_template)
    return tokenizer


def use_template(tokenizer: TokenizerWrapper, chat_template: str | None) -> None:
    """Gives `tokenizer` a chat template, or leaves its own if None; the token that ends a turn ends an answer too."""
    inner = tokenizer._tokenizer
    if chat_template is not None:
        inner.chat_template = chat_template
        tokenizer.has_chat_template = True
    end = _end_of_turn(inner)
    if end is not None:
        tokenizer.eos_token_ids = {*tokenizer.eos_token_ids, end}


def _end_of_turn(tokenizer: Any) -> int | None:
    """The control token that the chat template writes behind an answer, or None where there is none."""
    if not tokenizer.chat_template or not tokenizer.is_fast:
        return None
    answer = "mlxtune"
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except (jinja2.TemplateError, ValueError, TypeError):
        return None
    stop = text.rfind(answer) + len(answer)
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    controls = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    for token, (begin, _) in zip(encoding["input_ids"], encoding["offset_mapping"], strict=True):
        if begin >= stop and token in controls:
            return int(token) if not text[stop:begin].strip() else None
    return None


def write_template(folder: Path, chat_template: str, ends: set[int]) -> None:
    """Makes `chat_template` and the end tokens those of the saved model in `folder`."""
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    _change_json(folder / "tokenizer_config.json", {"chat_template": chat_template})
    _change_json(folder / "config.json", {"eos_token_id": sorted(ends)})
    if (folder / "generation_config.json").is_file():
        _change_json(folder / "generation_config.json", {"eos_token_id": sorted(ends)})


def _change_json(file: Path, changes: dict[str, Any]) -> None:
    value = read_json(file) if file.is_file() else {}
    file.write_text(json.dumps(value | changes, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def load(path: Path, *, chat_template: str | None = None, stored: bool = False) -> LanguageModel:
    """Loads a checked folder for computing as `machine.compute_policy` says; `stored` keeps the stored precision.

    `chat_template` is used in place of the tokenizer's own.

    Raises ModelError for a malformed folder, weights that do not fit the architecture, and NaN or infinite weights.
    """
    config = check(path)
    tokenizer = load_tokenizer(path, config, chat_template)
    try:
        net, config = mlx_lm_utils.load_model(path, lazy=True)
    except MALFORMED as error:
        raise ModelError(f"does not load: {_brief(error)}", where=path, hint="download the model again") from None
    _check_vocabulary(tokenizer, config.get("vocab_size"), path)
    _check_finite(net, path)
    if not stored:
        policy = machine.compute_policy(
            device=machine.device_kind(), memory_bytes=machine.memory_bytes(), float32_bytes=4 * parameter_count(net)
        )
        net = for_compute(net, policy)
    net.eval()
    mx.eval(net.parameters())
    return LanguageModel(net=net, tokenizer=tokenizer, config=config, path=path)


def _check_vocabulary(tokenizer: TokenizerWrapper, embeddings: Any, path: Path) -> None:
    """Refuses tokens without an embedding. A control token that no conversation writes may lack one, as in Gemma 3."""
    if not isinstance(embeddings, int):
        return
    written = str(tokenizer.chat_template)
    lacking = [
        str(token)
        for token_id, token in tokenizer.added_tokens_decoder.items()
        if token_id >= embeddings
        and (not token.special or str(token) in written or token_id in tokenizer.eos_token_ids)
    ]
    if lacking or tokenizer.vocab_size > embeddings:
        raise ModelError(
            f"has a tokenizer of {len(tokenizer)} tokens for {embeddings} embeddings",
            where=path,
            hint="they belong to different models",
        )


def _check_finite(net: nn.Module, path: Path) -> None:
    for name, weight in tree_flatten(net.parameters()):
        if mx.issubdtype(weight.dtype, mx.floating) and not mx.all(mx.isfinite(weight)).item():
            raise ModelError(
                f"holds NaN or infinite values in {name}", where=path, hint="download or train the model again"
            )


def for_compute(net: nn.Module, policy: machine.ComputePolicy) -> nn.Module:
    """Changes `net` to the precision that the policy computes in; the values stay those of the stored weights."""
    if policy.float32:
        net.set_dtype(mx.float32)
    if policy.expand:
        dequantize(net, mx.float32 if policy.float32 else None)
    return net


def dequantize(net: nn.Module, dtype: mx.Dtype | None = None) -> None:
    """Replaces the quantized layers of `net` by dense ones of the same values, in `dtype` or as `dense_dtype` says."""
    layers = [(name, each) for name, each in net.named_modules() if isinstance(each, QUANTIZED)]
    net.update_modules(tree_unflatten([(name, dense(each, dtype or dense_dtype(each))) for name, each in layers]))


def dense_dtype(layer: nn.Module) -> mx.Dtype:
    """The precision that a quantized layer computes in: that of its scales, bfloat16 where these are no floats."""
    return layer.scales.dtype if mx.issubdtype(layer.scales.dtype, mx.floating) else mx.bfloat16


def dense(layer: nn.Module, dtype: mx.Dtype) -> nn.Module:
    """The dense layer of a quantized one. The values are computed in float32, whatever the scales are stored in."""

    def values(weight: mx.array, scales: mx.array, biases: mx.array | None, own: mx.array | None) -> mx.array:
        if biases is not None:
            scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
        packing = {"group_size": layer.group_size, "bits": layer.bits, "mode": layer.mode}
        return mx.dequantize(weight, scales, biases, **packing, global_scale=own, dtype=mx.float32)

    bias = "bias" in layer
    made: nn.Module
    if isinstance(layer, nn.QuantizedEmbedding):
        made = nn.Embedding(1, 1)
    elif isinstance(layer, QuantizedSwitchLinear):
        made = SwitchLinear(1, 1, 1, bias=bias)
    else:
        made = MultiLinear(1, 1, 1) if isinstance(layer, QuantizedMultiLinear) else nn.Linear(1, 1, bias=bias)
    if "global_scale" in layer:  # one for each expert
        experts = zip(layer.weight, layer.scales, layer.global_scale, strict=True)
        weight = mx.stack([values(weight, scales, None, own) for weight, scales, own in experts])
    else:
        weight = values(layer.weight, layer.scales, layer.biases, None)
    made.weight = weight.astype(dtype)
    if bias:
        made.bias = layer.bias
    return made


def parameter_count(net: nn.Module) -> int:
    """Weights of a network, counted as if it were not quantized."""
    return int(mlx_lm_utils.get_total_parameters(net))


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
