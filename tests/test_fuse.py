"""Fusing: the fused model is base + adapter, in the base's own format, and what it would lose is measured first."""

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.optimizers import Adam
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import SwitchLinear
from mlx_lm.tuner.lora import LoRALinear, LoRASwitchLinear

from mlxtune import adapter, likelihood, model
from mlxtune.convert import convert
from mlxtune.data.batches import make_batch
from mlxtune.data.render import Sample
from mlxtune.errors import FuseError, InputError, MlxtuneError, ModelError, OutputError, RecipeError
from mlxtune.fuse import Fused, fuse, fuse_layers, kept_share, ways_out
from mlxtune.precision import QUANTIZED
from mlxtune.recipe import FuseRecipe, LoraRecipe, QuantizeRecipe

# isort: split
import mlx_lm  # after mlxtune.model, which keeps its import from lowering the limit of open files

FILES = [
    "config.json", "fuse.json", "model.safetensors", "model.safetensors.index.json", "tokenizer.json",
    "tokenizer_config.json",
]  # fmt: skip
TOKENS = mx.array([[1, 323, 201, 67, 2, 201, 1, 324, 900, 17]])
SAMPLES = [
    Sample(f"rows:{row}", [1, 323, 201, 60 + row, 2, 201, 1, 500 + row, 70 + row, 2], [False] * 7 + [True] * 3, 7, "b")
    for row in range(6)
]
# mode, bits, group size: of bases and of what they are packed in
MODES = [("affine", 8, 64), ("affine", 4, 32), ("affine", 3, 64), ("mxfp4", 4, 32), ("nvfp4", 4, 16), ("mxfp8", 8, 32)]


def logits(net: nn.Module) -> Any:
    return np.array(net(TOKENS).astype(mx.float32))


def learn(base: Path, folder: Path, lora: LoraRecipe, steps: int, learning_rate: float) -> Path:
    """A real adapter: `steps` updates on SAMPLES."""
    lm = model.load(base)
    keys = adapter.attach(lm, lora, seed=0)
    batch = make_batch(SAMPLES, list(range(len(SAMPLES))))
    tokens, wanted = mx.array(batch.tokens), mx.array(likelihood.wanted_at(batch.trained))
    optimizer = Adam(learning_rate)
    for _ in range(steps):
        _, gradient = nn.value_and_grad(lm.net, lambda: likelihood.row_nats(lm.net, tokens, wanted).mean())()
        optimizer.update(lm.net, gradient)
        mx.eval(lm.net.parameters())
    folder.mkdir()
    config = adapter.config(lm, lora, keys)
    del config["base_fingerprint"]  # so that it may go onto other copies of the base, as one from elsewhere may
    adapter.save(folder, adapter.trained(lm.net), config)
    return folder


def with_adapter(base: Path, folder: Path) -> model.LanguageModel:
    lm = model.load(base)
    adapter.load(lm, folder)
    return lm


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuse")


@pytest.fixture(scope="module")
def learned(tiny: Path, work: Path) -> Path:
    """An adapter that learned the samples, on every linear layer of the embedded model."""
    return learn(tiny, work / "learned", LoraRecipe(rank=4), steps=20, learning_rate=5e-3)


@pytest.fixture(scope="module")
def values(tiny: Path, work: Path) -> Path:
    """An adapter on the v_proj of the last two blocks only."""
    lora = LoraRecipe(rank=4, targets=["v_proj"], num_layers=2)
    return learn(tiny, work / "values", lora, steps=20, learning_rate=2e-2)


@pytest.fixture(scope="module")
def four_bit(tiny: Path, work: Path) -> Path:
    convert(tiny, work / "4bit", quantize=QuantizeRecipe(bits=4))
    return work / "4bit"


def refusal(kind: type[MlxtuneError], *args: Any) -> str:
    with pytest.raises(kind) as caught:
        fuse(*args)
    assert type(caught.value) is kind
    return str(caught.value)


def stored(folder: Path) -> dict[str, mx.array]:
    weights = mx.load(str(folder / "model.safetensors"))
    assert isinstance(weights, dict)
    return weights


def config_of(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text())


