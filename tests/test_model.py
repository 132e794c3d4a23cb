"""Model folders: malformed ones are refused in a line before MLX reads them; saved ones load in plain mlx-lm."""

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.mla import MultiLinear
from mlx_lm.models.switch_layers import SwitchLinear

from mlxtune import machine, model, precision
from mlxtune.errors import InputError, MlxtuneError, ModelError, TrustError

# isort: split
import mlx_lm  # after mlxtune.model, which keeps its import from lowering the limit of open files

TOKENS = mx.array([[1, 323, 201, 67, 2, 201, 1, 324]])
Spoil = Callable[[Path], Any]
PACKINGS = [
    *(("affine", bits, group) for bits in (2, 3, 4, 5, 6, 8) for group in (32, 64)),
    ("mxfp4", 4, 32), ("nvfp4", 4, 16), ("mxfp8", 8, 32),
]  # fmt: skip


def logits(net: nn.Module) -> Any:
    return np.array(net(TOKENS))


@pytest.fixture
def folder(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the embedded model that a test may spoil."""
    return Path(shutil.copytree(tiny, tmp_path / "model"))


def set_json(name: str, **values: Any) -> Spoil:
    """Changes values of a JSON file; None takes a key away."""

    def spoil(folder: Path) -> None:
        file = folder / name
        changed = (json.loads(file.read_text()) if file.exists() else {}) | values
        file.write_text(json.dumps({key: value for key, value in changed.items() if value is not None}))

    return spoil


def index(**weight_map: Any) -> Spoil:
    return set_json("model.safetensors.index.json", weight_map=weight_map)


def set_tensor(name: str, value: mx.array | None) -> Spoil:
    def spoil(folder: Path) -> None:
        file = folder / "model.safetensors"
        weights = mx.load(str(file)) | {name: value}
        mx.save_safetensors(str(file), {key: each for key, each in weights.items() if each is not None})

    return spoil


def write(name: str, content: bytes) -> Spoil:
    return lambda folder: (folder / name).write_bytes(content)


def remove(*names: str) -> Spoil:
    return lambda folder: [(folder / name).unlink() for name in names]


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def dangle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("blobs/gone")


def add_token(content: str, *, special: bool) -> Spoil:
    def spoil(folder: Path) -> None:
        file = folder / "tokenizer.json"
        value = json.loads(file.read_text())
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": special}
        value["added_tokens"].append({"id": 1024, "content": content, **flags})
        file.write_text(json.dumps(value))

    return spoil


def with_code(folder: Path) -> None:
    set_json("tokenizer_config.json", tokenizer_class="Own", auto_map={"AutoTokenizer": ["own.Own", None]})(folder)
    code = f"from pathlib import Path\nPath({str(folder / 'RAN')!r}).touch()\nclass Own: pass\n"
    (folder / "own.py").write_text(code)


AGAIN = "; download the model again"
HEADER = "DIR/model.safetensors: is no whole safetensors file: ~" + AGAIN
TOKENIZER = "DIR: has a tokenizer or config that does not load: ~" + AGAIN
MODELS = "; they belong to different models"
FINITE = "; download or train the model again"

# what stands for ~ are the words of a library
MALFORMED: dict[str, tuple[Spoil, str]] = {
    "no folder": (shutil.rmtree, "DIR: is not a model folder; give a folder with config.json and weights"),
    "no config": (remove("config.json"), "DIR: has no config.json" + AGAIN),
    "an adapter": (
        lambda folder: (folder / "config.json").rename(folder / "adapter_config.json"),
        "DIR: has no config.json; give the folder of the base model, not of the adapter",
    ),
    "broken config": (
        write("config.json", b'{\n"model_type": "llama",\n}'),
        "DIR/config.json:3: not valid JSON: ~",
    ),
    "config is a list": (write("config.json", b"[]"), "DIR/config.json: names no model_type" + AGAIN),
    "no model_type": (set_json("config.json", model_type=None), "DIR/config.json: names no model_type" + AGAIN),
    "model_type is a number": (set_json("config.json", model_type=7), "DIR/config.json: names no model_type" + AGAIN),
    "unsupported model_type": (
        set_json("config.json", model_type="t5"),
        "DIR/config.json: has the unsupported architecture 't5'; "
        "mlx-lm has no such model; choose a Llama, Qwen, Mistral, Gemma, Phi or similar one",
    ),
    "model_type is a path": (
        set_json("config.json", model_type="..utils"),
        "DIR/config.json: has the unsupported architecture '..utils'; "
        "mlx-lm has no such model; choose a Llama, Qwen, Mistral, Gemma, Phi or similar one",
    ),
    "no weights": (remove("model.safetensors"), "DIR: has no weights (model*.safetensors)" + AGAIN),
    "pickles only": (
        lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
        "DIR: has pickled weights only, which can run code when read; use a revision with .safetensors files",
    ),
    "missing shard": (
        index(a="model.safetensors", b="model-00002-of-00002.safetensors"),
        "DIR: lacks the weights model-00002-of-00002.safetensors, which its index names" + AGAIN,
    ),
    "index without map": (
        write("model.safetensors.index.json", b"{}"),
        "DIR/model.safetensors.index.json: has no weight_map" + AGAIN,
    ),
    "index with numbers": (index(a=1), "DIR/model.safetensors.index.json: has no weight_map" + AGAIN),
    "index out of the folder": (
        index(a="../model.safetensors"),
        "DIR/model.safetensors.index.json: names '../model.safetensors', which is no file of its folder",
    ),
    "index to an absolute path": (
        index(a="/etc/passwd"),
        "DIR/model.safetensors.index.json: names '/etc/passwd', which is no file of its folder",
    ),
    "cut weights": (cut, HEADER),
    "empty weights": (write("model.safetensors", b""), HEADER),
    "huge header": (write("model.safetensors", b"\xff" * 64), HEADER),
    "header is no JSON": (write("model.safetensors", (8).to_bytes(8, "little") + b"garbage!"), HEADER),
    "overlapping tensors": (
        write(
            "model.safetensors",
            (lambda header: len(header).to_bytes(8, "little") + header + bytes(8))(
                b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
                b'"b":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}'
            ),
        ),
        HEADER,
    ),
    "no tensors": (
        write("model.safetensors", (2).to_bytes(8, "little") + b"{}"),
        "DIR/model.safetensors: holds no tensors" + AGAIN,
    ),
    "a link to nowhere": (dangle, HEADER),
    "garbage beside the index": (
        lambda folder: (index(a="model.safetensors")(folder), write("model-old.safetensors", b"\xff" * 64)(folder)),
        HEADER.replace("model.s", "model-old.s"),
    ),
    "no tokenizer": (
        remove("tokenizer.json", "tokenizer_config.json"),
        "DIR: has no tokenizer; copy tokenizer.json from the original model",
    ),
    "broken tokenizer": (write("tokenizer.json", b"{"), TOKENIZER),
    "tokenizer of no kind": (set_json("tokenizer.json", model={"type": "Magic"}), TOKENIZER),
    "tokenizer config is a list": (write("tokenizer_config.json", b"[]"), TOKENIZER),
    "broken generation config": (
        write("generation_config.json", b"{"),
        "DIR/generation_config.json:1: not valid JSON: ~",
    ),
    "end tokens are texts": (
        set_json("generation_config.json", eos_token_id=["<|im_end|>"]),
        "DIR: has the eos_token_id ['<|im_end|>'], not token numbers",
    ),
    "more text tokens than embeddings": (
        add_token("mlxtune", special=False),
        "DIR: has a tokenizer of 1025 tokens for 1024 embeddings" + MODELS,
    ),
    "an end token without an embedding": (
        lambda folder: (
            add_token("<|stop|>", special=True)(folder),
            set_json("config.json", eos_token_id=[2, 1024])(folder),
        ),
        "DIR: has a tokenizer of 1025 tokens for 1024 embeddings" + MODELS,
    ),
    "smaller embedding": (
        lambda folder: (
            set_tensor("model.embed_tokens.weight", mx.zeros((1000, 192)))(folder),
            set_json("config.json", vocab_size=1000)(folder),
        ),
        "DIR: has a tokenizer of 1024 tokens for 1000 embeddings" + MODELS,
    ),
    "wrong shape": (
        set_tensor("model.layers.1.mlp.up_proj.weight", mx.zeros((511, 192))),
        "DIR: does not load: ~(512, 192)~(511, 192)~model.layers.1.mlp.up_proj.weight" + AGAIN,
    ),
    "missing tensor": (
        set_tensor("model.layers.1.mlp.up_proj.weight", None),
        "DIR: does not load: ~model.layers.1.mlp.up_proj.weight." + AGAIN,
    ),
    "surplus tensor": (
        set_tensor("model.extra", mx.zeros((3,))),
        "DIR: does not load: ~model.extra." + AGAIN,
    ),
    "many missing tensors": (
        set_json("config.json", attention_bias=True),
        "DIR: does not load: ~model.layers.0.self_attn.k_proj.bias, ~…" + AGAIN,  # cut before the last of twelve
    ),
    "missing setting": (
        set_json("config.json", intermediate_size=None),
        "DIR: does not load: ~'intermediate_size'" + AGAIN,
    ),
    "impossible setting": (set_json("config.json", hidden_size=0), "DIR: does not load: ~" + AGAIN),
    "NaN": (
        set_tensor("model.norm.weight", mx.array([float("nan")] + [1.0] * 191)),
        "DIR: holds NaN or infinite values in model.norm.weight" + FINITE,
    ),
    "infinite": (
        set_tensor("model.norm.weight", mx.array([float("-inf")] + [1.0] * 191, mx.bfloat16)),
        "DIR: holds NaN or infinite values in model.norm.weight" + FINITE,
    ),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_folders_are_refused_in_a_line(name: str, folder: Path) -> None:
    spoil, line = MALFORMED[name]
    spoil(folder)
    started = time.monotonic()
    with pytest.raises(MlxtuneError) as caught:
        model.load(folder)
    assert time.monotonic() - started < 2
    assert isinstance(caught.value, InputError)
    found = str(caught.value).replace(str(folder), "DIR")
    assert re.fullmatch(re.escape(line).replace("\\~", ".+"), found), found
    assert len(found) < 400


def test_a_model_that_brings_code_is_not_trusted(folder: Path) -> None:
    (folder / "own.py").write_text(f"open({str(folder / 'RAN')!r}, 'w')\n")
    set_json("config.json", model_file="own.py")(folder)
    with pytest.raises(TrustError) as caught:
        model.load(folder)
    line = "DIR: asks to run its own code, own.py; mlxtune runs no code from model folders"
    assert str(caught.value).replace(str(folder), "DIR") == line
    assert caught.value.exit_code == 4
    assert not (folder / "RAN").exists()


def test_a_tokenizer_that_brings_code_is_not_trusted_and_nobody_is_asked(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_code(folder)
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # the answer to transformers' question
    with pytest.raises(TrustError) as caught:
        model.load(folder)
    line = "DIR: has a tokenizer that asks to run its own code; mlxtune runs no code from model folders"
    assert str(caught.value).replace(str(folder), "DIR") == line
    assert not (folder / "RAN").exists()


def test_a_control_token_that_nobody_writes_may_lack_an_embedding(folder: Path) -> None:
    """Gemma 3 has one for images: 262,145 tokens for 262,144 embeddings."""
    add_token("<image>", special=True)(folder)
    assert len(model.load(folder).tokenizer) == 1025


def test_a_control_token_of_the_template_may_not(folder: Path) -> None:
    add_token("<|turn|>", special=True)(folder)
    set_json("tokenizer_config.json", chat_template="{{ messages[0].content }}<|turn|>")(folder)
    with pytest.raises(ModelError, match="1025 tokens for 1024 embeddings"):
        model.load(folder)


def test_check_reads_no_weights(folder: Path) -> None:
    set_tensor("model.norm.weight", mx.full((192,), float("nan")))(folder)
    assert model.check(folder)["model_type"] == "llama"


def test_the_limit_of_open_files_is_left_alone() -> None:
    code = """
import resource
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (1000, hard))
import mlxtune.model, mlxtune.adapter, mlxtune.fuse, mlxtune.convert
assert resource.getrlimit(resource.RLIMIT_NOFILE) == (1000, hard), resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (999, hard))  # others may still change it
assert resource.getrlimit(resource.RLIMIT_NOFILE) == (999, hard)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_loading_computes_in_float32_on_a_cpu(tiny: Path, tmp_path: Path) -> None:
    stored = model.load(tiny, stored=True)
    stored.net.set_dtype(mx.bfloat16)
    save(stored, tmp_path / "half")
    half, computing = model.load(tmp_path / "half", stored=True), model.load(tmp_path / "half")
    assert half.net.model.norm.weight.dtype == mx.bfloat16
    if machine.device_kind() == "cpu":
        assert computing.net.model.norm.weight.dtype == mx.float32
    assert (computing.context_length, computing.has_chat_template) == (512, True)


