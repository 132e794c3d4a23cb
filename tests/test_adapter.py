"""Adapters: attached without effect, chosen by name, saved and loaded here and in plain mlx-lm; wrong ones refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import SwitchLinear
from mlx_lm.tuner.lora import LoRALinear, LoRASwitchLinear

from mlxtune import adapter, model
from mlxtune.errors import InputError, MlxtuneError, ModelError, RecipeError
from mlxtune.model import LanguageModel
from mlxtune.recipe import LoraRecipe

# isort: split
import mlx_lm  # after mlxtune.model, which keeps its import from lowering the limit of open files

TOKENS = mx.array([[1, 323, 201, 67, 2, 201, 1, 324]])
ATTENTION = [f"self_attn.{name}_proj" for name in "koqv"]
MLP = [f"mlp.{name}_proj" for name in ("down", "gate", "up")]


def logits(net: nn.Module) -> Any:
    return np.array(net(TOKENS))


def trained(lm: LanguageModel, folder: Path, lora: LoraRecipe, base: Path) -> dict[str, mx.array]:
    """Attaches an adapter with an effect and saves it as `folder`."""
    keys = adapter.attach(lm, lora, seed=0)
    tensors = {
        name: mx.random.normal(each.shape, scale=0.1, key=mx.random.key(number))
        for number, (name, each) in enumerate(adapter.trained(lm.net).items())
    }
    lm.net.load_weights(list(tensors.items()), strict=False)
    lm.net.eval()
    folder.mkdir()
    adapter.save(folder, tensors, adapter.config(lm, lora, keys))
    return tensors


@pytest.fixture(scope="module")
def saved(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of rank 4 on every linear layer of the embedded model."""
    folder = tmp_path_factory.mktemp("adapters") / "adapter"
    trained(model.load(tiny), folder, LoraRecipe(rank=4, scale=3.0, dropout=0.1), tiny)
    return folder


def test_an_attached_adapter_changes_nothing_yet(tiny: Path) -> None:
    lm = model.load(tiny)
    before = logits(lm.net)
    assert adapter.attach(lm, LoraRecipe(), seed=0) == sorted(ATTENTION + MLP)
    np.testing.assert_array_equal(logits(lm.net), before)
    names = [name for name, _ in tree_flatten(lm.net.trainable_parameters())]
    assert sorted(names) == sorted(adapter.trained(lm.net))
    assert len(names) == 3 * 7 * 2 and all(name.endswith(("lora_a", "lora_b")) for name in names)


def test_a_is_uniform_by_the_seed_and_b_zero(tiny: Path) -> None:
    made = []
    for seed in (0, 0, 1, 2**63 - 1):
        lm = model.load(tiny)
        mx.random.normal((3,))  # what was drawn before does not matter
        adapter.attach(lm, LoraRecipe(rank=8), seed=seed)
        made.append({name: np.array(each) for name, each in adapter.trained(lm.net).items()})
    a, b = "model.layers.0.mlp.down_proj.lora_a", "model.layers.0.mlp.down_proj.lora_b"
    assert made[0][a].shape == (512, 8) and made[0][b].shape == (8, 192)
    assert 0.99 / np.sqrt(512) < np.abs(made[0][a]).max() <= 1 / np.sqrt(512)
    assert not any(made[0][name].any() for name in made[0] if name.endswith("lora_b"))
    assert all(np.array_equal(made[0][name], made[1][name]) for name in made[0])
    assert not np.array_equal(made[0][a], made[2][a]) and not np.array_equal(made[0][a], made[3][a])


@pytest.mark.parametrize(
    ("targets", "layers"),
    [
        (["all-linear"], sorted(ATTENTION + MLP)),
        (["attention"], ATTENTION),
        (["mlp"], MLP),
        (["q_proj", "v_proj"], ["self_attn.q_proj", "self_attn.v_proj"]),
        (["mlp.up_proj"], ["mlp.up_proj"]),
        (["attention", "down_proj", "q_proj"], ["mlp.down_proj", *ATTENTION]),
    ],
)
def test_targets(tiny: Path, targets: list[str], layers: list[str]) -> None:
    lm = model.load(tiny)
    assert adapter.attach(lm, LoraRecipe(targets=targets), seed=0) == layers
    expected = {f"model.layers.{block}.{name}" for block in range(3) for name in layers}
    assert {name for name, _ in adapter.adapted_layers(lm.net)} == expected