def test_a_dense_base_gives_base_plus_adapter(tiny: Path, learned: Path, tmp_path: Path) -> None:
    done = fuse(tiny, learned, tmp_path / "fused", FuseRecipe(), SAMPLES)
    assert sorted(each.name for each in (tmp_path / "fused").iterdir()) == FILES
    assert config_of(tmp_path / "fused") == config_of(tiny)
    tuned = logits(with_adapter(tiny, learned).net)
    assert np.abs(tuned - logits(model.load(tiny).net)).max() > 1
    # (W + scale·(A·B)ᵀ)x against Wx + scale·(xA)B: the order of float32 sums, some 1e-6 of logits around 10
    plain, _ = mlx_lm.load(str(tmp_path / "fused"))
    np.testing.assert_allclose(logits(plain), tuned, atol=2e-4)
    assert (done.layers, done.bits, done.rows) == (21, None, 6)
    assert done.base_loss is not None and done.adapter_loss is not None and done.adapter_loss < done.base_loss / 2
    assert done.base_loss == pytest.approx(likelihood.mean_nats(model.load(tiny).net, SAMPLES), rel=1e-6)
    assert done.adapter_loss == pytest.approx(likelihood.mean_nats(with_adapter(tiny, learned).net, SAMPLES), rel=1e-5)
    assert done.fused_loss == pytest.approx(done.adapter_loss, abs=1e-4)
    assert done.kept == pytest.approx(1, abs=1e-4)
    assert json.loads((tmp_path / "fused" / "fuse.json").read_text()) == {
        "path": str(tmp_path / "fused"), "layers": 21, "bits": None,
        "bytes": (tmp_path / "fused" / "model.safetensors").stat().st_size, "rows": 6, "base_loss": done.base_loss,
        "adapter_loss": done.adapter_loss, "fused_loss": done.fused_loss, "kept": done.kept,
    }  # fmt: skip


def test_inputs_stay_as_they_are(tiny: Path, values: Path, tmp_path: Path) -> None:
    base, tuned = (Path(shutil.copytree(each, tmp_path / each.name)) for each in (tiny, values))
    before = {file: file.read_bytes() for file in (*base.iterdir(), *tuned.iterdir())}
    fuse(base, tuned, tmp_path / "fused", FuseRecipe(), SAMPLES)
    assert {file: file.read_bytes() for file in (*base.iterdir(), *tuned.iterdir())} == before


def test_layers_without_an_adapter_keep_their_bytes(four_bit: Path, values: Path, tmp_path: Path) -> None:
    done = fuse(four_bit, values, tmp_path / "fused", FuseRecipe(keep=0), SAMPLES)
    assert (done.layers, done.bits) == (2, 4)
    assert config_of(tmp_path / "fused") == config_of(four_bit)
    before, after = stored(four_bit), stored(tmp_path / "fused")
    assert before.keys() == after.keys()
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    layers = [f"model.layers.{block}.self_attn.v_proj" for block in (1, 2)]
    assert changed == {f"{layer}.{part}" for layer in layers for part in ("weight", "scales", "biases")}
    plain, _ = mlx_lm.load(str(tmp_path / "fused"))
    np.testing.assert_allclose(logits(plain), logits(model.load(tmp_path / "fused").net), atol=3e-4)


def test_a_4_bit_base_is_measured(four_bit: Path, learned: Path, tmp_path: Path) -> None:
    done = fuse(four_bit, learned, tmp_path / "fused", FuseRecipe(keep=0), SAMPLES)
    fused = likelihood.mean_nats(model.load(tmp_path / "fused").net, SAMPLES)
    tuned = likelihood.mean_nats(with_adapter(four_bit, learned).net, SAMPLES)
    base = likelihood.mean_nats(model.load(four_bit).net, SAMPLES)
    assert done.kept == pytest.approx((base - fused) / (base - tuned), rel=1e-4)
    assert 0.5 < done.kept < 1.1 and abs(done.kept - 1) > 1e-4  # packing again has a price
    assert stored(tmp_path / "fused").keys() == stored(four_bit).keys()


