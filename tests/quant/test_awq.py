"""AWQ: what is written is what mlx-lm's own function makes, nothing is printed, and what it cannot do is refused."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlxtune import borrow, machine, model
from mlxtune.convert import convert
from mlxtune.data.render import Sample
from mlxtune.errors import InputError, MlxtuneError, ModelError
from mlxtune.metrics import divergence
from mlxtune.packs import check_source
from mlxtune.quant import awq
from mlxtune.quant.packing import Packing
from mlxtune.recipe import QuantizeRecipe
from tests import zoo
from tests.test_sources import write_zoo

# isort: split
import mlx_lm
from mlx_lm.quant.awq import AWQ_MODEL_CONFIGS, awq_quantize
from mlx_lm.utils import load_model

SPEC = QuantizeRecipe(bits=3, group_size=32, method="awq")
# of the sizes that its latent attention needs to be packed in groups of 32, without and with experts
DEEPSEEK = {
    "q_lora_rank": None, "kv_lora_rank": 32, "qk_rope_head_dim": 32, "qk_nope_head_dim": 32, "v_head_dim": 32,
}  # fmt: skip
TIED = {"tie_word_embeddings": True}
FLOAT, HALF = mx.float32, mx.bfloat16
CPU = machine.device_kind() == "cpu"
ZOO: list[tuple[str, dict[str, Any], mx.Dtype]] = [
    ("llama", {}, FLOAT),
    ("llama", {}, HALF),
    ("llama", TIED, FLOAT),
    ("llama", TIED, HALF),
    ("qwen2", {}, FLOAT),
    ("qwen3", {}, FLOAT),
    ("ministral3", {}, FLOAT),
    ("mistral3", {"text_config": {**zoo.COMMON, "model_type": "llama", "vocab_size": 1024}}, FLOAT),
    ("gemma3_text", {}, FLOAT),
    ("gemma3_text", {}, HALF),
    ("gemma3", {"text_config": {**zoo.COMMON, "model_type": "gemma3_text", "vocab_size": 1024}}, FLOAT),
    ("deepseek_v2", DEEPSEEK, FLOAT),
    ("deepseek_v2", DEEPSEEK | {"first_k_dense_replace": 2}, FLOAT),
]


def samples(count: int = 12, length: int = 20) -> list[Sample]:
    draws = np.random.default_rng(0)
    rows = [draws.integers(3, 1000, size=length).tolist() for _ in range(count)]
    return [Sample(f"rows:{number}", tokens, [True] * length, 0, None) for number, tokens in enumerate(rows)]


def by_mlx_lm(folder: Path, tokens: mx.array, dtype: mx.Dtype | None = None) -> dict[str, mx.array]:
    """The weights that mlx-lm's own function makes of the model in `folder`, cast to `dtype`.

    On a CPU it is given them in float32, and what it makes is written in the types that they had.
    """
    net, config = load_model(folder)
    if dtype is not None:
        net.set_dtype(dtype)
    types = {name: each.dtype for name, each in tree_flatten(net.parameters())}
    if CPU:
        net.set_dtype(FLOAT)
    known = AWQ_MODEL_CONFIGS[config["model_type"]]
    awq_quantize(net, tokens, known, group_size=32, bits=3, embed_group_size=32, embed_bits=3)
    made = dict(tree_flatten(net.parameters()))
    types |= {
        f"{name[:-7]}.{part}": each
        for name, each in types.items()
        for part in ("scales", "biases")
        if name[-7:] == ".weight"
    }
    return {name: each if each.dtype == mx.uint32 else each.astype(types[name]) for name, each in made.items()}


def stored(folder: Path) -> dict[str, mx.array]:
    return dict(mx.load(str(folder / "model.safetensors")))


def assert_the_same(found: dict[str, mx.array], expected: dict[str, mx.array]) -> None:
    assert found.keys() == expected.keys()
    for name, each in expected.items():
        assert found[name].dtype == each.dtype, name
        assert mx.array_equal(found[name], each).item(), name


@pytest.mark.parametrize(("name", "changes", "dtype"), ZOO)
def test_it_is_what_mlx_lm_makes(
    name: str, changes: dict[str, Any], dtype: mx.Dtype, tiny: Path, tmp_path: Path
) -> None:
    before = write_zoo(name, tmp_path / "model", tiny, dtype, **changes)
    done = convert(tmp_path / "model", tmp_path / "q", quantize=SPEC, samples=samples())
    expected = by_mlx_lm(tmp_path / "model", awq.windows(samples()))
    assert_the_same(stored(tmp_path / "q"), expected)
    assert {each.name for each in done.layers} == {key[:-7] for key in expected if key.endswith(".scales")}
    dense = [key for key in expected if key in before and f"{key[:-7]}.scales" not in expected]
    assert any(not mx.array_equal(before[key], expected[key]).item() for key in dense)  # norms are scaled
    plain, config = mlx_lm.load(str(tmp_path / "q"), return_config=True)[::2]
    assert config["quantization"] == {"group_size": 32, "bits": 3, "mode": "affine"}
    assert_the_same(dict(tree_flatten(plain.parameters())), expected)
    assert mx.all(mx.isfinite(plain(mx.array([[1, 40, 300, 7, 900]])))).item()


def test_the_embedded_model(tiny: Path, tmp_path: Path) -> None:
    done = convert(tiny, tmp_path / "q", quantize=SPEC, samples=samples())
    assert (done.method, done.quantized_layers, done.left_out) == ("awq", 22, {})
    assert_the_same(stored(tmp_path / "q"), by_mlx_lm(tiny, awq.windows(samples())))


def test_a_cast_comes_first(tiny: Path, tmp_path: Path) -> None:
    write_zoo("llama", tmp_path / "model", tiny)
    done = convert(tmp_path / "model", tmp_path / "q", quantize=SPEC, dtype="bfloat16", samples=samples(2))
    assert done.dtype == "bfloat16"
    expected = by_mlx_lm(tmp_path / "model", awq.windows(samples(2)), mx.bfloat16)
    assert_the_same(stored(tmp_path / "q"), expected)


def test_norms_that_are_more_precise_stay_so(tiny: Path, tmp_path: Path) -> None:
    weights = write_zoo("llama", tmp_path / "model", tiny, mx.bfloat16)
    weights = {name: each.astype(mx.float32) if "norm" in name else each for name, each in weights.items()}
    mx.save_safetensors(str(tmp_path / "model" / "model.safetensors"), weights)
    convert(tmp_path / "model", tmp_path / "q", quantize=SPEC, samples=samples())
    found = stored(tmp_path / "q")
    assert {each.dtype for name, each in found.items() if "norm" in name} == {mx.float32}
    assert {each.dtype for name, each in found.items() if "scales" in name} == {mx.bfloat16}
    expected = by_mlx_lm(tmp_path / "model", awq.windows(samples()))
    for name, each in found.items():
        assert mx.array_equal(each, expected[name].astype(each.dtype)).item(), name


def test_inputs_of_unlike_size_lose_less(tiny: Path, tmp_path: Path) -> None:
    """What it is for: where a few inputs are large, their weights count more than others."""
    weights = write_zoo("llama", tmp_path / "model", tiny)
    loud = mx.where(mx.arange(64) % 16 == 0, 30.0, 1.0)
    weights = {name: each * loud if "layernorm" in name else each for name, each in weights.items()}
    mx.save_safetensors(str(tmp_path / "model" / "model.safetensors"), weights)
    source, lost = model.load(tmp_path / "model").net, {}
    for method in ("rtn", "awq"):
        spec = QuantizeRecipe(bits=4, group_size=32, method=method)
        convert(tmp_path / "model", tmp_path / method, quantize=spec, samples=samples())
        lost[method] = divergence.measure(source, model.load(tmp_path / method).net, samples(4, 50)).kl_mean
    assert lost["awq"] < 0.9 * lost["rtn"]


def test_it_says_nothing(tiny: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    bar = borrow.awq.tqdm
    write_zoo("llama", tmp_path / "model", tiny)
    convert(tmp_path / "model", tmp_path / "q", quantize=SPEC, samples=samples(2))
    assert capfd.readouterr() == ("", "")
    assert borrow.awq.tqdm is bar  # mlx-lm speaks as before
    by_mlx_lm(tmp_path / "model", awq.windows(samples(2)))
    assert "Loss reduction" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([3, 1, 2], [[0, 1, 2], [3, 4, 5]]),  # rows go on in the next window
        ([4, 4], [[0, 1, 2], [3, 4, 5]]),  # what is left over falls
        ([2], [[0, 1]]),  # less than a window
        ([1] * 3, [[0, 1, 2]]),
    ],
)
def test_windows(lengths: Sequence[int], expected: list[list[int]]) -> None:
    tokens = iter(range(100))
    rows = [Sample("row", [next(tokens) for _ in range(n)], [True] * n, 0, None) for n in lengths]
    assert awq.windows(rows, 3).tolist() == expected


def test_of_many_windows_some_that_lie_evenly() -> None:
    rows = [Sample("row", list(range(1000)), [True] * 1000, 0, None)]
    found = awq.windows(rows, 10)
    assert found.shape == (awq.MOST_WINDOWS, 10)
    assert found[:3, 0].tolist() == [0, 60, 120] and found[-1, 0].item() == 930  # every 100 / 16th, rounded down


def refusal(kind: type[MlxtuneError], folder: Path, out: Path, spec: QuantizeRecipe = SPEC, **options: Any) -> str:
    options = {"samples": samples(), **options}
    with pytest.raises(kind) as caught:
        convert(folder, out, quantize=spec, **options)
    assert type(caught.value) is kind
    assert not out.exists()
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "changes", "spec", "line"),
    [
        (
            "olmo2",
            {},
            SPEC,
            "quantize.method: mlx-lm's awq does not know the architecture 'olmo2'; use gptq; awq knows deepseek_v2, "
            "gemma3, gemma3_text, llama, llava, ministral3, mistral, mistral3, qwen2, qwen3",
        ),
        (
            "deepseek_v2",
            DEEPSEEK | {"q_lora_rank": 32},
            SPEC,
            "quantize.method: mlx-lm's awq scales self_attn.q_proj, which this model's blocks do not have; use gptq",
        ),
        (
            "llama",
            {},
            QuantizeRecipe(method="awq"),
            "model.layers.0.mlp.down_proj: awq packs it, but 96 inputs are no multiple of 64; "
            "use gptq, or a group size that divides the inputs of all layers",
        ),
    ],
)
def test_a_model_that_it_cannot_pack(
    name: str,
    changes: dict[str, Any],
    spec: QuantizeRecipe,
    line: str,
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_zoo(name, tmp_path / "model", tiny, **changes)
    monkeypatch.setattr(model, "load", lambda *args, **options: pytest.fail("the weights were read"))
    assert refusal(ModelError, tmp_path / "model", tmp_path / "q", spec) == line
    with pytest.raises(ModelError) as caught:
        check_source(tmp_path / "model", spec)
    assert str(caught.value) == line


def test_what_it_cannot_do(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(model, "load", lambda *args, **options: pytest.fail("the weights were read"))
        line = refusal(InputError, tiny, tmp_path / "q", samples=())
        assert line == "quantize.method: awq needs rows that show what goes into the layers; give some, or use search"
        own = {"model.layers.1.mlp.up_proj": Packing(8, 32)}
        line = refusal(ModelError, tiny, tmp_path / "q", packings=own)
        assert line == "model.layers.1.mlp.up_proj: awq packs all layers alike, and this one has its own bits"
        patched.setenv("MLX_RANK", "0")
        line = refusal(InputError, tiny, tmp_path / "q")
        assert line == "quantize.method: awq works in one process; quantize before mlx.launch"
    line = refusal(InputError, tiny, tmp_path / "q", QuantizeRecipe(bits=4, group_size=32, mode="mxfp4", method="awq"))
    assert line == "quantize.method: awq packs the affine mode only, not mxfp4"
    line = refusal(InputError, tiny, tmp_path / "q", samples=samples(1, 1))
    assert line == "quantize.method: awq needs rows of at least 2 tokens; give more"


def test_values_that_overflow(tiny: Path, tmp_path: Path) -> None:
    weights = write_zoo("llama", tmp_path / "model", tiny, mx.float16)
    for name in ("up_proj", "gate_proj"):
        weights[f"model.layers.0.mlp.{name}.weight"] *= 6e4
    mx.save_safetensors(str(tmp_path / "model" / "model.safetensors"), weights)
    net, config = load_model(tmp_path / "model")
    with pytest.raises(ModelError) as caught:
        awq.quantize(net, config, samples(), Packing(3, 32))
    assert str(caught.value) == (
        "quantize.method: what this model computes is too large for the precision of its weights; "
        "cast them with --dtype bfloat16 or float32"
    )
    if CPU:  # in float32 they do not
        convert(tmp_path / "model", tmp_path / "q", quantize=SPEC, samples=samples())
        assert {each.dtype for each in stored(tmp_path / "q").values()} == {mx.uint32, mx.float16}