@pytest.mark.parametrize(
    ("config", "width"),
    [
        ({"hidden_size": 64, "n_embd": 1}, 64),
        ({"n_embd": 768}, 768),
        ({"text_config": {"hidden_size": 2560}, "vision_config": {"hidden_size": 1}}, 2560),
        ({"hidden_size": "64"}, None),
        ({}, None),
    ],
)
def test_the_width_of_a_model(config: dict[str, Any], width: int | None) -> None:
    assert model.width(config) == width


def save(lm: model.LanguageModel, folder: Path) -> None:
    folder.mkdir()
    model.save(folder, lm.net, lm.config, lm.path)


FILES = ["config.json", "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json"]


def test_saved_folders_load_in_plain_mlx_lm(tiny: Path, tmp_path: Path) -> None:
    lm = model.load(tiny)
    save(lm, tmp_path / "copy")
    assert sorted(each.name for each in (tmp_path / "copy").iterdir()) == sorted([*FILES, "model.safetensors"])
    plain, tokenizer = mlx_lm.load(str(tmp_path / "copy"))
    np.testing.assert_array_equal(logits(plain), logits(lm.net))
    np.testing.assert_array_equal(logits(model.load(tmp_path / "copy").net), logits(lm.net))
    assert tokenizer.encode("Grüße 🙂") == lm.tokenizer.encode("Grüße 🙂")
    assert tokenizer.chat_template == lm.tokenizer.chat_template
    assert json.loads((tmp_path / "copy" / "config.json").read_text()) == json.loads((tiny / "config.json").read_text())


