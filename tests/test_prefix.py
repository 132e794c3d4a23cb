"""A shared beginning of rows: found where it is right, computed once, with the loss and gradient of the whole rows."""

from dataclasses import replace

import numpy as np
import pytest

from mlxtune import likelihood, prefix
from mlxtune.data.batches import make_batch
from mlxtune.data.render import Sample
from mlxtune.recompute import recomputed
from tests import zoo
from tests.gradients import difference, loss_and_gradient

# no: states, and caches of another kind than keys and values
WHOLE = {
    "afm7", "baichuan_m1", "bailing_moe_linear", "falcon_h1", "granitemoehybrid", "jamba", "lfm2", "lfm2_moe",
    "llama4", "longcat_flash", "mamba", "mamba2", "nemotron_h", "olmo_hybrid", "plamo2", "qwen3_5", "qwen3_next",
    "recurrent_gemma", "rwkv7",
}  # fmt: skip
SHARED = sorted(zoo.ARCHITECTURES.keys() - WHOLE)
BEGINNING = np.random.default_rng(9).integers(0, zoo.VOCABULARY, 13).tolist()  # longer than the zoo's windows of 8


def sample(tokens: list[int], learned: int) -> Sample:
    trained = [place >= len(tokens) - learned for place in range(len(tokens))]
    return Sample("a:1", tokens, trained, len(tokens) - learned, "x")


def rows() -> list[Sample]:
    random = np.random.default_rng(1)
    return [
        sample(BEGINNING + [row, *random.integers(0, zoo.VOCABULARY, length).tolist()], length)
        for row, length in enumerate((1, 4, 11, 6))
    ]


@pytest.mark.parametrize("name", zoo.ARCHITECTURES)
def test_which_architectures_share(name: str) -> None:
    net = zoo.build(name)
    kind = type(net)
    assert prefix.supported(net, 13, 11, zoo.VOCABULARY) == (name not in WHOLE)
    assert type(net) is kind


@pytest.mark.parametrize(
    ("name", "saving"), [*((name, False) for name in SHARED), ("llama", True), ("gemma4_text", True), ("dots1", True)]
)
def test_loss_and_gradient_are_those_of_the_whole_rows(name: str, saving: bool) -> None:
    net = zoo.build(name)
    samples, order = rows(), [0, 1, 2, 3]
    tokens = prefix.common(samples)
    assert tokens == BEGINNING[:-1]
    rest = make_batch(prefix.without(samples, len(tokens)), order)
    with recomputed(net, saving):
        loss, whole = loss_and_gradient(net, [make_batch(samples, order)], 1)
        shared_loss, shared = loss_and_gradient(net, [rest], 1, tokens)
    assert shared_loss == pytest.approx(loss, rel=1e-5)
    assert difference(shared, whole) <= 1e-5


def test_measuring_may_share() -> None:
    net = zoo.build("llama")
    samples = rows()
    rest = prefix.without(samples, 12)
    expected = likelihood.measure(net, samples)
    with prefix.shared(net, BEGINNING[:12]):
        assert likelihood.measure(net, rest) == pytest.approx(expected, rel=1e-5)


def test_the_longest_common_beginning() -> None:
    one, other = sample([1, 2, 3, 4, 5, 6], 2), sample([1, 2, 3, 4, 9, 8, 7], 2)
    assert prefix.common([one, other]) == [1, 2, 3]  # 4 begins what is left of each
    assert prefix.common([one]) == prefix.common([one, one]) == [1, 2, 3]  # the last of the unlearned 4 predicts
    assert prefix.common([sample([1, 2, 3, 4, 5], 1), sample([1, 2, 3, 4, 5, 6, 7], 1)]) == [1, 2, 3][:3]
    assert prefix.common([one, sample([2, 2, 3, 4, 5, 6], 2)]) == []
    assert prefix.common([one, sample([1, 7], 1)]) == []


def test_nothing_that_is_learned_is_shared() -> None:
    one, other = sample([1, 2, 3, 4, 5, 6], 1), sample([1, 2, 3, 4, 5, 7], 1)
    assert prefix.common([one, other]) == [1, 2, 3, 4]
    middle = replace(other, trained=[True, False, False, True, False, True])  # nothing comes before the first
    assert prefix.common([one, middle]) == [1, 2]


def test_beginning_with_it() -> None:
    assert prefix.begin_with(rows(), BEGINNING[:12])
    assert not prefix.begin_with(rows(), [7, *BEGINNING[1:12]])
    assert not prefix.begin_with([sample(BEGINNING[:13], 1)], BEGINNING[:12])  # nothing is left to predict
    assert not prefix.begin_with([sample([*BEGINNING, 5], 2)], BEGINNING[:12])  # the next one is learned


def test_what_is_left_of_a_sample() -> None:
    (rest,) = prefix.without([sample([1, 2, 3, 4, 5, 6], 2)], 3)
    assert (rest.tokens, rest.trained, rest.prompt_length) == ([4, 5, 6], [False, True, True], 1)
    assert rest.trained_count == 2