def test_8_bits_on_a_4_bit_base_keep_more(four_bit: Path, values: Path, tmp_path: Path) -> None:
    done = fuse(four_bit, values, tmp_path / "fused", FuseRecipe(bits=8), SAMPLES)
    assert done.bits == 8 and done.kept is not None and done.kept > 0.97
    own = {"group_size": 64, "bits": 8, "mode": "affine"}
    layers = {f"model.layers.{block}.self_attn.v_proj": own for block in (1, 2)}
    described = {"group_size": 64, "bits": 4, "mode": "affine"} | layers
    assert config_of(tmp_path / "fused") == config_of(four_bit) | {
        "quantization": described, "quantization_config": described,
    }  # fmt: skip
    before, after = stored(four_bit), stored(tmp_path / "fused")
    assert {name for name in before if before[name].shape != after[name].shape} == {f"{name}.weight" for name in layers}
    tuned = logits(with_adapter(four_bit, values).net)
    plain, _ = mlx_lm.load(str(tmp_path / "fused"))
    np.testing.assert_allclose(logits(plain), logits(model.load(tmp_path / "fused").net), atol=3e-4)
    effect = np.abs(tuned - logits(model.load(four_bit).net)).mean()
    assert np.abs(logits(plain) - tuned).mean() < 0.1 * effect


def test_fusing_twice_describes_both(four_bit: Path, values: Path, learned: Path, tmp_path: Path) -> None:
    """A base with layers of 8 bits among layers of 4 keeps each layer's own."""
    fuse(four_bit, values, tmp_path / "once", FuseRecipe(bits=8))
    fuse(tmp_path / "once", learned, tmp_path / "twice", FuseRecipe())
    assert config_of(tmp_path / "twice") == config_of(tmp_path / "once")
    shapes = {name: each.shape for name, each in stored(tmp_path / "once").items()}
    assert {name: each.shape for name, each in stored(tmp_path / "twice").items()} == shapes
    plain, _ = mlx_lm.load(str(tmp_path / "twice"))
    np.testing.assert_allclose(logits(plain), logits(model.load(tmp_path / "twice").net), atol=3e-4)


def test_dequantized(four_bit: Path, learned: Path, tmp_path: Path) -> None:
    done = fuse(four_bit, learned, tmp_path / "fused", FuseRecipe(dequantize=True), SAMPLES)
    assert done.bits is None and done.kept == pytest.approx(1, abs=1e-3)
    expected = {key: value for key, value in config_of(four_bit).items() if not key.startswith("quantization")}
    assert config_of(tmp_path / "fused") == expected
    assert {str(each.dtype) for each in stored(tmp_path / "fused").values()} == {"mlx.core.float32"}
    plain, _ = mlx_lm.load(str(tmp_path / "fused"))
    np.testing.assert_allclose(logits(plain), logits(with_adapter(four_bit, learned).net), atol=3e-4)


def test_bits_on_a_dense_base_quantize_all_of_it(tiny: Path, learned: Path, tmp_path: Path) -> None:
    done = fuse(tiny, learned, tmp_path / "fused", FuseRecipe(bits=8), SAMPLES)
    assert done.bits == 8 and done.kept is not None and 0.97 < done.kept < 1.03
    assert config_of(tmp_path / "fused")["quantization"] == {"group_size": 64, "bits": 8, "mode": "affine"}
    # what fusing and then converting gives
    fuse(tiny, learned, tmp_path / "dense", FuseRecipe())
    convert(tmp_path / "dense", tmp_path / "8bit", quantize=QuantizeRecipe(bits=8))
    one, other = stored(tmp_path / "fused"), stored(tmp_path / "8bit")
    assert one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def test_too_little_kept_writes_nothing(tiny: Path, tmp_path: Path) -> None:
    """An update that is small beside a step of two bits drowns in the rounding."""
    convert(tiny, tmp_path / "2bit", quantize=QuantizeRecipe(bits=2))
    lora = LoraRecipe(rank=1, targets=["v_proj"], num_layers=1)
    small = learn(tmp_path / "2bit", tmp_path / "small", lora, steps=2, learning_rate=1e-3)
    with pytest.raises(FuseError) as caught:
        fuse(tmp_path / "2bit", small, tmp_path / "fused", FuseRecipe(), SAMPLES)
    assert caught.value.exit_code == 1
    assert sorted(each.name for each in tmp_path.iterdir()) == ["2bit", "small"]
    line = str(caught.value)
    assert line.startswith(f"{tmp_path / 'fused'}: fusing would keep ")
    assert "of what the adapter learned, less than 90% (loss of base " in line
    assert line.endswith("; nothing was written; use --q-bits 8 or --dequantize")
    # both ways out work
    for number, settings in enumerate((FuseRecipe(bits=8), FuseRecipe(dequantize=True))):
        done = fuse(tmp_path / "2bit", small, tmp_path / f"out{number}", settings, SAMPLES)
        assert done.kept is not None and done.kept >= 0.9


