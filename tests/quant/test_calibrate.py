"""What layers read, against NumPy over the same rows one by one; nothing stays patched."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

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


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(32, 32)

    def __call__(self, hidden: mx.array) -> mx.array:
        return hidden + mx.tanh(self.inner(hidden))


class Blocks(nn.Module):
    """Blocks that read what the one before made, gone through some times; two layers lie outside."""

    def __init__(self, count: int = 3, rounds: int = 1) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 32)
        self.layers = [Block() for _ in range(count)]
        self.head = nn.Linear(32, 16)
        self.rounds = rounds

    def __call__(self, tokens: mx.array, cache: Any = None) -> mx.array:
        hidden = self.embed(tokens)
        for _ in range(self.rounds):
            for layer in self.layers:
                hidden = layer(hidden)
        return self.head(hidden)


def gather(
    net: nn.Module,
    samples: list[Sample],
    names: list[str],
    hessian: bool,
    on_tokens: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, calibrate.Inputs]:
    """What all blocks yield, without the layers that got nothing."""
    parts = list(calibrate.gathered(lambda: net, samples, names, hessian, on_tokens))
    return {name: each for part in parts for name, each in part.items() if each is not None}


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
        found = gather(net, SAMPLES, ["embed", "second", "unused", "first", "twin"], hessian)
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
    seen: list[tuple[int, int]] = []
    gather(net, SAMPLES, ["first"], False, lambda *told: seen.append(told))
    assert net.calls == [(1, 1), (1, 2), (2, 3), (1, 7)]
    assert seen == [(1, 16), (3, 16), (9, 16), (16, 16)]
    monkeypatch.setattr(calibrate, "MOST_TOKENS", 3)
    net.calls.clear()
    gather(net, SAMPLES, ["first"], False)
    assert net.calls == [(1, 1), (1, 2), (1, 3), (1, 3), (1, 7)]


def test_twins_share_one_matrix() -> None:
    found = gather(Net(), SAMPLES, ["first", "twin"], True)
    assert found["first"].hessian is found["twin"].hessian


def test_nothing_stays_patched() -> None:
    net = Net()
    before = kinds(net)
    net.train()
    gather(net, SAMPLES, ["first", "embed"], True)
    assert kinds(net) == before and net.training
    with pytest.raises(ValueError, match="matmul|addmm|shape"):
        net.second.weight = mx.zeros((32, 63))
        gather(net, SAMPLES, ["first", "embed"], True)
    assert kinds(net) == before and net.training


@pytest.mark.parametrize("rounds", [1, 2])
def test_a_block_after_the_other_is_the_same_as_all_at_once(rounds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    net = Blocks(rounds=rounds)
    names = ["head", *(f"layers.{number}.inner" for number in range(3))]
    parts = list(calibrate.gathered(lambda: net, SAMPLES, names, True))
    assert [list(part) for part in parts] == [[names[1]], [names[2]], [names[3], "head"]]
    monkeypatch.setattr(calibrate, "by_block", lambda net, names: [names])
    (whole,) = calibrate.gathered(lambda: net, SAMPLES, names, True)
    for part in parts:
        for name, each in part.items():
            assert each is not None and whole[name] is not None and each.count == 16 * (1 if name == "head" else rounds)
            np.testing.assert_allclose(np.array(each.hessian), np.array(whole[name].hessian), rtol=1e-4, atol=1e-6)


def test_what_lies_before_a_block_is_not_computed() -> None:
    """The network that the last block is entered in gives NaN before it: nothing of that is seen."""
    nets = []

    def make() -> nn.Module:
        net = Blocks()
        net.load_weights(weights)
        for layer in net.layers[: max(0, len(nets) - 1)]:  # the first network only tells the names
            layer.inner.weight = mx.full((32, 32), float("nan"))
        nets.append(net)
        return net

    weights = list(tree_flatten(Blocks().parameters()))
    names = [f"layers.{number}.inner" for number in range(3)]
    parts = list(calibrate.gathered(make, SAMPLES, names, False))
    assert len(nets) == 4
    for part in parts:
        for each in part.values():
            assert each is not None and np.isfinite(np.array(each.mean_square)).all()


@pytest.mark.parametrize("name", sorted(zoo.ARCHITECTURES))
def test_architectures(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block after the other sees what all at once see."""
    net = zoo.build(name)
    layers = {key: each for key, each in net.named_modules() if hasattr(each, "to_quantized")}
    expected = net(mx.array([[1, 2, 3]]))
    found = gather(net, SAMPLES, list(layers), True)
    assert len(found) >= 0.8 * len(layers)
    assert mx.array_equal(net(mx.array([[1, 2, 3]])), expected, equal_nan=True)
    monkeypatch.setattr(calibrate, "by_block", lambda net, names: [names])
    whole = gather(net, SAMPLES, list(layers), True)
    assert found.keys() == whole.keys()
    for key, each in found.items():
        assert each.hessian is not None and each.hessian.shape == (layers[key].weight.shape[-1],) * 2
        assert each.count == whole[key].count
        far = mx.abs(each.hessian - whole[key].hessian).max() / mx.abs(whole[key].hessian).max()
        assert far.item() < 1e-4, key


def test_packed_layers_are_read_too() -> None:
    net = zoo.build("llama")
    names = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"]
    nn.quantize(net, 32, 8)
    found = gather(net, SAMPLES, names, False)
    assert {name: each.mean_square.shape for name, each in found.items()} == dict.fromkeys(names, (64,))
