"""A network's head at chosen positions: the same logits, for nearly all architectures, and nothing left patched."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlxtune import head
from tests import zoo

TOKENS = mx.array(np.random.default_rng(0).integers(0, zoo.VOCABULARY, (3, 9)))
AT = mx.array([0, 5, 5, 11, 26])
# talkie scales the weight of its head itself, without a layer
WITHOUT = {"talkie"}
# these multiply by the weight of their embeddings, where these are the head too
UNTIED_ONLY = {"minicpm", "seed_oss"}


def kinds(net: nn.Module) -> list[type]:
    return [type(module) for _, module in sorted(net.named_modules(), key=lambda each: each[0])]


@pytest.mark.parametrize("name", zoo.ARCHITECTURES)
def test_logits_at_positions(name: str) -> None:
    net = zoo.build(name)
    before = kinds(net)
    net.train()
    found = head.find(net)
    assert net.training
    assert (found is None) == (name in WITHOUT)
    if found is None:
        return
    expected = head.gathered(net(TOKENS), AT)
    np.testing.assert_allclose(found.logits(TOKENS, AT), expected, rtol=1e-4, atol=1e-5)
    hidden = found.hidden(TOKENS, AT)
    assert hidden.shape[0] == len(AT)
    np.testing.assert_allclose(found.logits_of(hidden, TOKENS), expected, rtol=1e-4, atol=1e-5)
    assert kinds(net) == before


@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3", "smollm3", "mamba", *sorted(UNTIED_ONLY)])
def test_embeddings_that_are_the_head_too(name: str) -> None:
    net = zoo.build(name, tie_word_embeddings=True)
    found = head.find(net)
    assert (found is None) == (name in UNTIED_ONLY)
    if found is not None:
        np.testing.assert_allclose(found.logits(TOKENS, AT), head.gathered(net(TOKENS), AT), rtol=1e-4, atol=1e-5)


def test_nothing_stays_patched_after_an_error() -> None:
    net = zoo.build("llama")
    before = kinds(net)
    found = head.find(net)
    assert found is not None
    with pytest.raises(ValueError, match="matmul"):
        found.logits_of(mx.zeros((2, 7)), TOKENS)
    assert kinds(net) == before


def test_a_head_whose_logits_depend_on_their_neighbours_is_not_used() -> None:
    class Mixed(nn.Module):
        """Adds to each logit that of the token before."""

        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(10, 8)

        def __call__(self, tokens: mx.array) -> Any:
            logits = self.embed.as_linear(self.embed(tokens))
            return logits + mx.roll(logits, 1, axis=1)

    assert head.find(Mixed()) is None


def test_frozen_means_that_only_blocks_are_trained() -> None:
    net = zoo.build("llama")
    found = head.find(net)
    assert found is not None
    assert not found.frozen
    net.freeze()
    assert found.frozen
    net.layers[-1].unfreeze()
    assert found.frozen
    net.model.norm.unfreeze()
    assert not found.frozen