def test_saved_in_shards(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "SHARD_BYTES", 1_500_000)
    lm = model.load(tiny)
    save(lm, tmp_path / "copy")
    shards = [f"model-{number:05d}-of-00004.safetensors" for number in range(1, 5)]
    assert sorted(each.name for each in (tmp_path / "copy").iterdir()) == sorted([*FILES, *shards])
    assert [each.name for each in model.weight_files(tmp_path / "copy")] == shards
    found: dict[str, str] = {}
    for name in shards:
        tensors = mx.load(str(tmp_path / "copy" / name))
        assert sum(each.nbytes for each in tensors.values()) <= 1_500_000
        found |= dict.fromkeys(tensors, name)
    written = json.loads((tmp_path / "copy" / "model.safetensors.index.json").read_text())
    assert written == {"metadata": {"total_size": 4 * 1_377_600}, "weight_map": dict(sorted(found.items()))}
    plain, _ = mlx_lm.load(str(tmp_path / "copy"))
    np.testing.assert_array_equal(logits(plain), logits(lm.net))
    np.testing.assert_array_equal(logits(model.load(tmp_path / "copy").net), logits(lm.net))


def test_a_tensor_larger_than_a_shard_has_one_of_its_own(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "SHARD_BYTES", 1)
    save(model.load(tiny), tmp_path / "copy")
    assert len(model.weight_files(tmp_path / "copy")) == 3 * 9 + 2
    model.load(tmp_path / "copy")


