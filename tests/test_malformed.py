"""Malformed model folders: `convert` refuses each in one line, with nothing left behind and nothing run."""

import os
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from tests import spoil
from tests.spoil import Spoil, both, edit, in_header, index, remove, set_json, set_tensor, whole_index, write

NORM = "model.norm.weight"
END = 4 * 1_377_600  # bytes of its tensors
AGAIN = "; download the model again"
HEADER = "DIR/model.safetensors: is no whole safetensors file: ~" + AGAIN
TOKENIZER = "DIR: has a tokenizer or config that does not load: ~" + AGAIN
MODELS = "; they belong to different models"
FINITE = "; download or train the model again"
ORIGINAL = "; start from the original model, or from one that was quantized for MLX"
TEMPLATE = "; put the model's original template in its place"


def setting(name: str, value: Any, wanted: str, shown: str | None = None) -> tuple[Spoil, str]:
    line = f"DIR/config.json: has {name} = {shown or ascii(value)}, which is {wanted}"
    return edit("config.json", lambda config: config.update({name: value})), line + AGAIN


# what stands for ~ are the words of a library
MALFORMED: dict[str, tuple[Spoil, str]] = {
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
    "cut weights": (spoil.cut, HEADER),
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
    "a link to nowhere": (spoil.dangle, "DIR/model.safetensors: is a link to nothing" + AGAIN),
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
        spoil.add_token("mlxtune", special=False),
        "DIR: has a tokenizer of 1025 tokens for 1024 embeddings" + MODELS,
    ),
    "an end token without an embedding": (
        lambda folder: (
            spoil.add_token("<|stop|>", special=True)(folder),
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
    "impossible setting": (
        set_json("config.json", hidden_size=0),
        "DIR/config.json: has hidden_size = 0, which is no whole number above 0" + AGAIN,
    ),
    "NaN": (
        set_tensor("model.norm.weight", mx.array([float("nan")] + [1.0] * 191)),
        "DIR: holds NaN or infinite values in model.norm.weight" + FINITE,
    ),
    "infinite": (
        set_tensor("model.norm.weight", mx.array([float("-inf")] + [1.0] * 191, mx.bfloat16)),
        "DIR: holds NaN or infinite values in model.norm.weight" + FINITE,
    ),
    # the config
    "a key twice": (
        write("config.json", b'{"model_type": "llama", "model_type": "qwen2"}'),
        "DIR/config.json: names 'model_type' twice" + AGAIN,
    ),
    "config not in UTF-8": (write("config.json", b'{"model_type": "\xff"}'), "DIR/config.json: is not UTF-8"),
    "config nested deeply": (write("config.json", b"[" * 100_000), "DIR/config.json: cannot be read: ~"),
    "config with a number of 5000 digits": (
        write("config.json", b'{"model_type": "llama", "hidden_size": ' + b"9" * 5000 + b"}"),
        "DIR/config.json: cannot be read: ~",
    ),
    "a module that is no architecture": (
        set_json("config.json", model_type="cache"),
        "DIR/config.json: has the unsupported architecture 'cache'; ~",
    ),
    "an architecture of a missing package": (
        set_json("config.json", model_type="olmo"),
        "DIR/config.json: has the architecture 'olmo', which needs a package that is not installed; "
        "choose another model",
    ),
    "layers in words": setting("num_hidden_layers", "three", "no number"),
    "half a layer": setting("num_hidden_layers", 2.5, "no whole number above 0"),
    "no layers": setting("num_hidden_layers", 0, "no whole number above 0"),
    "fewer than no layers": setting("num_hidden_layers", -3, "no whole number above 0"),
    "a billion layers": setting("num_hidden_layers", 10**9, "more than its 29 tensors"),
    "more layers than there are": (
        set_json("config.json", num_hidden_layers=4),
        "DIR: does not load: ~model.layers.3~" + AGAIN,
    ),
    "fewer layers than there are": (
        set_json("config.json", num_hidden_layers=2),
        "DIR: does not load: ~model.layers.2~" + AGAIN,
    ),
    "layers that are true": setting("num_hidden_layers", True, "no number"),
    "a hidden size of 64 bits": setting("hidden_size", 2**63, "too large"),
    "a hidden size that is not the tensors'": (
        set_json("config.json", hidden_size=96),
        "DIR: does not load: ~(1024, 96)~(1024, 192)~model.embed_tokens.weight" + AGAIN,
    ),
    "heads in a list": setting("num_attention_heads", [3], "no number"),
    "groups of heads that divide nothing": (
        set_json("config.json", num_key_value_heads=2),
        "DIR/config.json: has num_key_value_heads = 2, which is no divisor of num_attention_heads = 3" + AGAIN,
    ),
    "a negative vocabulary": setting("vocab_size", -1024, "no whole number above 0"),
    "a vocabulary that is not the tensors'": (
        set_json("config.json", vocab_size=2048),
        "DIR: does not load: ~2048~1024~" + AGAIN,
    ),
    "epsilon in words": setting("rms_norm_eps", "1e-5", "no number"),
    "epsilon is NaN": setting("rms_norm_eps", float("nan"), "no number", "nan"),
    "epsilon below 0": setting("rms_norm_eps", -1e-5, "no number from 0 to 1"),
    "epsilon is infinite": setting("rms_norm_eps", float("inf"), "no number from 0 to 1", "inf"),
    "theta is 0": setting("rope_theta", 0, "no number above 0"),
    "tied in words": setting("tie_word_embeddings", "yes", "neither true nor false"),
    "a bias in a list": setting("attention_bias", [], "neither true nor false"),
    "scaling in words": setting("rope_scaling", "linear", "no group of settings"),
    "scaling by 0": (
        set_json("config.json", rope_scaling={"type": "linear", "factor": 0}),
        "DIR/config.json: has rope_scaling.factor = 0, which is no number above 0" + AGAIN,
    ),
    "scaling of an unknown kind": (
        set_json("config.json", rope_scaling={"type": "magic", "factor": 2.0}),
        "DIR: does not load: ~ magic" + AGAIN,
    ),
    "an unknown precision": setting("torch_dtype", "float12", "no precision"),
    "an unknown precision in the new way": setting("dtype", 32, "no precision"),
    # the index
    "index is broken": (
        write("model.safetensors.index.json", b"{"),
        "DIR/model.safetensors.index.json:1: not valid JSON: ~",
    ),
    "index is a list": (
        write("model.safetensors.index.json", b"[]"),
        "DIR/model.safetensors.index.json: has no weight_map" + AGAIN,
    ),
    "index with an empty map": (index(), "DIR/model.safetensors.index.json: has no weight_map" + AGAIN),
    "index with a tensor twice": (
        write("model.safetensors.index.json", b'{"weight_map": {"a": "model.safetensors", "a": "b.safetensors"}}'),
        "DIR/model.safetensors.index.json: names 'a' twice" + AGAIN,
    ),
    "index to a pickle": (
        both(write("model.bin", b"\x80\x04."), index(a="model.bin")),
        "DIR/model.safetensors.index.json: names 'model.bin', which is no .safetensors file" + AGAIN,
    ),
    "index to another format": (
        both(write("model.gguf", b"GGUF"), index(a="model.gguf")),
        "DIR/model.safetensors.index.json: names 'model.gguf', which is no .safetensors file" + AGAIN,
    ),
    "index to the folder above": (
        index(a=".."),
        "DIR/model.safetensors.index.json: names '..', which is no .safetensors file" + AGAIN,
    ),
    "index to a subfolder": (
        index(a="sub/model.safetensors"),
        "DIR/model.safetensors.index.json: names 'sub/model.safetensors', which is no file of its folder",
    ),
    "index to a name with a zero byte": (
        index(a="model\0.safetensors"),
        "DIR/model.safetensors.index.json: names 'model\\x00.safetensors', which is no file of its folder",
    ),
    "index to a name that clears the terminal": (
        index(a="\x1b[2J.safetensors"),
        "DIR/model.safetensors.index.json: names '\\x1b[2J.safetensors', which is no .safetensors file" + AGAIN,
    ),
    "index to a name of half a character": (
        index(a="\ud800.safetensors"),
        "DIR/model.safetensors.index.json: names '\\ud800.safetensors', which is no .safetensors file" + AGAIN,
    ),
    "index to a name of 5000 letters": (
        index(a="m" * 5000 + ".safetensors"),
        "DIR: lacks the weights mmm~…, which its index names" + AGAIN,
    ),
    "index without a tensor": (
        whole_index(**{"model.norm.weight": None}),
        "DIR/model.safetensors: holds 'model.norm.weight', which its index does not name" + AGAIN,
    ),
    "index with a tensor too many": (
        whole_index(**{"model.more.weight": "model.safetensors"}),
        "DIR/model.safetensors: lacks 'model.more.weight', which the index places there" + AGAIN,
    ),
    "index with a tensor elsewhere": (
        both(
            whole_index(**{"model.norm.weight": "more.safetensors"}),
            lambda folder: shutil.copy(folder / "model.safetensors", folder / "more.safetensors"),
        ),
        "DIR/model.safetensors: holds 'model.norm.weight', which its index places in 'more.safetensors'" + AGAIN,
    ),
    # the files of weights
    "a folder for weights": (
        both(remove("model.safetensors"), lambda folder: (folder / "model.safetensors").mkdir()),
        "DIR: has no weights (model*.safetensors)" + AGAIN,
    ),
    "a pipe for weights": (
        both(remove("model.safetensors"), lambda folder: os.mkfifo(folder / "model.safetensors")),
        "DIR: has no weights (model*.safetensors)" + AGAIN,
    ),
    "a pipe for the index": (
        both(
            lambda folder: os.mkfifo(folder / "model.safetensors.index.json"),
            remove("model.safetensors"),
        ),
        "DIR: has no weights (model*.safetensors)" + AGAIN,
    ),
    "a pipe for the config": (
        both(remove("config.json"), lambda folder: os.mkfifo(folder / "config.json")),
        "DIR: has no config.json" + AGAIN,
    ),
    "one shard of three": (
        lambda folder: (folder / "model.safetensors").rename(folder / "model-00002-of-00003.safetensors"),
        "DIR: lacks the weights model-00001-of-00003.safetensors" + AGAIN,
    ),
    "a tensor in two files": (
        lambda folder: shutil.copy(folder / "model.safetensors", folder / "model-old.safetensors"),
        "DIR/model.safetensors: holds 'model.layers.2.input_layernorm.weight', as model-old.safetensors does" + AGAIN,
    ),
    "PyTorch's newer pickles": (
        lambda folder: (folder / "model.safetensors").rename(folder / "model.pt"),
        "DIR: has pickled weights only, which can run code when read; use a revision with .safetensors files",
    ),
    # their headers
    "a header that ends in the middle": (
        in_header(lambda header: header[NORM].update(data_offsets=[0])),
        HEADER.replace("~", f"the tensor '{NORM}' has the data_offsets [0]"),
    ),
    "a tensor behind the end": (
        in_header(lambda header: header.update(more={"dtype": "U8", "shape": [9], "data_offsets": [END, END + 9]})),
        HEADER.replace("~", "its tensors end at byte ~, the file at ~"),
    ),
    "a dtype of the future": (
        in_header(lambda header: header[NORM].update(dtype="F128")),
        HEADER.replace("~", f"the tensor '{NORM}' has the unknown dtype 'F128'"),
    ),
    "a shape that is not the bytes'": (
        in_header(lambda header: header[NORM].update(shape=[191])),
        HEADER.replace("~", f"the tensor '{NORM}' has 768 bytes, but 'F32' of shape [191]"),
    ),
    "a negative shape": (
        in_header(lambda header: header[NORM].update(shape=[-192])),
        HEADER.replace("~", "its header has the number '-192'"),
    ),
    # their tensors
    "double precision": (
        both(
            set_tensor(NORM, mx.zeros((384,))), in_header(lambda header: header[NORM].update(dtype="F64", shape=[192]))
        ),
        f"DIR: holds '{NORM}' in F64, which MLX does not read; save the model in bfloat16 or float32",
    ),
    "whole numbers for weights": (
        set_tensor("model.layers.1.mlp.up_proj.weight", mx.zeros((512, 192), mx.int8)),
        "DIR: holds whole numbers (int8) as weight of model.layers.1.mlp.up_proj" + ORIGINAL,
    ),
    "whole numbers for a norm": (
        set_tensor(NORM, mx.ones((192,), mx.int32)),
        "DIR: holds whole numbers (int32) as weight of model.norm" + ORIGINAL,
    ),
    "8-bit floats without a word": (
        both(
            set_tensor("model.layers.1.mlp.up_proj.weight", mx.zeros((512, 192), mx.uint8)),
            in_header(lambda header: header["model.layers.1.mlp.up_proj.weight"].update(dtype="F8_E4M3")),
        ),
        "DIR: holds 'model.layers.1.mlp.up_proj.weight' in F8_E4M3, of which its config says nothing" + ORIGINAL,
    ),
    "a tensor turned around": (
        set_tensor("model.layers.1.mlp.up_proj.weight", mx.zeros((192, 512))),
        "DIR: does not load: ~(512, 192)~(192, 512)~model.layers.1.mlp.up_proj.weight" + AGAIN,
    ),
    # the tokenizer
    "a token behind the embeddings": (
        edit("tokenizer.json", lambda value: value["model"]["vocab"].update({"e": 4096})),
        "DIR: has the token number 4096 for 1024 embeddings" + MODELS,
    ),
    "an end behind the embeddings": (
        set_json("config.json", eos_token_id=4096),
        "DIR: has the token number 4096 for 1024 embeddings" + MODELS,
    ),
    "a negative end": (
        set_json("config.json", eos_token_id=-1),
        "DIR: has the token number -1 for 1024 embeddings" + MODELS,
    ),
    "merges of unknown tokens": (
        edit("tokenizer.json", lambda value: value["model"].update(merges=["zz qq"])),
        TOKENIZER,
    ),
    "merges without their prefix": (
        edit("tokenizer.json", lambda value: value["model"].update(continuing_subword_prefix="llama")),
        "DIR/tokenizer.json: has a merge without its prefix 'llama'" + AGAIN,
    ),
    "a length in words": (
        set_json("tokenizer_config.json", model_max_length="long"),
        TOKENIZER,
    ),
    "architectures that are true": setting("architectures", True, "no list of names"),
    "a precision in a list": setting("torch_dtype", [[]], "no precision"),
    "a template of half a character": (set_json("tokenizer_config.json", chat_template="\ud800"), TOKENIZER),
    "a vocabulary in a list": (edit("tokenizer.json", lambda value: value["model"].update(vocab=["a"])), TOKENIZER),
    "a negative token": (
        edit("tokenizer.json", lambda value: value["model"]["vocab"].update({"e": -1})),
        TOKENIZER,
    ),
    "an empty tokenizer": (write("tokenizer.json", b""), TOKENIZER),
    "a tokenizer of nothing": (write("tokenizer.json", b"{}"), TOKENIZER),
    # the template
    "a template that ends in the middle": (
        set_json("tokenizer_config.json", chat_template="{% for message in messages %}"),
        "DIR: has a chat template that does not render: ~" + TEMPLATE,
    ),
    "a template with an unknown tag": (
        set_json("tokenizer_config.json", chat_template="{% explode %}"),
        "DIR: has a chat template that does not render: Encountered unknown tag 'explode'." + TEMPLATE,
    ),
    "a template that divides by 0": (
        set_json("tokenizer_config.json", chat_template="{{ 1 / 0 }}"),
        "DIR: has a chat template that does not render: division by zero" + TEMPLATE,
    ),
    "a template that never ends": (
        set_json("tokenizer_config.json", chat_template="{% for i in range(10 ** 12) %}a{% endfor %}"),
        "DIR: has a chat template that does not render: ~" + TEMPLATE,
    ),
    "a template that calls itself": (
        set_json("tokenizer_config.json", chat_template="{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"),
        "DIR: has a chat template that does not render: ~recursion~" + TEMPLATE,
    ),
    "a template that is a number": (
        set_json("tokenizer_config.json", chat_template=7),
        "DIR/tokenizer_config.json: has a chat_template that is no text" + TEMPLATE,
    ),
    "a template file that ends in the middle": (
        write("chat_template.jinja", b"{{ messages"),
        "DIR: has a chat template that does not render: ~" + TEMPLATE,
    ),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_folders_are_refused_in_a_line(
    name: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil.refused(tiny, *MALFORMED[name], tmp_path, capsys)
