"""Conversion: every format loads in plain mlx-lm with the same logits, and a failure leaves nothing behind."""

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlxtune import model
from mlxtune.convert import cast, convert
from mlxtune.errors import InputError, MlxtuneError, ModelError, OutputError, StorageError
from mlxtune.recipe import QuantizeRecipe
from mlxtune.rundir import size_of

# isort: split
import mlx_lm  # after mlxtune.model, which keeps its import from lowering the limit of open files

TOKENS = mx.array([[1, 323, 201, 67, 2, 201, 1, 324, 900, 17]])
FILES = ["config.json", "model.safetensors", "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json"]
PACKINGS = [
    *(QuantizeRecipe(bits=bits) for bits in (2, 3, 4, 5, 6, 8)),
    QuantizeRecipe(bits=4, group_size=32),
    QuantizeRecipe(bits=4, group_size=128),
    QuantizeRecipe(bits=4, group_size=32, mode="mxfp4"),
    QuantizeRecipe(bits=4, group_size=16, mode="nvfp4"),
    QuantizeRecipe(bits=8, group_size=32, mode="mxfp8"),
]


def logits(net: nn.Module) -> Any:
    return np.array(net(TOKENS).astype(mx.float32))


def config_of(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("packing", PACKINGS, ids=lambda each: f"{each.mode}-{each.bits}-{each.group_size}")
def test_every_format_loads_in_plain_mlx_lm(packing: QuantizeRecipe, tiny: Path, tmp_path: Path) -> None:
    done = convert(tiny, tmp_path / "out", quantize=packing)
    assert sorted(each.name for each in (tmp_path / "out").iterdir()) == FILES
    described = {"group_size": packing.group_size, "bits": packing.bits, "mode": packing.mode}
    written = {"quantization": described, "quantization_config": described}
    assert config_of(tmp_path / "out") == config_of(tiny) | written
    assert (done.path, done.parameters, done.dtype) == (tmp_path / "out", 1_377_600, "float32")
    assert done.bytes_before == size_of(tiny / "model.safetensors")
    assert done.bytes_after == size_of(tmp_path / "out" / "model.safetensors")
    header = done.bytes_after - done.bits_per_weight * done.parameters / 8
    assert 0 < header < 20_000
    assert done.quantized_layers + len(done.left_out) == 22

    # plain mlx-lm multiplies packed weights group by group in float32, mlxtune on a CPU expands the same weights and
    # calls BLAS: they differ by the order of float32 sums, some 1e-5 of logits around 10
    plain, _ = mlx_lm.load(str(tmp_path / "out"))
    np.testing.assert_allclose(logits(plain), logits(model.load(tmp_path / "out").net), atol=3e-4)
    # and the weights are those of the source but for the rounding: fewer bits, more error
    error = np.abs(logits(plain) - logits(model.load(tiny).net)).mean()
    assert 1e-3 < error < 8


def test_more_bits_less_error(tiny: Path, tmp_path: Path) -> None:
    exact, errors = logits(model.load(tiny).net), []
    for bits in (2, 3, 4, 5, 6, 8):
        convert(tiny, tmp_path / f"{bits}", quantize=QuantizeRecipe(bits=bits))
        errors.append(np.abs(logits(model.load(tmp_path / f"{bits}").net) - exact).mean())
    assert all(more > 1.3 * less for more, less in zip(errors, errors[1:], strict=False))


def test_groups_of_128_leave_layers_of_192_inputs_out(tiny: Path, tmp_path: Path) -> None:
    done = convert(tiny, tmp_path / "out", quantize=QuantizeRecipe(group_size=128))
    assert done.quantized_layers == 3
    names = {f"model.layers.{block}.self_attn.{name}_proj" for block in range(3) for name in "qkvo"}
    names |= {f"model.layers.{block}.mlp.{name}_proj" for block in range(3) for name in ("gate", "up")}
    assert done.left_out == dict.fromkeys({*names, "model.embed_tokens"}, "192 inputs are no multiple of 128")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("packing", [None, QuantizeRecipe(bits=8)], ids=["dense", "8-bit"])
def test_casting(dtype: str, packing: QuantizeRecipe | None, tiny: Path, tmp_path: Path) -> None:
    done = convert(tiny, tmp_path / "out", dtype=dtype, quantize=packing)
    assert done.dtype == config_of(tmp_path / "out")["torch_dtype"] == dtype
    stored = mx.load(str(tmp_path / "out" / "model.safetensors"))
    assert {str(each.dtype) for each in stored.values()} == {
        f"mlx.core.{dtype}", *(["mlx.core.uint32"] if packing else []),
    }  # fmt: skip
    if packing is None:
        assert done.bits_per_weight == (32 if dtype == "float32" else 16)
    plain, _ = mlx_lm.load(str(tmp_path / "out"))
    assert logits(plain).shape == (1, 10, 1024)
    # plain mlx-lm computes in the stored precision, mlxtune on a CPU in float32: the same values are compared in that
    plain.set_dtype(mx.float32)
    np.testing.assert_allclose(logits(plain), logits(model.load(tmp_path / "out").net), atol=3e-4)


def test_casting_replaces_the_newer_name_of_the_setting(tiny: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(tiny, tmp_path / "model"))
    config = config_of(source)
    del config["torch_dtype"]
    (source / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    assert convert(source, tmp_path / "copy").dtype == "float32"
    done = convert(source, tmp_path / "out", dtype="bfloat16")
    assert done.dtype == "bfloat16"
    assert "dtype" not in config_of(tmp_path / "out")


def test_casting_keeps_what_the_architecture_wants_kept() -> None:
    class Router(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias, self.count = mx.ones((2,)), mx.ones((2,)), mx.array([1, 2])

        @property
        def cast_predicate(self) -> Any:
            return lambda name: name != "bias"

    net = Router()
    cast(net, mx.bfloat16)
    assert (net.weight.dtype, net.bias.dtype, net.count.dtype) == (mx.bfloat16, mx.float32, mx.int32)


def test_a_plain_copy_keeps_every_weight(tiny: Path, tmp_path: Path) -> None:
    done = convert(tiny, tmp_path / "out")
    assert (done.quantized_layers, done.left_out, done.bits_per_weight) == (0, {}, 32)
    before = mx.load(str(tiny / "model.safetensors"))
    after = mx.load(str(tmp_path / "out" / "model.safetensors"))
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (tiny / "tokenizer.json").read_bytes()


def test_a_quantized_source_is_refused_but_can_be_copied(tiny: Path, tmp_path: Path) -> None:
    convert(tiny, tmp_path / "4bit", quantize=QuantizeRecipe())
    for changes in ({"quantize": QuantizeRecipe()}, {"dtype": "float16"}):
        with pytest.raises(ModelError) as caught:
            convert(tmp_path / "4bit", tmp_path / "out", **changes)
        assert str(caught.value) == f"{tmp_path / '4bit'}: is quantized already; start from the original model"
    assert [each.name for each in tmp_path.iterdir()] == ["4bit"]
    done = convert(tmp_path / "4bit", tmp_path / "out")
    assert config_of(tmp_path / "out") == config_of(tmp_path / "4bit")
    assert done.bits_per_weight == pytest.approx(5, abs=0.1)


def refusal(kind: type[MlxtuneError], *args: Any, **options: Any) -> str:
    with pytest.raises(kind) as caught:
        convert(*args, **options)
    assert type(caught.value) is kind
    return str(caught.value)


def test_old_output_is_never_written_over(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    line = refusal(OutputError, tiny, tmp_path / "out")
    assert line == f"{tmp_path / 'out'}: exists already; choose another --mlx-path or remove it"
    assert list((tmp_path / "out").iterdir()) == []


def test_the_output_lies_outside_the_source(tiny: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(tiny, tmp_path / "model"))
    line = refusal(InputError, source, source / "4bit")
    assert line == f"{source / '4bit'}: lies inside the model it is made from; choose a folder outside it"
    assert sorted(each.name for each in source.iterdir()) == sorted(each.name for each in tiny.iterdir())


def test_groups_that_fit_no_layer(stories: Path, tmp_path: Path) -> None:
    # 64 and 172 inputs
    line = refusal(ModelError, stories, tmp_path / "out", quantize=QuantizeRecipe(group_size=128))
    assert line == "group_size: no layer can be quantized in groups of 128; try 32, or leave it out"
    assert list(tmp_path.iterdir()) == []


def test_the_left_out_layers_of_stories_still_load(stories: Path, tmp_path: Path) -> None:
    done = convert(stories, tmp_path / "out", quantize=QuantizeRecipe())
    assert len(done.left_out) == 5 and set(done.left_out.values()) == {"172 inputs are no multiple of 64"}
    plain, _ = mlx_lm.load(str(tmp_path / "out"))
    tokens = mx.array([[1, 403, 407]])
    np.testing.assert_allclose(plain(tokens), model.load(tmp_path / "out").net(tokens), atol=3e-4)


def test_bad_weights_leave_nothing_behind(tiny: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(tiny, tmp_path / "model"))
    weights = mx.load(str(source / "model.safetensors"))
    weights["model.norm.weight"] = mx.full((192,), float("nan"))
    mx.save_safetensors(str(source / "model.safetensors"), weights)
    line = refusal(ModelError, source, tmp_path / "out", quantize=QuantizeRecipe())
    assert line.startswith(f"{source}: holds NaN or infinite values in model.norm.weight")
    assert [each.name for each in tmp_path.iterdir()] == ["model"]


def test_a_full_disk_leaves_nothing_behind(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(model.shutil, "copyfile", full)  # the last step of saving, when the weights are written
    line = refusal(StorageError, tiny, tmp_path / "out")
    assert line == f"{tmp_path / 'out'}: no space left on the disk; free some space and run again"
    assert list(tmp_path.iterdir()) == []
