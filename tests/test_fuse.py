"""Fusing: the fused model is base + adapter, in the base's own format, and what it would lose is measured first."""

import json
import os
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxtune import likelihood, model
from mlxtune.convert import convert
from mlxtune.errors import FuseError, InputError, MlxtuneError, ModelError, OutputError, RecipeError
from mlxtune.fuse import flags_out, fuse
from mlxtune.fusing.assembly import ways_out
from mlxtune.fusing.blend import Part
from mlxtune.recipe import FuseRecipe, LoraRecipe, QuantizeRecipe
from tests.learned import SAMPLES, learn, logits, with_adapter

# isort: split
import mlx_lm  # after mlxtune.model, which keeps its import from lowering the limit of open files

FILES = [
    "README.md", "config.json", "fuse.json", "model.safetensors", "model.safetensors.index.json", "tokenizer.json",
    "tokenizer_config.json",
]  # fmt: skip


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


@pytest.fixture(scope="module")
def drowned(tiny: Path, work: Path) -> Path:
    """A base `2bit` and an adapter `small`, whose update is small beside a step of two bits."""
    folder = work / "drowned"
    convert(tiny, folder / "2bit", quantize=QuantizeRecipe(bits=2))
    lora = LoraRecipe(rank=1, targets=["v_proj"], num_layers=1)
    learn(folder / "2bit", folder / "small", lora, steps=2, learning_rate=1e-3)
    return folder


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
    assert done.kl == pytest.approx(0, abs=1e-6) and done.same_top == 1
    assert done.adapters == {str(learned): 1.0} and done.bits_per_weight == 32 and done.raised == {}
    assert len(done.changes) == 21
    assert all(each.cosine == pytest.approx(1, abs=1e-6) and each.lost < 1e-6 for each in done.changes)
    written = json.loads((tmp_path / "fused" / "fuse.json").read_text())
    stated = json.loads(json.dumps(asdict(done)))
    assert stated.pop("path") == str(tmp_path / "fused")
    assert written == {**stated, "adapters": {os.path.relpath(learned, tmp_path / "fused"): 1.0}}
    assert str(tmp_path) not in json.dumps(written)  # the folder may be handed on
    assert written["bytes"] == (tmp_path / "fused" / "model.safetensors").stat().st_size


@pytest.mark.parametrize("name", ["model.norm", "model.layers.0.mlp.up_proj"])
def test_what_is_not_finite_is_refused(tiny: Path, values: Path, tmp_path: Path, name: str) -> None:
    """With rows, when the base is loaded; without, where it is written, a tensor at a time."""
    base = Path(shutil.copytree(tiny, tmp_path / "base"))
    weights = stored(base)
    weights[f"{name}.weight"] = mx.full(weights[f"{name}.weight"].shape, float("nan"))
    mx.save_safetensors(str(base / "model.safetensors"), weights)
    for samples in ((), SAMPLES):
        line = refusal(ModelError, base, values, tmp_path / "fused", FuseRecipe(), samples)
        assert line == f"{base}: holds NaN or infinite values in {name}.weight; download or train the model again"
    assert [each.name for each in tmp_path.iterdir()] == ["base"]


def test_inputs_stay_as_they_are(tiny: Path, values: Path, tmp_path: Path) -> None:
    base, tuned = (Path(shutil.copytree(each, tmp_path / each.name)) for each in (tiny, values))
    before = {file: file.read_bytes() for file in (*base.iterdir(), *tuned.iterdir())}
    fuse(base, tuned, tmp_path / "fused", FuseRecipe(), SAMPLES)
    assert {file: file.read_bytes() for file in (*base.iterdir(), *tuned.iterdir())} == before


def test_layers_without_an_adapter_keep_their_bytes(four_bit: Path, values: Path, tmp_path: Path) -> None:
    done = fuse(four_bit, values, tmp_path / "fused", FuseRecipe(keep=0, aim=0), SAMPLES)
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
    done = fuse(four_bit, learned, tmp_path / "fused", FuseRecipe(keep=0, aim=0), SAMPLES)
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
    # without rows to fit to, what fusing and then converting gives
    fuse(tiny, learned, tmp_path / "dense", FuseRecipe())
    convert(tmp_path / "dense", tmp_path / "8bit", quantize=QuantizeRecipe(bits=8, method="search"))
    one, other = stored(tmp_path / "fused"), stored(tmp_path / "8bit")
    assert one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def test_too_little_kept_writes_nothing(drowned: Path, tmp_path: Path) -> None:
    """An update that is small beside a step of two bits drowns in the rounding."""
    base, small = drowned / "2bit", drowned / "small"
    with pytest.raises(FuseError) as caught:
        fuse(base, small, tmp_path / "fused", FuseRecipe(max_bpw=1), SAMPLES)
    assert caught.value.exit_code == 1
    assert list(tmp_path.iterdir()) == []
    line = str(caught.value)
    assert line.startswith(f"{tmp_path / 'fused'}: fusing would keep ")
    assert "of what the adapter learned, less than 90% (loss of base " in line
    assert line.endswith("; nothing was written; use --q-bits 8 or --dequantize or --accept-loss")
    # both ways out work
    for number, settings in enumerate((FuseRecipe(bits=8), FuseRecipe(dequantize=True), FuseRecipe(max_bpw=9))):
        done = fuse(base, small, tmp_path / f"out{number}", settings, SAMPLES)
        assert done.kept is not None and done.kept >= 0.9
    accepted = fuse(base, small, tmp_path / "taken", FuseRecipe(max_bpw=1, accept_loss=True), SAMPLES)
    assert accepted.kept is not None and accepted.kept < 0.9


