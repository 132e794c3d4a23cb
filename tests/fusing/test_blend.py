"""Adapters with weights: the sum of what each adds, computed here in float64, and what has no such sum."""

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.switch_layers import SwitchLinear
from mlx_lm.tuner.lora import LoRASwitchLinear

from mlxtune import adapter, model
from mlxtune.convert import convert
from mlxtune.errors import InputError, MlxtuneError, ModelError
from mlxtune.fusing import blend
from mlxtune.fusing.blend import Part
from mlxtune.recipe import LoraRecipe
from tests.learned import learn, logits, with_adapter


@pytest.fixture(scope="module")
def adapters(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    work = tmp_path_factory.mktemp("blend")
    kinds = {
        "all": LoraRecipe(rank=4),
        "some": LoraRecipe(rank=2, targets=["attention"], num_layers=2, scale=3.0),
        "dora": LoraRecipe(method="dora", rank=4),
        "full": LoraRecipe(method="full", num_layers=1),
    }
    return {name: learn(tiny, work / name, lora, 4, 5e-3) for name, lora in kinds.items()}


def updates(base: Path, folder: Path) -> dict[str, Any]:
    """scale·(A·B)ᵀ of each layer of an adapter, in float64."""
    found = {}
    for name, layer in adapter.adapted_layers(with_adapter(base, folder).net):
        a, b = (np.array(each, dtype=np.float64) for each in (layer.lora_a, layer.lora_b))
        found[name] = layer.scale * (a @ b).T
    return found


def test_the_sum_of_two_is_one_adapter(tiny: Path, adapters: dict[str, Path]) -> None:
    lm = model.load(tiny)
    before = logits(lm.net)
    blend.attach(lm, [Part(adapters["all"], 0.7), Part(adapters["some"], -0.4)])
    one, other = updates(tiny, adapters["all"]), updates(tiny, adapters["some"])
    layers = dict(adapter.adapted_layers(lm.net))
    assert layers.keys() == one.keys() | other.keys() and one.keys() != other.keys()
    for name, layer in layers.items():
        expected = 0.7 * one.get(name, 0.0) - 0.4 * other.get(name, 0.0)
        np.testing.assert_allclose(np.array(adapter.update(layer)), expected, atol=1e-6)
    dense = model.load(tiny)
    for name, layer in dense.net.named_modules():
        if name in layers:
            layer.weight = layer.weight + adapter.update(layers[name])
    np.testing.assert_allclose(logits(lm.net), logits(dense.net), atol=2e-4)
    assert np.abs(logits(lm.net) - before).max() > 0.1


def test_experts_are_added_one_by_one() -> None:
    mx.random.seed(5)
    layer = SwitchLinear(64, 32, 3)
    factors, expected = [], np.zeros((3, 32, 64))
    for rank, scale in ((2, 1.5), (4, -0.5)):
        one = LoRASwitchLinear.from_base(layer, r=rank, scale=1.0)
        b = mx.random.normal(one.lora_b.shape)
        factors.append(blend._Factors(one.lora_a, b, scale))
        a = np.array(one.lora_a, dtype=np.float64).reshape(3, rank, 64)
        expected += scale * np.stack([np.array(b[e], dtype=np.float64) @ a[e] for e in range(3)])
    made = blend._joined(layer, factors)
    np.testing.assert_allclose(np.array(adapter.update(made)), expected, atol=1e-5)
    x, chosen = mx.random.normal((1, 1, 1, 64)), mx.array([[2, 0]])
    sums = (np.array(layer.weight, dtype=np.float64) + expected)[[2, 0]] @ np.array(x[0, 0, 0], dtype=np.float64)
    bias = np.array(layer.bias, dtype=np.float64)[[2, 0]] if "bias" in layer else 0
    np.testing.assert_allclose(np.array(made(x, chosen))[0, :, 0], sums + bias, atol=1e-4)


def test_a_weight_is_a_factor_on_what_is_added(tiny: Path, adapters: dict[str, Path]) -> None:
    lm = model.load(tiny)
    blend.attach(lm, [Part(adapters["all"], 0.25)])
    own = updates(tiny, adapters["all"])
    for name, layer in adapter.adapted_layers(lm.net):
        np.testing.assert_allclose(np.array(adapter.update(layer)), 0.25 * own[name], atol=1e-7)


def test_a_full_tuning_is_gone_half_way(tiny: Path, adapters: dict[str, Path]) -> None:
    lm = model.load(tiny)
    blend.attach(lm, [Part(adapters["full"], 0.5)])
    before, after = model.load(tiny).net, with_adapter(tiny, adapters["full"]).net
    layers = [each.model.layers[2].mlp.up_proj.weight for each in (before, after, lm.net)]
    start, end, half = (np.array(each, dtype=np.float64) for each in layers)
    assert np.abs(end - start).max() > 1e-3
    np.testing.assert_allclose(half, (start + end) / 2, atol=1e-7)


def test_dora_stays_as_it_is(tiny: Path, adapters: dict[str, Path]) -> None:
    lm = model.load(tiny)
    blend.attach(lm, [Part(adapters["dora"])])
    np.testing.assert_array_equal(logits(lm.net), logits(with_adapter(tiny, adapters["dora"]).net))


def test_what_cannot_be_weighted_or_added(tiny: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    def line(kind: type[MlxtuneError], *parts: Part) -> str:
        with pytest.raises(kind) as caught:
            blend.attach(model.load(tiny), parts)
        assert type(caught.value) is kind
        return str(caught.value)

    one, dora, full = (adapters[name] for name in ("all", "dora", "full"))
    assert line(InputError) == "--adapter-path: names no adapter"
    assert (
        line(InputError, Part(one), Part(one, 0.5))
        == f"{one}: is given twice; give it once, with the sum of its weights"
    )
    for parts in ((Part(dora, 0.5),), (Part(one), Part(dora))):
        found = line(InputError, *parts)
        assert found.startswith(f"{dora}: is a DoRA adapter, whose change is no sum that could be weighted; ")
    assert line(InputError, Part(one), Part(full)).startswith(f"{full}: is a full tuning; ")
    other = Path(shutil.copytree(one, tmp_path / "other"))
    config = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps(config | {"chat_template": "{{ messages }}"}))
    found = line(InputError, Part(one), Part(other))
    assert found == (
        f"{other}: has another chat template than {one}; adapters that are added must have learned the same one"
    )


def test_each_of_several_must_fit_the_base(tiny: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    convert(tiny, tmp_path / "half", dtype="bfloat16")
    other = Path(shutil.copytree(adapters["some"], tmp_path / "other"))
    config = json.loads((other / "adapter_config.json").read_text())
    config["base_fingerprint"] = model.fingerprint(tmp_path / "half")
    (other / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=f"{other}: was trained on another base than"):
        blend.attach(model.load(tiny), [Part(adapters["all"]), Part(other)])


def test_no_weight_of_the_base_is_read(tiny: Path, adapters: dict[str, Path]) -> None:
    """What is attached to a network that is not read yet leaves it so."""
    lm = model.load(tiny)
    net, config = model.outline(tiny)
    mx.synchronize()
    before = mx.get_active_memory()
    blend.attach(model.LanguageModel(net, lm.tokenizer, config, tiny), [Part(adapters["all"]), Part(adapters["some"])])
    held = sum(np.prod(each.shape) * 4 for part in ("all", "some") for each in _tensors(adapters[part]))
    assert mx.get_active_memory() - before < 3 * held


def _tensors(folder: Path) -> list[mx.array]:
    return list(adapter.read_tensors(folder / adapter.WEIGHTS).values())