@pytest.mark.parametrize(("mode", "bits", "group_size"), PACKINGS)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_dense_layers_have_the_values_of_quantized_ones(mode: str, bits: int, group_size: int, dtype: mx.Dtype) -> None:
    """Against mx.dequantize on the stored scales in float32, for each kind of layer."""
    packing = {"group_size": group_size, "bits": bits, "mode": mode}
    layers = [nn.Linear(128, 6), nn.Linear(128, 6, bias=False), nn.Embedding(6, 128)]
    layers += [SwitchLinear(128, 6, 3), MultiLinear(128, 6, 3)]
    for layer in layers:
        layer.set_dtype(dtype)
        packed = layer.to_quantized(**packing)
        assert isinstance(packed, precision.QUANTIZED)
        scales, biases = packed.scales, packed.biases
        if mode == "affine":
            scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
        expected = mx.dequantize(packed.weight, scales, biases, **packing, dtype=mx.float32)
        made = precision.dense(packed, mx.float32)
        assert type(made) is type(layer)
        np.testing.assert_array_equal(made.weight, expected)
        assert sorted(made.parameters()) == sorted(layer.parameters())
        if "bias" in layer:
            np.testing.assert_array_equal(made.bias.astype(mx.float32), layer.bias.astype(mx.float32))
        assert precision.dense_dtype(packed) == (dtype if mode == "affine" else mx.bfloat16)
        net = nn.Sequential(packed)
        precision.dequantize(net)
        assert net.layers[0].weight.dtype == precision.dense_dtype(packed)