def test_without_rows_nothing_is_measured(four_bit: Path, learned: Path, tmp_path: Path) -> None:
    done = fuse(four_bit, learned, tmp_path / "fused", FuseRecipe(keep=1.0))
    assert (done.layers, done.bits, done.rows, done.calibrated) == (21, 4, 0, 0)
    measured = (done.base_loss, done.adapter_loss, done.fused_loss, done.kept, done.kl, done.same_top)
    assert measured == (None,) * 6
    assert len(done.changes) == 21


def test_rows_to_fit_to_keep_more(four_bit: Path, learned: Path, tmp_path: Path) -> None:
    """Packed for what goes into it, the fused model is nearer to base and adapter at the very same size."""
    settings = FuseRecipe(keep=0, aim=0)
    blind = fuse(four_bit, learned, tmp_path / "blind", settings, SAMPLES)
    fitted = fuse(four_bit, learned, tmp_path / "fitted", settings, SAMPLES, SAMPLES)
    assert (fitted.bytes, fitted.bits_per_weight) == (blind.bytes, blind.bits_per_weight)
    assert (blind.calibrated, fitted.calibrated) == (0, 6)
    assert fitted.kl is not None and blind.kl is not None and fitted.kl < 0.5 * blind.kl
    plain, _ = mlx_lm.load(str(tmp_path / "fitted"))
    np.testing.assert_allclose(logits(plain), logits(model.load(tmp_path / "fitted").net), atol=3e-4)


def test_a_dense_base_is_quantized_for_what_goes_into_it(tiny: Path, learned: Path, tmp_path: Path) -> None:
    """All of it, the tied head too: nearer to base and adapter than without rows, in as many bytes."""
    settings = FuseRecipe(bits=4, keep=0)
    blind = fuse(tiny, learned, tmp_path / "blind", settings, SAMPLES)
    fitted = fuse(tiny, learned, tmp_path / "fitted", settings, SAMPLES, SAMPLES)
    assert fitted.bytes == blind.bytes and config_of(tmp_path / "fitted") == config_of(tmp_path / "blind")
    assert fitted.kl is not None and blind.kl is not None and fitted.kl < 0.5 * blind.kl
    assert {each.bits for each in fitted.changes} == {4} and fitted.raised == {}
    plain, _ = mlx_lm.load(str(tmp_path / "fitted"))
    np.testing.assert_allclose(logits(plain), logits(model.load(tmp_path / "fitted").net), atol=3e-4)


def test_layers_that_lose_too_much_get_more_bits(drowned: Path, tmp_path: Path) -> None:
    """Until enough is kept, or as far as asked; what other layers are packed in stays, and mlx-lm reads it all."""
    base, small = drowned / "2bit", drowned / "small"
    plain = fuse(base, small, tmp_path / "plain", FuseRecipe(keep=0, aim=0), SAMPLES)
    limit = plain.bits_per_weight + 0.1
    done = fuse(base, small, tmp_path / "fused", FuseRecipe(keep=0, aim=1.0, max_bpw=limit), SAMPLES)
    assert plain.raised == {} and done.kl is not None and plain.kl is not None and done.kl < plain.kl
    assert done.raised and plain.bits_per_weight < done.bits_per_weight <= limit
    own = config_of(tmp_path / "fused")["quantization"]
    assert {name: each["bits"] for name, each in own.items() if isinstance(each, dict)} == done.raised
    assert {each.name: each.bits for each in done.changes if each.bits != 2} == done.raised
    loaded, _ = mlx_lm.load(str(tmp_path / "fused"))
    np.testing.assert_allclose(logits(loaded), logits(model.load(tmp_path / "fused").net), atol=3e-4)