def test_without_rows_nothing_is_measured(four_bit: Path, learned: Path, tmp_path: Path) -> None:
    done = fuse(four_bit, learned, tmp_path / "fused", FuseRecipe(keep=1.0))
    assert done == Fused(
        path=str(tmp_path / "fused"), layers=21, bits=4, bytes=done.bytes, rows=0,
        base_loss=None, adapter_loss=None, fused_loss=None, kept=None,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("base", "tuned", "fused", "kept"),
    [
        (2.0, 1.0, 1.0, 1.0),
        (2.0, 1.0, 1.25, 0.75),
        (2.0, 1.0, 2.0, 0.0),
        (2.0, 1.0, 2.5, -0.5),
        (2.0, 1.0, 0.5, 1.5),
        (0.75, 0.25, 0.5, 0.5),
        (2.0, 2.0, 2.0, None),  # nothing was gained
        (2.0, 3.0, 2.5, None),
        (None, None, None, None),
    ],
)
def test_kept_share_by_hand(base: float | None, tuned: float | None, fused: float | None, kept: float | None) -> None:
    assert kept_share(base, tuned, fused) == kept


def test_ways_out() -> None:
    assert [ways_out(bits) for bits in (2, 6, 8, None)] == [
        "use --q-bits 8 or --dequantize", "use --q-bits 8 or --dequantize", "use --dequantize", "use --dequantize",
    ]  # fmt: skip


class Net(nn.Module):
    """Adapters on a linear layer with a bias, on one without and on three experts; one layer without an adapter."""

    def __init__(self, dtype: mx.Dtype, packing: dict[str, Any] | None):
        super().__init__()
        mx.random.seed(7)
        self.biased, self.plain = nn.Linear(128, 96), nn.Linear(128, 64, bias=False)
        self.experts, self.alone = SwitchLinear(128, 32, 3), nn.Linear(128, 32)
        self.set_dtype(dtype)
        if packing is not None:
            nn.quantize(self, **packing)
        for name, kind in (("biased", LoRALinear), ("plain", LoRALinear), ("experts", LoRASwitchLinear)):
            adapted = kind.from_base(self[name], r=2, scale=2.0)
            adapted.lora_b = mx.random.normal(adapted.lora_b.shape, scale=0.05)
            self[name] = adapted


NAMES = ("biased", "plain", "experts")


def dense64(layer: nn.Module) -> Any:
    """The values of a stored layer in float64, from mx.dequantize on its scales in float32."""
    if not isinstance(layer, QUANTIZED):
        return np.array(layer.weight.astype(mx.float32), dtype=np.float64)
    scales, biases = layer.scales, layer.biases
    if layer.mode == "affine":
        scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    values = mx.dequantize(
        layer.weight, scales, biases, layer.group_size, layer.bits, mode=layer.mode, dtype=mx.float32
    )
    return np.array(values, dtype=np.float64)


def exact(net: Net) -> dict[str, Any]:
    """W + scale·(A·B)ᵀ of every adapted layer in float64, written out expert by expert."""
    sums = {}
    for name in NAMES:
        layer = net[name]
        a, b = (np.array(each, dtype=np.float64) for each in (layer.lora_a, layer.lora_b))
        update = np.stack([b[e] @ a[e] for e in range(3)]) if name == "experts" else (a @ b).T
        sums[name] = dense64(layer.linear) + 2.0 * update
    return sums


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16], ids=str)
def test_dense_layers_are_summed_in_float32(dtype: mx.Dtype) -> None:
    net = Net(dtype, None)
    expected, bias = exact(net), net.biased.linear.bias
    assert fuse_layers(net, {"a": 1}, FuseRecipe()) == {"a": 1}
    for name in NAMES:
        assert net[name].weight.dtype == dtype
        precision = {mx.float32: 2**-22, mx.bfloat16: 2**-8, mx.float16: 2**-10}[dtype]
        np.testing.assert_allclose(dense64(net[name]), expected[name], rtol=precision, atol=1e-6)
    assert net.biased.bias is bias and "bias" not in net.plain


