"""What layers read, against NumPy over the same rows one by one; nothing stays patched."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlxtune.data.render import Sample
from mlxtune.quant import calibrate
from tests import zoo


def sample(*tokens: int) -> Sample:
    return Sample("rows:1", list(tokens), [True] * len(tokens), 0, None)


SAMPLES = [sample(1, 2, 3), sample(4, 5), sample(3, 2, 9), sample(7), sample(8, 8, 1, 2, 3, 4, 5), sample()]


class Net(nn.Module):
    """Two layers read the vectors of the tokens, one of them what the other made; the embedding makes the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 32)
        self.first = nn.Linear(32, 64)
        self.twin = nn.Linear(32, 64)
        self.second = nn.Linear(64, 32, bias=False)
        self.unused = nn.Linear(32, 32)
        self.calls: list[tuple[int, ...]] = []

    def __call__(self, tokens: mx.array, cache: Any = None) -> mx.array:
        self.calls.append(tokens.shape)
        hidden = self.embed(tokens)
        hidden = self.second(nn.relu(self.first(hidden)) + self.twin(hidden))
        return self.embed.as_linear(hidden)


def kinds(net: nn.Module) -> list[type]:
    return [type(module) for _, module in sorted(net.named_modules(), key=lambda each: each[0])]


def test_means_are_those_of_each_vector() -> None:
    net = Net()
    embed, first, twin, second = (
        np.array(each.weight, dtype=np.float64) for each in (net.embed, net.first, net.twin, net.second)
    )
    biases = np.array(net.first.bias, dtype=np.float64), np.array(net.twin.bias, dtype=np.float64)
    read = embed[[token for each in SAMPLES for token in each.tokens]]
    middle = np.maximum(read @ first.T + biases[0], 0) + read @ twin.T + biases[1]
    expected = {"first": read, "twin": read, "second": middle, "embed": middle @ second.T}
    for hessian in (True, False):
        found = calibrate.gather(net, SAMPLES, ["embed", "second", "unused", "first", "twin"], hessian)
        assert list(found) == ["embed", "second", "first", "twin"]
        for name, each in found.items():
            assert each.count == 16
            whole = expected[name].T @ expected[name] / 16
            np.testing.assert_allclose(np.array(each.mean_square), np.diag(whole), rtol=1e-5, atol=1e-8)
            assert (each.hessian is None) != hessian
            if each.hessian is not None:
                np.testing.assert_allclose(np.array(each.hessian), whole, rtol=1e-4, atol=1e-6)


def test_rows_of_one_length_are_read_together_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net()
    seen: list[int] = []
    calibrate.gather(net, SAMPLES, ["first"], False, seen.append)
    assert net.calls == [(1, 1), (1, 2), (2, 3), (1, 7)]
    assert seen == [1, 3, 9, 16]
    monkeypatch.setattr(calibrate, "MOST_TOKENS", 3)
    net.calls.clear()
    calibrate.gather(net, SAMPLES, ["first"], False)
    assert net.calls == [(1, 1), (1, 2), (1, 3), (1, 3), (1, 7)]


def test_twins_share_one_matrix() -> None:
    found = calibrate.gather(Net(), SAMPLES, ["first", "twin"], True)
    assert found["first"].hessian is found["twin"].hessian


def test_nothing_stays_patched() -> None:
    net = Net()
    before = kinds(net)
    net.train()
    calibrate.gather(net, SAMPLES, ["first", "embed"], True)
    assert kinds(net) == before and net.training
    with pytest.raises(ValueError, match="matmul|addmm|shape"):
        net.second.weight = mx.zeros((32, 63))
        calibrate.gather(net, SAMPLES, ["first", "embed"], True)
    assert kinds(net) == before and net.training


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "gemma2", "phi3", "deepseek_v3", "mamba"])
def test_architectures(name: str) -> None:
    net = zoo.build(name)
    layers = {key: each for key, each in net.named_modules() if hasattr(each, "to_quantized")}
    expected = net(mx.array([[1, 2, 3]]))
    found = calibrate.gather(net, SAMPLES, list(layers), True)
    assert len(found) >= 0.8 * len(layers)
    for key, each in found.items():
        assert each.hessian is not None and each.hessian.shape == (layers[key].weight.shape[-1],) * 2
        assert np.isfinite(np.array(each.hessian)).all() and each.count >= 1
    assert mx.array_equal(net(mx.array([[1, 2, 3]])), expected)


def test_packed_layers_are_read_too() -> None:
    net = zoo.build("llama")
    names = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"]
    nn.quantize(net, 32, 8)
    found = calibrate.gather(net, SAMPLES, names, False)
    assert {name: each.mean_square.shape for name, each in found.items()} == dict.fromkeys(names, (64,))
