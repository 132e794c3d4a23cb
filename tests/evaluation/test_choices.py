"""Log-probabilities of continuations against those of whole rows, and against float64 softmax of the logits."""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlxtune import beginnings, likelihood, machine
from mlxtune.data.render import Sample
from mlxtune.evaluation import choices, paged
from tests import zoo

RANDOM = np.random.default_rng(3)
BEGIN = RANDOM.integers(0, zoo.VOCABULARY, 12).tolist()
PROMPTS = [BEGIN + RANDOM.integers(0, zoo.VOCABULARY, count).tolist() for count in (3, 5, 9, 4)]
CHOICES = [[RANDOM.integers(0, zoo.VOCABULARY, count).tolist() for count in (1, 3, 4)] for _ in PROMPTS]


def rows(prompts: Sequence[list[int]], several: Sequence[list[list[int]]]) -> list[Sample]:
    return [
        Sample("a:1", [*prompt, *choice], [False] * len(prompt) + [True] * len(choice), len(prompt), None)
        for prompt, some in zip(prompts, several, strict=True)
        for choice in some
    ]


def by_hand(net: nn.Module, sample: Sample) -> tuple[float, int]:
    """Nats and first-ranked tokens of a sample's supervised tokens, in float64."""
    logits = np.array(net(mx.array([sample.tokens]))[0].astype(mx.float32), dtype=np.float64)
    nats, right = 0.0, 0
    for place in range(1, len(sample.tokens)):
        if sample.trained[place]:
            row, target = logits[place - 1], sample.tokens[place]
            nats += np.log(np.exp(row - row.max()).sum()) + row.max() - row[target]
            right += int(row.argmax() == target)
    return float(nats), right


@pytest.mark.parametrize("name", zoo.ARCHITECTURES)
def test_choices_have_the_nats_of_whole_rows(name: str) -> None:
    net = zoo.build(name)
    found = choices.nats(net, PROMPTS, CHOICES)
    expected = np.array(likelihood.measure(net, rows(PROMPTS, CHOICES))).reshape(len(PROMPTS), -1)
    assert np.abs(np.array(found) - expected).max() <= 1e-4


def test_prompts_and_what_they_share_are_read_once_behind_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged, "supported", lambda net, length: False)
    net = zoo.build("llama")
    read: list[tuple[int, ...]] = []
    feed = beginnings.feed

    def told(net: nn.Module, tokens: Any, caches: list[Any]) -> None:
        read.append(tokens.shape)
        feed(net, tokens, caches)

    monkeypatch.setattr(beginnings, "feed", told)
    heard: list[int] = []
    choices.nats(net, PROMPTS, CHOICES, 6, heard.append)
    assert read[0] == (1, max(map(len, PROMPTS)) - 1)  # of random tokens: whether it is right
    # two prompts with their three choices each; the last token of a prompt stands before its choices
    assert read[1:] == [(1, len(BEGIN)), (2, 4 - 1), (2, 9 - 1)]
    assert heard == [2, 4]


@pytest.mark.parametrize("batch_size", [1, 2, 5, 12])
def test_any_batch_size(batch_size: int) -> None:
    net = zoo.build("gemma3_text")
    expected = np.array(choices.nats(net, PROMPTS, CHOICES))
    assert np.abs(np.array(choices.nats(net, PROMPTS, CHOICES, batch_size)) - expected).max() <= 1e-5


def test_rows_of_unequal_and_of_no_choices() -> None:
    net = zoo.build("qwen2")
    several = [CHOICES[0][:1], [], CHOICES[2], CHOICES[3][1:]]
    found = choices.read(net, PROMPTS, several)
    assert [len(each.nats) for each in found] == [1, 0, 3, 2]
    expected = [by_hand(net, sample) for sample in rows(PROMPTS, several)]
    assert np.concatenate([each.nats for each in found]).tolist() == pytest.approx(
        [one for one, _ in expected], abs=1e-4
    )
    assert np.concatenate([each.right for each in found]).tolist() == [other for _, other in expected]


def test_a_prompt_of_one_token() -> None:
    net = zoo.build("llama")
    (found,) = choices.read(net, [[5]], [CHOICES[0]])
    assert found.nats.tolist() == pytest.approx([by_hand(net, each)[0] for each in rows([[5]], CHOICES[:1])], abs=1e-4)


@pytest.mark.parametrize(("prompts", "several"), [([[]], [[[1]]]), ([[1]], [[[]]])])
def test_nothing_to_read_or_to_score(prompts: list[list[int]], several: list[list[list[int]]]) -> None:
    with pytest.raises(ValueError, match="has no tokens"):
        choices.nats(zoo.build("llama"), prompts, several)


@pytest.mark.parametrize("chunk", [None, 4 * zoo.VOCABULARY * 3])
def test_measured_samples_have_their_nats_and_first_ranked_tokens(
    chunk: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if chunk is not None:
        monkeypatch.setattr(machine, "chunk_bytes", lambda device: chunk)  # three positions at a time
    net = zoo.build("llama")
    samples = rows(PROMPTS, CHOICES)
    for sample in samples[:6]:  # let the network be right somewhere
        logits = net(mx.array([sample.tokens]))[0]
        sample.tokens[sample.prompt_length] = int(logits[sample.prompt_length - 1].argmax().item())
    found = choices.measure(net, samples, batch_size=5)
    expected = [by_hand(net, sample) for sample in samples]
    assert found.nats.tolist() == pytest.approx([one for one, _ in expected], abs=1e-4)
    assert found.nats.tolist() == pytest.approx(likelihood.measure(net, samples), abs=1e-5)
    assert found.right.tolist() == [other for _, other in expected]
    assert found.right.sum() >= 6
