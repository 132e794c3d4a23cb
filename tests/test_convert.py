"""Conversion: every format loads in plain mlx-lm with the same logits, and a failure leaves nothing behind.

What the architectures ask for is in `test_convert_architectures.py`.
"""

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlxtune import model, shards
from mlxtune.convert import Converted, convert, dequantize
from mlxtune.data.render import Sample
from mlxtune.errors import InputError, MlxtuneError, ModelError, OutputError, StorageError
from mlxtune.quant import calibrate, gptq, imatrix, search
from mlxtune.quant.packing import Packing
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


@pytest.mark.parametrize(("module", "operation"), [(shards.os, "pwrite"), (shards.shutil, "copyfile")])
def test_a_full_disk_leaves_nothing_behind(
    module: Any, operation: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While weights are written, and in the last step, when they are."""
    plain, calls = getattr(module, operation), []

    def full(*args: Any) -> Any:
        calls.append(args)
        if operation == "pwrite" and len(calls) < 10:
            return plain(*args)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, operation, full)
    line = refusal(StorageError, tiny, tmp_path / "out")
    assert line == f"{tmp_path / 'out'}: no space left on the disk; free some space and run again"
    assert list(tmp_path.iterdir()) == []


def test_an_interruption_leaves_nothing_behind(tiny: Path, tmp_path: Path) -> None:
    def press_ctrl_c(done: int, total: int) -> None:
        if done > total // 2:
            assert len(list(tmp_path.iterdir())) == 1  # the scratch folder
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(tiny, tmp_path / "out", quantize=QuantizeRecipe(), on_bytes=press_ctrl_c)
    assert list(tmp_path.iterdir()) == []


def test_how_far_it_is(tiny: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    done = convert(tiny, tmp_path / "out", on_bytes=lambda *each: seen.append(each))
    assert [each for each, _ in seen] == sorted(each for each, _ in seen)
    assert {total for _, total in seen} == {4 * done.parameters} and seen[-1][0] == 4 * done.parameters


def test_the_same_bytes_each_time(tiny: Path, tmp_path: Path) -> None:
    for name in "ab":
        convert(tiny, tmp_path / name, quantize=QuantizeRecipe(bits=3))
    for file in FILES:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_values_that_float16_cannot_hold(tiny: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(tiny, tmp_path / "model"))
    weights = mx.load(str(source / "model.safetensors"))
    weights["model.norm.weight"][3] = 70_000.0
    mx.save_safetensors(str(source / "model.safetensors"), weights)
    line = refusal(ModelError, source, tmp_path / "out", dtype="float16")
    assert line == (
        f"{source}: holds values in model.norm.weight that are too large for float16; choose bfloat16 or float32"
    )
    assert [each.name for each in tmp_path.iterdir()] == ["model"]
    convert(source, tmp_path / "out", dtype="bfloat16")


def test_the_table_of_layers(tiny: Path, tmp_path: Path) -> None:
    own = {"model.embed_tokens": Packing(8, 64), "model.layers.1.mlp.up_proj": Packing(3, 32)}
    done = convert(tiny, tmp_path / "out", quantize=QuantizeRecipe(bits=4), packings=own)
    shapes = {"embed_tokens": (1024, 192), "down_proj": (192, 512), "gate_proj": (512, 192), "up_proj": (512, 192)}
    for layer in done.layers:
        rows, inputs = shapes.get(layer.name.split(".")[-1], (192, 192))
        if layer.name.endswith((".k_proj", ".v_proj")):
            rows = 64
        packing = own.get(layer.name, Packing(4, 64))
        assert (layer.parameters, layer.packing, layer.left_out) == (rows * inputs, packing, None)
        assert layer.bits_per_weight == packing.bits + 2 * 32 / packing.group_size
    dense = done.parameters - sum(layer.parameters for layer in done.layers)
    total = sum(layer.parameters * layer.bits_per_weight for layer in done.layers) + 32 * dense
    assert done.bits_per_weight == pytest.approx(total / done.parameters, rel=1e-12)
    written = config_of(tmp_path / "out")["quantization"]
    assert written == {
        "group_size": 64, "bits": 4, "mode": "affine",
        "model.embed_tokens": {"group_size": 64, "bits": 8, "mode": "affine"},
        "model.layers.1.mlp.up_proj": {"group_size": 32, "bits": 3, "mode": "affine"},
    }  # fmt: skip
    plain, _ = mlx_lm.load(str(tmp_path / "out"))
    assert (plain.model.embed_tokens.bits, plain.layers[1].mlp.up_proj.group_size) == (8, 32)
    np.testing.assert_allclose(logits(plain), logits(model.load(tmp_path / "out").net), atol=3e-4)


@pytest.mark.parametrize(
    ("own", "line"),
    [
        ({"model.layers.7.mlp.up_proj": Packing(4, 64)}, "is no layer that can be quantized"),
        ({"model.norm": Packing(4, 64)}, "is no layer that can be quantized"),
        ({"model.layers.0.mlp.up_proj": Packing(4, 128)}, "cannot be quantized so: 192 inputs are no multiple of 128"),
    ],
)
def test_a_layer_that_cannot_be_packed_so(own: dict[str, Packing], line: str, tiny: Path, tmp_path: Path) -> None:
    found = refusal(ModelError, tiny, tmp_path / "out", quantize=QuantizeRecipe(), packings=own)
    assert found == f"{next(iter(own))}: {line}"
    assert list(tmp_path.iterdir()) == []


def decoded(folder: Path, layer: str, packing: QuantizeRecipe) -> Any:
    """The values (O, I) of an affine layer in float64, by hand: codes lie one behind the other from the lowest bit."""
    stored = mx.load(str(folder / "model.safetensors"))
    words = np.array(stored[f"{layer}.weight"]).view(np.uint8)
    bits = np.unpackbits(words, axis=-1, bitorder="little").reshape(len(words), -1, packing.bits)
    codes = (bits.astype(np.float64) * 2.0 ** np.arange(packing.bits)).sum(axis=-1)
    scales, biases = (
        np.repeat(np.array(stored[f"{layer}.{part}"].astype(mx.float32), dtype=np.float64), packing.group_size, axis=-1)
        for part in ("scales", "biases")
    )
    return codes * scales + biases


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("packing", PACKINGS[:8], ids=lambda each: f"{each.bits}-{each.group_size}")
def test_dense_again(packing: QuantizeRecipe, dtype: str | None, tiny: Path, tmp_path: Path) -> None:
    convert(tiny, tmp_path / "q", quantize=packing)
    done = dequantize(tmp_path / "q", tmp_path / "out", dtype=dtype)
    assert sorted(each.name for each in (tmp_path / "out").iterdir()) == FILES
    assert config_of(tmp_path / "out") == config_of(tiny) | ({"torch_dtype": dtype} if dtype else {})
    assert (done.parameters, done.bits_per_weight, done.layers) == (1_377_600, 16 if dtype else 32, ())
    stored = mx.load(str(tmp_path / "out" / "model.safetensors"))
    assert stored.keys() == mx.load(str(tiny / "model.safetensors")).keys()
    for name in ("model.embed_tokens", "model.layers.2.mlp.down_proj"):
        if f"{name}.scales" not in mx.load(str(tmp_path / "q" / "model.safetensors")):
            continue  # groups of 128
        made = np.array(stored[f"{name}.weight"].astype(mx.float32))
        # float32's rounding of a product and a sum; bfloat16 has 8 bits
        np.testing.assert_allclose(made, decoded(tmp_path / "q", name, packing), rtol=2**-8 if dtype else 0, atol=1e-6)
    if dtype is None:
        packed, _ = mlx_lm.load(str(tmp_path / "q"))
        plain, _ = mlx_lm.load(str(tmp_path / "out"))
        np.testing.assert_allclose(logits(plain), logits(packed), atol=3e-4)


@pytest.mark.parametrize("packing", PACKINGS[8:], ids=lambda each: each.mode)
def test_dense_again_from_small_floats(packing: QuantizeRecipe, tiny: Path, tmp_path: Path) -> None:
    """Scales of 8 bits say nothing of the precision: bfloat16, unless another is asked for."""
    convert(tiny, tmp_path / "q", quantize=packing)
    packed, _ = mlx_lm.load(str(tmp_path / "q"))
    dequantize(tmp_path / "q", tmp_path / "exact", dtype="float32")
    plain, _ = mlx_lm.load(str(tmp_path / "exact"))
    np.testing.assert_allclose(logits(plain), logits(packed), atol=3e-4)
    dequantize(tmp_path / "q", tmp_path / "out")
    stored = mx.load(str(tmp_path / "out" / "model.safetensors"))
    assert stored["model.embed_tokens.weight"].dtype == mx.bfloat16
    assert stored["model.norm.weight"].dtype == mx.float32
    exact = mx.load(str(tmp_path / "exact" / "model.safetensors"))
    assert all(mx.array_equal(stored[name], each.astype(stored[name].dtype)) for name, each in exact.items())


def test_only_a_quantized_model_is_dequantized(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError) as caught:
        dequantize(tiny, tmp_path / "out")
    assert str(caught.value) == f"{tiny}: is not quantized; `mlxtune convert` copies and casts it"
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError):
        dequantize(tiny, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def samples() -> list[Sample]:
    draws = np.random.default_rng(0)
    rows = [draws.integers(3, 1000, size=20).tolist() for _ in range(12)]
    return [Sample(f"rows:{number}", tokens, [True] * 20, 0, None) for number, tokens in enumerate(rows)]


@pytest.mark.parametrize("method", ["imatrix", "gptq"])
def test_methods_that_look_at_the_inputs(method: str, tiny: Path, tmp_path: Path) -> None:
    """The weights are what the method makes of the whole matrix and the inputs that it has."""
    done = convert(tiny, tmp_path / "out", quantize=QuantizeRecipe(bits=3, method=method), samples=samples())
    assert done.quantized_layers == 22
    name = "model.layers.1.mlp.down_proj"
    parts = list(calibrate.gathered(lambda: model.load(tiny).net, samples(), [name], hessian=method == "gptq"))
    inputs = parts[-1][name]
    assert inputs is not None
    weight = mx.load(str(tiny / "model.safetensors"))[f"{name}.weight"]
    expected = {"imatrix": imatrix.pack, "gptq": gptq.pack}[method](weight, Packing(3, 64), inputs)
    stored = mx.load(str(tmp_path / "out" / "model.safetensors"))
    same = mx.mean(stored[f"{name}.weight"] == expected.weight).item()
    assert same > 0.99  # the same but for ties, as what was gathered differs in its last bits
    plain = search.pack(weight, Packing(3, 64))
    assert mx.mean(stored[f"{name}.weight"] == plain.weight).item() < 0.9


def test_such_a_method_needs_rows(tiny: Path, tmp_path: Path) -> None:
    line = refusal(InputError, tiny, tmp_path / "out", quantize=QuantizeRecipe(method="gptq"))
    assert line == "quantize.method: gptq needs rows that show what goes into the layers; give some, or use search"
    assert list(tmp_path.iterdir()) == []


def done_by(method: str, tiny: Path, out: Path) -> Converted:
    return convert(tiny, out, quantize=QuantizeRecipe(method=method))


def test_the_searched_weights_are_closer(tiny: Path, tmp_path: Path) -> None:
    """As `quant/search.py` packs a whole matrix, though it is given some rows at a time."""
    assert (
        done_by("rtn", tiny, tmp_path / "rtn").bits_per_weight
        == done_by("search", tiny, tmp_path / "s").bits_per_weight
    )
    before = mx.load(str(tiny / "model.safetensors"))
    stored = mx.load(str(tmp_path / "s" / "model.safetensors"))
    for name in ("model.embed_tokens", "model.layers.0.self_attn.q_proj"):
        expected = search.pack(before[f"{name}.weight"], Packing(4, 64))
        assert mx.array_equal(stored[f"{name}.weight"], expected.weight).item()
        error = [
            np.square(decoded(tmp_path / folder, name, QuantizeRecipe()) - np.array(before[f"{name}.weight"])).sum()
            for folder in ("s", "rtn")
        ]
        assert error[0] < 0.97 * error[1]
