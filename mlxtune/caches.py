"""Has a network use given key-value caches, though it is called without. Knows networks; nothing is left patched.

mlx-lm's models ask their caches for the attention's mask, for the position of the first token, and for the keys and
values to attend to, so a cache can change what a token sees.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.nn as nn

from mlxtune.borrow import make_prompt_cache


@contextmanager
def given(net: nn.Module, make: Callable[[], Any]) -> Iterator[list[Any]]:
    """Inside, `net`, called without caches, gets one of `make()` for each cache that it would make itself.

    Yields these caches. The arrays that a cache has in `held` are inputs of the blocks that get it, see `recompute`.
    """
    caches = [make() for _ in make_prompt_cache(net)]
    plain = type(net)

    def call(net: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return plain.__call__(net, *args, **{"cache": list(caches), **kwargs})

    net.__class__ = type(plain.__name__, (plain,), {"__call__": call})
    try:
        yield caches
    finally:
        net.__class__ = plain


@contextmanager
def measured(net: nn.Module) -> Iterator[None]:
    """Inside, `net` computes as it does to be measured, without dropout."""
    training = getattr(net, "training", True)  # one architecture doesn't set it
    net.eval()
    try:
        yield
    finally:
        net.train(training)


def tried(net: nn.Module, works: Callable[[], bool]) -> bool:
    """Whether `works()` says so of a measured `net`; what an architecture raises at caches it doesn't know is a no."""
    with measured(net):
        try:
            return works()
        except Exception:  # each architecture has its own; a signal is none and passes
            return False
