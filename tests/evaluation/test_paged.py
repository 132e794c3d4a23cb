"""Trees of choices behind prompts, of one layer's keys and of whole networks, against whole rows in float64."""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlxtune import machine
from mlxtune.evaluation import choices, paged
from mlxtune.evaluation.branches import groups, grown
from mlxtune.evaluation.figures import figures
from tests import zoo
from tests.test_beginnings import NOT_BEGUN

RANDOM = np.random.default_rng(5)
# a recurrent state, or, in the last one, caches in pairs: read behind copies of their prompts
WITH_COPIES = {
    "falcon_h1", "granitemoehybrid", "lfm2", "lfm2_moe", "mamba2", "plamo2", "qwen3_5", "qwen3_next", "longcat_flash",
}  # fmt: skip
NOT_PAGED = (NOT_BEGUN | WITH_COPIES) - {"plamo3"}


def drawn(count: int) -> list[int]:
    return RANDOM.integers(1, zoo.VOCABULARY, count).tolist()  # type: ignore[no-any-return]


ONE, TWO = drawn(2), drawn(9)
# some begin with ONE or TWO, one is TWO itself, one goes on for three pieces, one is a token
LABELS = [ONE + drawn(3), ONE + drawn(1), TWO, TWO + drawn(2), TWO[:5] + drawn(2), drawn(1), [*ONE[:1], *drawn(2)]]
APART = [drawn(count) for count in (14, 3, 1, 21)]  # prompts that share nothing, longer than the zoo's windows
ALIKE = [APART[3] + each for each in APART]


def by_hand(net: nn.Module, prompt: Sequence[int], choice: Sequence[int]) -> tuple[float, int]:
    """Nats and first-ranked tokens of a choice in one full row, in float64."""
    logits = np.array(net(mx.array([[*prompt, *choice]]))[0], dtype=np.float64)[len(prompt) - 1 : -1]
    rates = logits - logits.max(axis=-1, keepdims=True)
    rates -= np.log(np.exp(rates).sum(axis=-1, keepdims=True))
    at = range(len(choice))
    return -float(rates[at, choice].sum()), int((logits.argmax(axis=-1) == choice).sum())


@pytest.mark.parametrize("name", zoo.ARCHITECTURES)
def test_in_which_architectures_trees_are_read(name: str) -> None:
    net = zoo.build(name)
    assert paged.supported(net, 20) == (name not in NOT_PAGED)  # longer than the zoo's windows
    assert paged.supported(net, 1) == (name not in NOT_PAGED)


# plain, sliding windows, those with sinks, latent attention, learned positions, experts, two with a state, whole rows
@pytest.mark.parametrize(
    "name", ["llama", "gemma3_text", "gpt_oss", "deepseek_v3", "gpt2", "qwen3_moe", "qwen3_next", "mamba2", "gemma2"]
)
@pytest.mark.parametrize("prompts", [APART, ALIKE])
def test_labels_have_the_nats_of_full_rows(name: str, prompts: list[list[int]]) -> None:
    net = zoo.build(name)
    for batch_size in (1, 3, 32):
        found = choices.read(net, prompts, [LABELS] * len(prompts), batch_size)
        for prompt, each in zip(prompts, found, strict=True):
            expected = [by_hand(net, prompt, label) for label in LABELS]
            assert each.nats.tolist() == pytest.approx([nats for nats, _ in expected], abs=1e-4)
            assert each.right.tolist() == [right for _, right in expected]


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "qwen3_next"])
def test_probabilities_are_the_same_in_any_batch(name: str) -> None:
    net = zoo.build(name)

    def shares(batch_size: int) -> Any:
        nats = np.array(choices.nats(net, APART, [LABELS] * len(APART), batch_size))
        odds = np.exp(nats.min(axis=1, keepdims=True) - nats)
        return odds / odds.sum(axis=1, keepdims=True)

    expected = shares(32)
    for batch_size in (1, 2, 5, 100):
        found = shares(batch_size)
        assert np.abs(found - expected).max() <= 1e-5
        assert found.argmax(axis=1).tolist() == expected.argmax(axis=1).tolist()