@pytest.mark.parametrize(("mode", "bits", "group_size"), MODES)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
def test_packed_layers_come_back_in_their_own_format(mode: str, bits: int, group_size: int, dtype: mx.Dtype) -> None:
    """The error is that of packing the exact sum once; eight bits feel that scales in bfloat16 have eight as well."""
    packing = {"group_size": group_size, "bits": bits, "mode": mode}
    net = Net(dtype, packing)
    expected, before = exact(net), dict(tree_flatten(net.parameters()))
    config = {"quantization": packing, "quantization_config": packing}
    assert fuse_layers(net, config, FuseRecipe()) == config
    after = dict(tree_flatten(net.parameters()))
    assert sorted(after) == sorted(name.replace(".linear.", ".") for name in before if "lora_" not in name)
    for name, each in after.items():
        stored_name = name.replace(".", ".linear.") if name.split(".")[0] in NAMES else name
        assert (each.dtype, each.shape) == (before[stored_name].dtype, before[stored_name].shape)
        if name.startswith("alone"):
            np.testing.assert_array_equal(each.astype(mx.float32), before[name].astype(mx.float32))
    for name in NAMES:
        once = mx.quantize(mx.array(expected[name].astype(np.float32)), group_size, bits, mode=mode)
        best = mx.dequantize(*once, **packing, dtype=mx.float32)
        error = np.sqrt(((dense64(net[name]) - expected[name]) ** 2).mean())
        least = np.sqrt(((np.array(best, np.float64) - expected[name]) ** 2).mean())
        assert least > 0
        assert error <= least * (1.5 if (dtype, mode, bits) == (mx.bfloat16, "affine", 8) else 1.01)


@pytest.mark.parametrize(("mode", "bits", "group_size"), MODES)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
def test_dequantized_layers_are_the_sum_rounded_once(mode: str, bits: int, group_size: int, dtype: mx.Dtype) -> None:
    net = Net(dtype, {"group_size": group_size, "bits": bits, "mode": mode})
    expected, alone = exact(net), dense64(net.alone)
    assert fuse_layers(net, {"quantization": {}, "quantization_config": {}}, FuseRecipe(dequantize=True)) == {}
    wanted = dtype if mode == "affine" else mx.bfloat16  # what formats without scales in floats compute in
    precision = 2**-22 if wanted == mx.float32 else 2**-8
    assert not any(isinstance(each, QUANTIZED) for each in net.modules())
    for name in NAMES:
        assert net[name].weight.dtype == wanted
        np.testing.assert_allclose(dense64(net[name]), expected[name], rtol=precision, atol=1e-6)
    assert net.alone.weight.dtype == wanted
    np.testing.assert_allclose(dense64(net.alone), alone, rtol=precision, atol=1e-7)
    assert net.biased.bias.dtype == dtype


@pytest.mark.parametrize(("mode", "bits", "group_size"), MODES)
def test_other_bits_are_affine(mode: str, bits: int, group_size: int) -> None:
    packing = {"group_size": group_size, "bits": bits, "mode": mode}
    net = Net(mx.bfloat16, packing)
    expected = exact(net)
    config = fuse_layers(net, {"quantization": packing}, FuseRecipe(bits=6))
    own = {"group_size": group_size if mode == "affine" else 64, "bits": 6, "mode": "affine"}
    assert config["quantization"] == config["quantization_config"] == packing | dict.fromkeys(NAMES, own)
    for name in NAMES:
        assert (net[name].bits, net[name].mode, net[name].scales.dtype) == (6, "affine", mx.bfloat16)
        error = np.abs(dense64(net[name]) - expected[name]).max() / np.abs(expected[name]).max()
        assert error < 2 * 2**-6
    assert (net.alone.bits, net.alone.mode) == (bits, mode)


def test_a_group_of_16_that_no_affine_format_has() -> None:
    net = nn.Sequential(LoRALinear.from_base(nn.Linear(48, 32).to_quantized(16, 4, "nvfp4"), r=2))
    packing = {"group_size": 16, "bits": 4, "mode": "nvfp4"}
    with pytest.raises(FuseError) as caught:
        fuse_layers(net, {"quantization": packing}, FuseRecipe(bits=8))
    assert str(caught.value) == "48 inputs of a layer divide by no group of 8-bit weights; use --dequantize"


