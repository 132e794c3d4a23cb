"""Weights read row by row: the values that mlx-lm loads, which of them lie in a file, and what is no number."""

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlxtune import borrow, model, sources
from mlxtune.errors import ModelError
from mlxtune.sources import is_finite
from tests import zoo

SPECIAL = [0.0, -0.0, 1.0, -1.0, 1e-8, -1e-8, float("inf"), -float("inf"), float("nan"), -float("nan")]


def write_zoo(name: str, folder: Path, tiny: Path, dtype: mx.Dtype = mx.float32, **changes: Any) -> dict[str, mx.array]:
    """A model folder of an architecture, with the embedded tokenizer; returns its weights as mlx-lm names them."""
    changes = {"vocab_size": 1024, **changes}
    net = zoo.build(name, **changes)
    net.set_dtype(dtype)
    weights = dict(tree_flatten(net.parameters()))
    config = {"model_type": name, **zoo.COMMON, **zoo.ARCHITECTURES[name], **changes}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tiny / file, folder / file)
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    return weights


def apart(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """A Mixtral's weights under their names at Hugging Face: each expert by itself."""
    made = {}
    for name, weight in weights.items():
        parts = name.split(".switch_mlp.")
        if len(parts) == 2:
            place = {"gate_proj.weight": "w1", "down_proj.weight": "w2", "up_proj.weight": "w3"}[parts[1]]
            made |= {f"{parts[0]}.experts.{expert}.{place}.weight": each for expert, each in enumerate(weight)}
        else:
            made[name] = weight
    return made


def read_all(weight: sources.Source, count: int) -> Any:
    parts = [np.array(read().astype(mx.float32)) for read in weight.rows(count)]
    return np.concatenate(parts) if parts else np.zeros((0,))


def values(weight: mx.array) -> Any:
    return np.array(weight.astype(mx.float32)).reshape(-1, weight.shape[-1] if weight.shape else 1)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "deepseek_v3", "qwen3_next", "mamba2", "gpt2", "lfm2"])
def test_the_values_of_mlx_lm(name: str, dtype: mx.Dtype, tiny: Path, tmp_path: Path) -> None:
    """Also where the architecture adds 1 to norms or turns convolutions around."""
    folder = tmp_path / "model"
    write_zoo(name, folder, tiny, dtype)
    plain, _ = borrow.load_model(folder)
    expected = dict(tree_flatten(plain.parameters()))
    net, _, weights = sources.opened(folder, model.check(folder))
    assert list(weights) == [key for key, _ in tree_flatten(net.parameters())]
    for key, weight in weights.items():
        assert (weight.dtype, weight.shape) == (expected[key].dtype, tuple(expected[key].shape))
        np.testing.assert_array_equal(read_all(weight, 7), values(expected[key]), err_msg=key)


def test_what_lies_in_the_file_is_read_from_there(tiny: Path, tmp_path: Path) -> None:
    _, _, weights = sources.opened(tiny, model.check(tiny))
    assert all(weight.place is not None for weight in weights.values())
    folder = tmp_path / "model"
    stacked = write_zoo("mixtral", folder, tiny)
    mx.save_safetensors(str(folder / "model.safetensors"), apart(stacked))
    _, _, weights = sources.opened(folder, model.check(folder))
    assert {key for key, weight in weights.items() if weight.place is None} == {
        key for key in stacked if "switch_mlp" in key
    }
    for key, weight in weights.items():
        np.testing.assert_array_equal(read_all(weight, 5), values(stacked[key]), err_msg=key)


def test_names_that_the_architecture_changes(tiny: Path, tmp_path: Path) -> None:
    """Two tensors of one shape that change their names: each is still read from its own place."""
    folder = tmp_path / "model"
    stacked = write_zoo("mixtral", folder, tiny)
    moved = {
        key.replace("model.", "language_model.model.", 1)
        if key.startswith("model.")
        else f"language_model.{key}": value
        for key, value in write_zoo("llama", tmp_path / "llama", tiny).items()
    }
    assert stacked
    config = json.loads((tmp_path / "llama" / "config.json").read_text())
    text = {"model_type": "mistral3", "text_config": config, "vocab_size": 1024}
    (folder / "config.json").write_text(json.dumps(text))
    mx.save_safetensors(str(folder / "model.safetensors"), moved)
    net, _, weights = sources.opened(folder, model.check(folder))
    for key, expected in tree_flatten(net.parameters()):
        assert weights[key].place is not None, key
        np.testing.assert_array_equal(read_all(weights[key], 11), values(expected), err_msg=key)


def test_a_file_that_shrinks_meanwhile(tiny: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny, tmp_path / "model"))
    _, _, weights = sources.opened(folder, model.check(folder))
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:10_000])
    with pytest.raises(ModelError) as caught:
        for weight in weights.values():
            read_all(weight, 1000)
    assert str(caught.value) == f"{file}: was cut while it was read; download the model again"


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
@pytest.mark.parametrize("value", SPECIAL)
def test_is_finite_as_numpy_says(dtype: mx.Dtype, value: float) -> None:
    for others in (1.0, -1.0):
        rows = mx.full((5, 6), others).astype(dtype)
        rows[3, 4] = value
        mx.eval(rows)
        assert is_finite(rows) == bool(np.isfinite(np.array(rows.astype(mx.float32))).all())


@pytest.mark.parametrize(("dtype", "bits"), [(mx.bfloat16, 16), (mx.float16, 16)])
def test_is_finite_of_every_half(dtype: mx.Dtype, bits: int) -> None:
    every = mx.arange(2**bits, dtype=mx.uint32).astype(mx.uint16)[:, None].view(dtype)
    mx.eval(every)
    expected = np.isfinite(np.array(every.astype(mx.float32)))
    assert [is_finite(every[number : number + 1]) for number in range(0, 2**bits, 37)] == expected[::37, 0].tolist()


def test_whole_numbers_are_finite() -> None:
    assert is_finite(mx.array([[2**31 - 1, -(2**31)]])) and is_finite(mx.zeros((0, 3)))