def test_into_the_original_weights(tiny: Path, four_bit: Path, values: Path, learned: Path, tmp_path: Path) -> None:
    """What other layers are packed in stays, and dense the sum is that of the original and the adapter."""
    settings = FuseRecipe(keep=0, aim=0, original=True)
    fuse(four_bit, values, tmp_path / "packed", settings, original=tiny)
    before, after = stored(four_bit), stored(tmp_path / "packed")
    changed = {name.rsplit(".", 1)[0] for name in before if not np.array_equal(before[name], after[name])}
    assert changed == {f"model.layers.{block}.self_attn.v_proj" for block in (1, 2)}
    fuse(four_bit, learned, tmp_path / "dense", replace(settings, dequantize=True), original=tiny)
    np.testing.assert_allclose(
        logits(model.load(tmp_path / "dense").net), logits(with_adapter(tiny, learned).net), atol=3e-4
    )


def test_strength_and_several_adapters(tiny: Path, four_bit: Path, learned: Path, values: Path, tmp_path: Path) -> None:
    """The fused weights are base + scale · (w₁ΔW₁ + w₂ΔW₂), summed here from single fuses in float64."""
    settings = FuseRecipe(scale=0.5)
    done = fuse(tiny, [Part(learned, 0.8), Part(values, -0.6)], tmp_path / "both", settings)
    assert done.adapters == {str(learned): 0.4, str(values): -0.3}
    for name, part in (("one", learned), ("other", values)):
        fuse(tiny, part, tmp_path / name, FuseRecipe())
    base, one, other, both = (
        {name: np.array(each, dtype=np.float64) for name, each in stored(folder).items()}
        for folder in (tiny, tmp_path / "one", tmp_path / "other", tmp_path / "both")
    )
    for name, found in both.items():
        expected = base[name] + 0.4 * (one[name] - base[name]) - 0.3 * (other[name] - base[name])
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_ways_out(four_bit: Path, tiny: Path, learned: Path, tmp_path: Path) -> None:
    """What the table promises is what is written."""
    ways = {way.flag: way for way in ways_out(four_bit, [Part(learned)], FuseRecipe())}
    assert list(ways) == ["--base ORIGINAL", "--q-bits 5", "--q-bits 6", "--q-bits 8", "--dequantize"]
    for flag, settings in (("--q-bits 5", FuseRecipe(bits=5)), ("--dequantize", FuseRecipe(dequantize=True))):
        done = fuse(four_bit, learned, tmp_path / flag, settings)
        assert ways[flag].bits_per_weight == pytest.approx(done.bits_per_weight)
        assert ways[flag].bytes == pytest.approx(done.bytes, abs=20_000)  # headers
    assert ways_out(tiny, [Part(learned)], FuseRecipe()) == []
    assert [flags_out(bits) for bits in (2, 6, 8, None)] == [
        ["--q-bits 8", "--dequantize", "--accept-loss"], ["--q-bits 8", "--dequantize", "--accept-loss"],
        ["--dequantize", "--accept-loss"], ["--accept-loss"],
    ]  # fmt: skip


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
    line = refusal(InputError, tiny, learned, out, FuseRecipe(), (), (), stories)
    assert line == "--base: is of use for a quantized base only; leave it out"
    line = refusal(RecipeError, tiny, learned, out, FuseRecipe(original=True))
    assert line == "fuse.original: needs a base that was quantized, and the model that it was made of; leave it out"
    line = refusal(RecipeError, tiny, learned, out, FuseRecipe(bits=7))
    assert line == "fuse.bits: no 7-bit format; use 2, 3, 4, 5, 6 or 8"
    line = refusal(ModelError, tiny, tmp_path / "taken", out, FuseRecipe())
    assert line == f"{tmp_path / 'taken'}: has no adapter_config.json; give the folder that `mlxtune train` wrote"
    line = refusal(ModelError, stories, learned, out, FuseRecipe(), SAMPLES)
    assert line.startswith(f"{learned}: does not fit {stories}: 56 tensors differ")
    assert [each.name for each in tmp_path.iterdir()] == ["taken"]
    assert not (learned / "fused").exists()


def test_keys_that_match_nothing_are_refused(tiny: Path, values: Path, tmp_path: Path) -> None:
    tuned = Path(shutil.copytree(values, tmp_path / "tuned"))
    config = json.loads((tuned / "adapter_config.json").read_text())
    config["lora_parameters"]["keys"] = ["self_attn.w_proj"]
    (tuned / "adapter_config.json").write_text(json.dumps(config))
    line = refusal(ModelError, tiny, tuned, tmp_path / "fused", FuseRecipe())
    assert line == f"{tuned}: adapts no linear layer of {tiny}, or other layers as well"
    line = refusal(ModelError, tiny, [Part(values, 0.5), Part(tuned, 0.5)], tmp_path / "fused", FuseRecipe())
    assert line == f"{tuned}: adapts no linear layer of {tiny}, or other layers as well"
    assert [each.name for each in tmp_path.iterdir()] == ["tuned"]


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