def test_a_base_in_bfloat16_stays_in_it(tiny: Path, learned: Path, tmp_path: Path) -> None:
    convert(tiny, tmp_path / "half", dtype="bfloat16")
    done = fuse(tmp_path / "half", learned, tmp_path / "fused", FuseRecipe(), SAMPLES)
    assert {str(each.dtype) for each in stored(tmp_path / "fused").values()} == {"mlx.core.bfloat16"}
    assert done.kept is not None and 0.97 < done.kept < 1.03


def test_the_adapters_chat_template_goes_with_the_model(tiny: Path, values: Path, tmp_path: Path) -> None:
    tuned = Path(shutil.copytree(values, tmp_path / "tuned"))
    config = json.loads((tuned / "adapter_config.json").read_text())
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|endoftext|>{% endfor %}"
    (tuned / "adapter_config.json").write_text(json.dumps(config | {"chat_template": template}))
    fuse(tiny, tuned, tmp_path / "fused", FuseRecipe())
    _, tokenizer = mlx_lm.load(str(tmp_path / "fused"))
    assert tokenizer.chat_template == template
    assert tokenizer.eos_token_ids == {0, 2}  # the template ends a turn with another token than the base


def test_what_is_refused_leaves_nothing(tiny: Path, learned: Path, stories: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    out = tmp_path / "fused"
    line = refusal(OutputError, tiny, learned, tmp_path / "taken", FuseRecipe())
    assert line == f"{tmp_path / 'taken'}: exists already; choose another --save-path or remove it"
    line = refusal(InputError, tiny, learned, learned / "fused", FuseRecipe())
    assert line == f"{learned / 'fused'}: lies inside its own input; choose a folder outside it"
    line = refusal(RecipeError, tiny, learned, out, FuseRecipe(bits=7))
    assert line == "fuse.bits: no 7-bit format; use 2, 3, 4, 5, 6 or 8"
    line = refusal(ModelError, tiny, tmp_path / "taken", out, FuseRecipe())
    assert line == f"{tmp_path / 'taken'}: has no adapter_config.json; give the folder that `mlxtune train` wrote"
    line = refusal(ModelError, stories, learned, out, FuseRecipe(), SAMPLES)
    assert line.startswith(f"{learned}: does not fit {stories}: 56 tensors differ")
    assert [each.name for each in tmp_path.iterdir()] == ["taken"]
    assert not (learned / "fused").exists()


@pytest.mark.parametrize(
    "lora", [LoraRecipe(method="dora", rank=4), LoraRecipe(method="full"), LoraRecipe(rank=4, rslora=True)]
)
def test_every_method_fuses_to_what_it_learned(tiny: Path, tmp_path: Path, lora: LoraRecipe) -> None:
    learned = learn(tiny, tmp_path / "adapter", lora, steps=8, learning_rate=2e-3)
    expected = logits(with_adapter(tiny, learned).net)
    result = fuse(tiny, learned, tmp_path / "fused", FuseRecipe(), SAMPLES)
    assert result.kept == pytest.approx(1.0, abs=1e-3)
    np.testing.assert_allclose(logits(model.load(tmp_path / "fused").net), expected, atol=1e-4)


def test_dora_is_fused_by_its_formula(tiny: Path, tmp_path: Path) -> None:
    """m · (W + s·(AB)ᵀ) / ‖W + s·(AB)ᵀ‖, row by row, in float64."""
    learned = learn(tiny, tmp_path / "adapter", LoraRecipe(method="dora", rank=4), steps=4, learning_rate=5e-3)
    layer = with_adapter(tiny, learned).net.layers[2].self_attn.q_proj
    a, b, m = (np.array(each, dtype=np.float64) for each in (layer.lora_a, layer.lora_b, layer.m))
    weight = np.array(layer.linear.weight, dtype=np.float64) + layer.scale * (a @ b).T
    expected = (m / np.linalg.norm(weight, axis=1))[:, None] * weight
    fuse(tiny, learned, tmp_path / "fused", FuseRecipe())
    found = np.array(model.load(tmp_path / "fused", stored=True).net.layers[2].self_attn.q_proj.weight)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