def test_the_scales_of_experts_count() -> None:
    layer = SwitchLinear(64, 32, 3)
    layer.weight = layer.weight * mx.array([1.0, 10.0, 100.0])[:, None, None]
    packed = layer.to_quantized(16, 4, "nvfp4", global_scale=True)
    made = precision.dense(packed, mx.float32)
    error = mx.abs(made.weight - layer.weight).max(axis=(1, 2)) / mx.abs(layer.weight).max(axis=(1, 2))
    assert 0.01 < error.max().item() < 0.2  # 4 bits


def test_a_quantized_model_is_expanded_to_the_same_function(tiny: Path) -> None:
    """On a CPU all is computed in float32, also where the scales are no floats (they would give bfloat16)."""
    policy = machine.ComputePolicy(float32=True, expand=True, spread=False, compile=False, pad_multiple=1)
    for mode, bits, group_size in PACKINGS[-4:]:
        lm = model.load(tiny, stored=True)
        nn.quantize(lm.net, group_size, bits, mode=mode)
        packed = logits(lm.net)
        net = precision.for_compute(lm.net, policy)
        assert {each.dtype for _, each in tree_flatten(net.parameters())} == {mx.float32}
        assert not any(isinstance(each, precision.QUANTIZED) for each in net.modules())
        np.testing.assert_allclose(logits(net), packed, atol=2e-4)


def test_spread_matrices_are_the_same_function(tiny: Path) -> None:
    """For the reference BLAS: rows with a gap behind them, which MLX copies rather than multiplies transposed."""
    policy = machine.ComputePolicy(float32=True, expand=True, spread=True, compile=False, pad_multiple=1)
    lm = model.load(tiny, stored=True)
    stored = dict(tree_flatten(lm.net.parameters()))
    before = logits(lm.net)
    after = dict(tree_flatten(precision.for_compute(lm.net, policy).parameters()))
    assert after.keys() == stored.keys()
    for name, weight in after.items():
        assert mx.array_equal(weight, stored[name]).item()
        if weight.ndim == 2:
            assert np.array(weight, copy=False).strides == (4 * weight.shape[1] + 4, 4), name
    np.testing.assert_allclose(logits(lm.net), before, atol=2e-4)


def test_a_policy_that_expands_nothing_changes_nothing(tiny: Path) -> None:
    policy = machine.ComputePolicy(float32=False, expand=False, spread=False, compile=True, pad_multiple=32)
    lm = model.load(tiny, stored=True)
    nn.quantize(lm.net, 64, 4)
    before = {name: each for name, each in tree_flatten(lm.net.parameters())}
    after = dict(tree_flatten(precision.for_compute(lm.net, policy).parameters()))
    assert all(after[name] is each for name, each in before.items())


def test_parameters_are_counted_as_if_not_quantized(tiny: Path) -> None:
    lm = model.load(tiny, stored=True)
    assert precision.parameter_count(lm.net) == 1_377_600
    nn.quantize(lm.net, 64, 3)
    assert precision.parameter_count(lm.net) == 1_377_600
