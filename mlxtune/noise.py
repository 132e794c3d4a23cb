"""NEFTune: noise on a network's embeddings while it trains. Knows networks; nothing is left patched."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxtune.errors import RecipeError


@contextmanager
def noisy_embeddings(net: nn.Module, strength: float | None) -> Iterator[None]:
    """Inside, the token embeddings (B, T, D) get noise, uniform in ±strength / sqrt(T·D); None: they stay as they are.

    Jain et al. 2023, "NEFTune: Noisy Embeddings Improve Instruction Finetuning", https://arxiv.org/abs/2310.05914;
    T counts padding, as in the authors' code for batches. The noise is drawn from MLX's global state.
    Raises RecipeError for a network without a layer of embeddings.
    """
    if strength is None:
        yield
        return
    layer = embedding(net)
    plain = type(layer)

    def noisy(self: nn.Module, tokens: mx.array) -> mx.array:
        vectors = plain.__call__(self, tokens)
        bound = strength / (vectors.shape[-2] * vectors.shape[-1]) ** 0.5
        noise = mx.random.uniform(-bound, bound, vectors.shape)
        made: mx.array = vectors + noise.astype(vectors.dtype)
        return made

    layer.__class__ = type(plain.__name__, (plain,), {"__call__": noisy})
    try:
        yield
    finally:
        layer.__class__ = plain


def embedding(net: nn.Module) -> Any:
    """The layer that embeds the tokens: the first of its kind. Raises RecipeError if there is none."""
    kinds = (nn.Embedding, nn.QuantizedEmbedding)
    found = [module for _, module in sorted(net.named_modules()) if isinstance(module, kinds)]
    if not found:
        raise RecipeError("this architecture has no layer of embeddings", where="train.neftune", hint="leave it out")
    return max(found, key=lambda each: each.weight.shape[0])
