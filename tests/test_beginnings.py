"""What prompts share: the beginnings that are worth it, and that copies of their caches change no logits."""

import mlx.core as mx
import numpy as np
import pytest

from mlxtune import beginnings
from tests import zoo

# padding changes the shorter row; gpt_bigcode, llama4: no caches of several rows
NOT_IN_BATCHES = {
    "afm7", "baichuan_m1", "bailing_moe_linear", "gemma2", "gpt_bigcode", "jamba", "llama4", "mamba", "nemotron_h",
    "olmo_hybrid", "rwkv7",
}  # fmt: skip
NOT_BEGUN = NOT_IN_BATCHES | {"plamo3"}


def begun(*counts: int, start: tuple[int, ...] = tuple(range(10, 30))) -> list[list[int]]:
    """Prompts of one beginning, then of tokens of their own."""
    return [[*start, *([100 + row] * count)] for row, count in enumerate(counts)]


def test_all_prompts_begin_alike() -> None:
    assert beginnings.shared(begun(1, 5, 2, 9)) == [20] * 4


def test_the_last_token_is_never_shared() -> None:
    assert beginnings.shared(begun(1, 0, 2, 9)) == [19] * 4
    assert beginnings.shared([list(range(20))] * 5) == [19] * 5


@pytest.mark.parametrize("prompts", [[], [[1]], [[1], [1], [1], [1], [1]], begun(1, 2, 3)])
def test_too_few_or_too_short(prompts: list[list[int]]) -> None:
    assert beginnings.shared(prompts) == [0] * len(prompts)


def test_a_group_shares_more_and_a_stranger_nothing() -> None:
    longer = begun(1, 2, 3, 4, start=tuple(range(10, 60)))
    prompts = [*begun(4, 5), *longer, [7] * 30]
    assert beginnings.shared(prompts) == [20] * 2 + [50] * 4 + [0]


def test_no_more_caches_than_four_those_that_save_most() -> None:
    prompts = [prompt for group in range(6) for prompt in begun(*[3] * (4 + group), start=(group,) * 30)]
    lengths = beginnings.shared(prompts)
    assert lengths == [0] * (4 + 5) + [30] * (6 + 7 + 8 + 9)


@pytest.mark.parametrize("name", zoo.ARCHITECTURES)
def test_in_which_architectures_copies_are_exact(name: str) -> None:
    net = zoo.build(name)
    assert beginnings.copies_are_exact(net, 0) == (name not in NOT_IN_BATCHES)
    assert beginnings.copies_are_exact(net, 13) == (name not in NOT_BEGUN)  # longer than the zoo's windows of 8


def test_a_long_beginning_is_computed_in_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    net = zoo.build("llama")
    tokens = np.random.default_rng(0).integers(0, zoo.VOCABULARY, 40).tolist()
    whole = beginnings.computed(net, tokens)
    monkeypatch.setattr(beginnings, "STEP", 7)
    for one, other in zip(whole, beginnings.computed(net, tokens), strict=True):
        assert one.offset == other.offset == 40
        assert mx.allclose(one.keys[..., :40, :], other.keys[..., :40, :], atol=1e-5)