@pytest.mark.parametrize("limit", ["tokens", "bytes", "logits"])
def test_small_limits_change_nothing(limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net = zoo.build("llama")
    expected = np.array(paged.read(net, ALIKE, [LABELS] * len(ALIKE), 4))
    calls = counted(monkeypatch)
    plain, count = np.array(paged.read(net, ALIKE, [LABELS] * len(ALIKE), 4)), len(calls)
    if limit == "tokens":
        monkeypatch.setattr(machine, "most_tokens", lambda device: 8)
    elif limit == "bytes":
        monkeypatch.setattr(paged, "KEYS_BYTES", 1)
    else:
        monkeypatch.setattr(machine, "chunk_bytes", lambda device: 4 * zoo.VOCABULARY * 3)  # three positions
    found = np.array(paged.read(net, ALIKE, [LABELS] * len(ALIKE), 4))
    assert np.abs(found - expected).max() <= 1e-5 and np.abs(plain - expected).max() <= 1e-5
    assert (len(calls) > 2 * count) == (limit != "logits")


def counted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of what networks are given to read in calls to come, on one core."""
    shapes: list[tuple[int, ...]] = []

    def telling(net: nn.Module, tokens: mx.array, *others: Any) -> mx.array:
        shapes.append(tokens.shape)
        return figures(net, tokens, *others)

    monkeypatch.setattr(paged, "figures", telling)
    monkeypatch.setattr(machine, "batch_parts", lambda device, cores: 1)
    return shapes


def test_what_is_shared_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    net = zoo.build("llama")
    shapes = counted(monkeypatch)
    heard: list[int] = []
    paged.read(net, ALIKE, [LABELS] * len(ALIKE), 32, heard.append)
    # what the prompts share aside, all of them at once, then all trees: six pieces for the 39 tokens of seven labels
    pieces = len(grown(LABELS).tokens)
    assert (pieces, sum(map(len, LABELS))) == (6, 39)
    assert shapes == [(4, 21), (4 * pieces, 4)]
    assert heard == [4]


def test_a_row_with_many_choices_is_read_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    net = zoo.build("llama")
    monkeypatch.setattr(machine, "most_tokens", lambda device: 1)  # each tree alone
    shapes = counted(monkeypatch)
    paged.read(net, APART[:1], [LABELS], 3)
    trees = [grown([LABELS[at] for at in some]) for some in groups(LABELS, 3)]
    assert shapes == [(1, 14), *(tree.tokens.shape for tree in trees if len(tree.tokens))]


def test_where_keys_lie() -> None:
    tree = grown([[5, 6, 7], [5, 8, 9]], width=2)  # 5 6 | 8 behind the first token
    made = paged.table([tree, tree], [(0, 1), (2, 3)], beginning=2, width=3, rows=3)
    bank = 2 + 3 * 3
    seen = [
        [0, 1, 2, bank, bank + 1],
        [0, 1, 2, bank, bank + 2, bank + 3],
        [0, 1, 8, 9, 10, bank + 4, bank + 5],
        [0, 1, 8, 9, 10, bank + 4, bank + 6, bank + 7],
    ]
    assert made.shape == (4, 8)
    assert [line[: len(each)].tolist() for line, each in zip(made, seen, strict=True)] == seen


@pytest.mark.parametrize("window", [None, 2])
def test_who_sees_whom(window: int | None) -> None:
    cache = paged.Paged([], mx.array([1, 3]), mx.zeros((2, 5), dtype=mx.int32), {})
    mask = np.array(cache.make_mask(2, window_size=window))
    for line, before in enumerate((1, 3)):
        for query in range(2):
            place = before + query
            first = 0 if window is None else place - window + 1
            assert mask[line, 0, query].tolist() == [first <= key <= place for key in range(5)]