def test_a_target_that_matches_nothing_is_refused_with_the_choices(tiny: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        adapter.attach(model.load(tiny), LoraRecipe(targets=["q_proj", "qproj"]), seed=0)
    assert str(caught.value) == (
        "lora.targets: 'qproj' matches no layer; choose from all-linear, attention, mlp, "
        "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    )


def test_the_last_blocks_only(tiny: Path) -> None:
    lm = model.load(tiny)
    adapter.attach(lm, LoraRecipe(num_layers=2, targets=["q_proj"]), seed=0)
    names = [name for name, _ in adapter.adapted_layers(lm.net)]
    assert sorted(names) == ["model.layers.1.self_attn.q_proj", "model.layers.2.self_attn.q_proj"]


def test_more_blocks_than_there_are(tiny: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        adapter.attach(model.load(tiny), LoraRecipe(num_layers=4), seed=0)
    assert str(caught.value) == "lora.num_layers: is 4, but the model has 3 blocks; -1 means all"


def test_the_config_is_mlx_lms(saved: Path, tiny: Path) -> None:
    assert sorted(each.name for each in saved.iterdir()) == ["adapter_config.json", "adapters.safetensors"]
    assert json.loads((saved / "adapter_config.json").read_text()) == {
        "fine_tune_type": "lora",
        "num_layers": 3,
        "lora_parameters": {"rank": 4, "scale": 3.0, "dropout": 0.1, "keys": sorted(ATTENTION + MLP)},
        "model": str(tiny),
        "base_fingerprint": model.fingerprint(tiny),
    }
    assert adapter.check(saved)["num_layers"] == 3


@pytest.mark.parametrize(
    "lora",
    [
        LoraRecipe(rank=4, scale=3.0, dropout=0.1),
        LoraRecipe(rank=1, scale=5.0, targets=["v_proj"], num_layers=1),
        LoraRecipe(rank=8, targets=["mlp", "q_proj"], num_layers=2),
    ],
)
def test_round_trip_here_and_in_plain_mlx_lm(tiny: Path, tmp_path: Path, lora: LoraRecipe) -> None:
    lm = model.load(tiny)
    base = logits(lm.net)
    tensors = trained(lm, tmp_path / "adapter", lora, tiny)
    tuned = logits(lm.net)
    assert np.abs(tuned - base).max() > 0.01

    again = model.load(tiny)
    adapter.load(again, tmp_path / "adapter")
    np.testing.assert_array_equal(logits(again.net), tuned)
    loaded = dict(tree_flatten(again.net.parameters()))
    assert all(np.array_equal(loaded[name], each) for name, each in tensors.items())

    plain, _ = mlx_lm.load(str(tiny), adapter_path=str(tmp_path / "adapter"))
    np.testing.assert_allclose(logits(plain), tuned, atol=5e-5)


def test_a_loaded_adapter_does_not_drop_out(saved: Path, tiny: Path) -> None:
    lm = model.load(tiny)
    adapter.load(lm, saved)
    np.testing.assert_array_equal(logits(lm.net), logits(lm.net))
    assert not any(each.training for each in lm.net.modules())


def test_an_adapter_of_mlx_lms_own_trainer(saved: Path, tiny: Path, tmp_path: Path) -> None:
    """mlx-lm writes all its arguments, -1 for all blocks, and may leave the keys, the kind and the dropout out."""
    folder = copy(saved, tmp_path)
    config = json.loads((folder / "adapter_config.json").read_text())
    del config["fine_tune_type"], config["lora_parameters"]["keys"], config["lora_parameters"]["dropout"]
    change(folder, **config | {"num_layers": -1, "iters": 1000, "adapter_path": "adapters"})
    lm, expected = model.load(tiny), model.load(tiny)
    adapter.load(lm, folder)
    adapter.load(expected, saved)
    np.testing.assert_array_equal(logits(lm.net), logits(expected.net))


@pytest.mark.parametrize("experts", [None, 3])
def test_update_is_what_the_adapter_adds(experts: int | None) -> None:
    """W + update gives the same as layer and adapter, for plain layers and for mixtures of experts."""
    mx.random.seed(0)
    x = mx.random.normal((5, 1, 1, 8))
    layer = nn.Linear(8, 6) if experts is None else SwitchLinear(8, 6, experts)
    adapted = (LoRALinear if experts is None else LoRASwitchLinear).from_base(layer, r=2, scale=1.5)
    adapted.lora_a = mx.random.normal(adapted.lora_a.shape)
    adapted.lora_b = mx.random.normal(adapted.lora_b.shape)
    which = () if experts is None else (mx.array([[0], [1], [2], [1], [0]]),)
    expected = adapted(x, *which)
    update = adapter.update(adapted)
    assert update.shape == layer.weight.shape and update.dtype == mx.float32
    layer.weight = layer.weight + update
    np.testing.assert_allclose(layer(x, *which), expected, atol=1e-5)


def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def change(folder: Path, **values: Any) -> None:
    (folder / "adapter_config.json").write_text(json.dumps(values))


def refusal(lm: LanguageModel, folder: Path) -> str:
    with pytest.raises(MlxtuneError) as caught:
        adapter.load(lm, folder)
    assert isinstance(caught.value, InputError)
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(str(folder), "DIR").replace(str(lm.path), "BASE")


def set_parameter(name: str, value: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        config = json.loads((folder / "adapter_config.json").read_text())
        config["lora_parameters"][name] = value
        change(folder, **config)

    return spoil


def set_config(name: str, value: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        config = json.loads((folder / "adapter_config.json").read_text())
        change(folder, **config | {name: value})

    return spoil


def set_tensors(spoilt: Callable[[dict[str, mx.array]], dict[str, mx.array]]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        tensors = spoilt(adapter.read_tensors(folder / "adapters.safetensors"))
        mx.save_safetensors(str(folder / "adapters.safetensors"), tensors)

    return spoil


def cut(folder: Path) -> None:
    file = folder / "adapters.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def with_nan(tensors: dict[str, mx.array]) -> dict[str, mx.array]:
    name = "model.layers.1.mlp.up_proj.lora_b"
    value = tensors[name]
    return tensors | {name: mx.where(mx.arange(value.size).reshape(value.shape) == 7, float("nan"), value)}


FIRST = "model.layers.0.mlp.down_proj.lora_a"
WRONG_TYPE = "DIR/adapter_config.json: has a rank, scale, num_layers, keys or chat_template of the wrong type"


@pytest.mark.parametrize(
    ("spoil", "line"),
    [
        (shutil.rmtree, "DIR: is not an adapter folder; give the folder with adapters.safetensors"),
        (
            lambda folder: (folder / "adapter_config.json").unlink(),
            "DIR: has no adapter_config.json; give the folder that `mlxtune train` wrote",
        ),
        (
            lambda folder: (folder / "adapters.safetensors").unlink(),
            "DIR: has no adapters.safetensors; give the folder that `mlxtune train` wrote",
        ),
        (
            lambda folder: (folder / "adapter_config.json").write_text("{\n"),
            "DIR/adapter_config.json:2: not valid JSON: Expecting property name enclosed in double quotes",
        ),
        (
            lambda folder: (folder / "adapter_config.json").write_text("[]"),
            "DIR/adapter_config.json: is an adapter of the kind None; supported are lora, dora, full",
        ),
        (
            set_config("fine_tune_type", "ia3"),
            "DIR/adapter_config.json: is an adapter of the kind 'ia3'; supported are lora, dora, full",
        ),
        (set_config("lora_parameters", None), "DIR/adapter_config.json: lacks num_layers or lora_parameters"),
        (set_config("num_layers", "all"), WRONG_TYPE),
        (set_config("chat_template", ["a"]), WRONG_TYPE),
        (set_parameter("rank", "4"), WRONG_TYPE),
        (set_parameter("rank", 0), WRONG_TYPE),
        (set_parameter("scale", None), WRONG_TYPE),
        (set_parameter("keys", "q_proj"), WRONG_TYPE),
        (
            set_parameter("keys", ["input_layernorm"]),
            "DIR: does not fit BASE: Can't convert layer of type RMSNorm to LoRA",
        ),
        (set_parameter("keys", ["attn.wq"]), "DIR: adapts no linear layer of BASE, or other layers as well"),
        (
            set_parameter("keys", ["model.embed_tokens", "mlp.up_proj"]),
            "DIR: adapts no linear layer of BASE, or other layers as well",
        ),
        (
            set_parameter("rank", 5),
            f"DIR: does not fit BASE: {FIRST} is (512, 4), not (512, 5); "
            "give the base model that the adapter was trained on",
        ),
        (
            set_tensors(lambda tensors: {name: each for name, each in tensors.items() if name != FIRST}),
            f"DIR: does not fit BASE: 1 tensors differ, such as {FIRST}; "
            "give the base model that the adapter was trained on",
        ),
        (
            set_tensors(lambda tensors: tensors | {"model.norm.weight": mx.zeros((192,))}),
            "DIR: does not fit BASE: 1 tensors differ, such as model.norm.weight; "
            "give the base model that the adapter was trained on",
        ),
        (
            set_tensors(with_nan),
            "DIR: holds NaN or infinite values in model.layers.1.mlp.up_proj.lora_b; train it again",
        ),
        (
            cut,
            "DIR/adapters.safetensors: is no whole safetensors file: "
            "its tensors end at byte 167088, the file at 166988; copy it again, or train again",
        ),
        (
            lambda folder: (folder / "adapters.safetensors").write_bytes(b"\xff" * 64),
            "DIR/adapters.safetensors: is no whole safetensors file: "
            "its header would have 18446744073709551615 bytes; copy it again, or train again",
        ),
    ],
)
def test_malformed_adapters_are_refused_in_a_line(
    spoil: Callable[[Path], None], line: str, saved: Path, tiny: Path, tmp_path: Path
) -> None:
    folder = copy(saved, tmp_path)
    spoil(folder)
    assert refusal(model.load(tiny), folder) == line


def test_the_adapter_of_another_base_is_refused(saved: Path, tiny: Path, tmp_path: Path) -> None:
    """Even where its shapes fit: it would change answers without a word."""
    copy = tmp_path / "base"
    shutil.copytree(tiny, copy)
    adapter.load(model.load(copy), saved)  # the same weights elsewhere are the same base
    weights = mx.load(str(copy / "model.safetensors"))
    weights["model.norm.weight"] = weights["model.norm.weight"] * 1.001
    mx.save_safetensors(str(copy / "model.safetensors"), weights, metadata={"format": "mlx"})
    assert refusal(model.load(copy), saved) == (
        "DIR: was trained on another base than BASE; give that base; or, to use it all the same, "
        "remove base_fingerprint from its adapter_config.json"
    )


def test_an_adapter_that_does_not_fit_is_refused(saved: Path, stories: Path) -> None:
    config = json.loads((saved / "adapter_config.json").read_text())
    (saved / "adapter_config.json").write_text(json.dumps({**config, "base_fingerprint": None}))
    assert refusal(model.load(stories), saved) == (
        "DIR: does not fit BASE: 56 tensors differ, such as model.layers.0.mlp.down_proj.lora_a; "
        "give the base model that the adapter was trained on"
    )


def test_an_adapter_on_an_adapter_is_refused(saved: Path, tiny: Path) -> None:
    lm = model.load(tiny)
    adapter.load(lm, saved)
    with pytest.raises(ModelError, match="does not fit .*Can't convert layer of type CastLoRALinear"):
        adapter.load(lm, saved)


# --- DoRA, rsLoRA, full tuning


def moved(lm: LanguageModel, lora: LoraRecipe) -> dict[str, mx.array]:
    """What is trained of `lm`, moved away from where nothing has changed yet."""
    adapter.attach(lm, lora, seed=0)
    key = mx.random.key(3)
    for number, (name, each) in enumerate(adapter.trained(lm.net).items()):
        noise = mx.random.normal(each.shape, key=mx.random.split(key, 400)[number]) * 0.03
        lm.net.load_weights([(name, each + noise.astype(each.dtype))], strict=False)
    return adapter.trained(lm.net)


@pytest.mark.parametrize(
    "lora",
    [
        LoraRecipe(method="dora", rank=4, scale=3.0),
        LoraRecipe(method="dora", rank=2, targets=["attention"], num_layers=2),
        LoraRecipe(rank=4, scale=1.0, rslora=True),
        LoraRecipe(method="full"),
        LoraRecipe(method="full", num_layers=1),
    ],
)
def test_every_method_starts_without_effect_and_loads_in_plain_mlx_lm(
    tiny: Path, tmp_path: Path, lora: LoraRecipe
) -> None:
    lm = model.load(tiny)
    base = logits(lm.net)
    keys = adapter.attach(lm, lora, seed=0)
    np.testing.assert_allclose(logits(lm.net), base, atol=1e-5)
    lm = model.load(tiny)
    tensors = moved(lm, lora)
    folder = tmp_path / "adapter"
    folder.mkdir()
    adapter.save(folder, tensors, adapter.config(lm, lora, keys))
    there = logits(lm.net)
    assert np.abs(there - base).max() > 0.05
    again = model.load(tiny)
    adapter.load(again, folder)
    np.testing.assert_allclose(logits(again.net), there, atol=1e-5)
    plain, _ = mlx_lm.load(str(tiny), adapter_path=str(folder))
    np.testing.assert_allclose(logits(plain), there, atol=1e-4)


def test_rslora_divides_by_the_root_of_the_rank(tiny: Path) -> None:
    """alpha 32 at rank 16: 32/16 = 2 becomes 32/4 = 8."""
    lm = model.load(tiny)
    adapter.attach(lm, LoraRecipe(rank=16, scale=2.0, rslora=True), seed=0)
    assert {layer.scale for _, layer in adapter.adapted_layers(lm.net)} == {8.0}


def test_doras_magnitudes_are_the_norms_of_rows(tiny: Path) -> None:
    lm = model.load(tiny)
    weight = np.array(lm.net.layers[1].mlp.up_proj.weight, dtype=np.float64)
    adapter.attach(lm, LoraRecipe(method="dora"), seed=0)
    found = np.array(lm.net.layers[1].mlp.up_proj.m)
    np.testing.assert_allclose(found, np.sqrt((weight**2).sum(axis=1)), rtol=1e-5)


@pytest.mark.parametrize(("mode", "bits", "group_size"), [("affine", 3, 64), ("affine", 6, 32), ("mxfp4", 4, 32)])
def test_dora_on_packed_layers(tiny: Path, mode: str, bits: int, group_size: int) -> None:
    """What a GPU does: mlx-lm's own way to make these layers takes 3 and 6 bits for widths that do not exist."""
    lm = model.load(tiny, stored=True)
    nn.quantize(lm.net, group_size, bits, mode=mode)
    packed = logits(lm.net)
    adapter.attach(lm, LoraRecipe(method="dora", rank=4), seed=0)
    np.testing.assert_allclose(logits(lm.net), packed, atol=2e-3)
    assert len(adapter.adapted_layers(lm.net)) == 21


def test_full_tuning_of_the_last_blocks_changes_only_them(tiny: Path) -> None:
    lm = model.load(tiny)
    adapter.attach(lm, LoraRecipe(method="full", num_layers=2), seed=0)
    assert {name.split(".")[2] for name in adapter.trained(lm.net)} == {"1", "2"}
    adapter.attach(lm, LoraRecipe(method="full"), seed=0)
    assert "model.embed_tokens.weight" in adapter.trained(lm.net)


def test_full_tuning_of_a_quantized_base_is_refused(tiny: Path) -> None:
    lm = model.load(tiny)
    lm.config["quantization"] = {"bits": 4, "group_size": 64}
    with pytest.raises(RecipeError) as caught:
        adapter.attach(lm, LoraRecipe(method="full"), seed=0)
    assert str(caught.value) == (
        f"lora.method: full tuning cannot change the quantized weights of {tiny}; "
        "use lora or dora, or start from the original model"
    )


def test_dora_of_experts_is_refused(tiny: Path) -> None:
    lm = model.load(tiny)
    lm.net.layers[0].mlp.up_proj = SwitchLinear(192, 512, 4, bias=False)
    with pytest.raises(RecipeError, match="dora has no form for layers of experts, such as mlp.up_proj"):
        adapter.attach(lm, LoraRecipe(method="dora"), seed=0)


def test_targets_by_pattern(tiny: Path) -> None:
    lm = model.load(tiny)
    assert adapter.targets(lm.net, LoraRecipe(targets=["[qv]_proj"])) == ["self_attn.q_proj", "self_attn.v_proj"]
    assert adapter.targets(lm.net, LoraRecipe(targets=["mlp.*"])) == MLP
