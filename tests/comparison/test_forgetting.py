"""Forgetting against `metrics/divergence`, which holds both networks at once, and against losses token by token."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlxtune import likelihood, model
from mlxtune.comparison import forgetting
from mlxtune.comparison.forgetting import Window
from mlxtune.data.render import Sample
from mlxtune.errors import DataError
from mlxtune.metrics import divergence
from mlxtune.recipe import LoraRecipe
from tests.learned import learn, with_adapter


def samples(*lengths: int) -> list[Sample]:
    draw = np.random.default_rng(5)
    return [
        Sample(f"a:{row}", draw.integers(3, 1000, length).tolist(), [False] + [True] * (length - 1), 0, None)
        for row, length in enumerate(lengths)
    ]


@pytest.fixture(scope="module")
def adapter_folder(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return learn(tiny, tmp_path_factory.mktemp("forgetting") / "adapter", LoraRecipe(rank=4, scale=4.0), 4, 1e-2)


def test_against_both_networks_at_once(tiny: Path, adapter_folder: Path) -> None:
    text = samples(40, 7, 23, 2)
    base, tuned = model.load(tiny), with_adapter(tiny, adapter_folder)
    told: list[int] = []
    before = forgetting.remember(base.net, text, told.append)
    windows = forgetting.measure(before, tuned.net, told.append)
    found = forgetting.summed_up(windows)
    assert [(each.tokens, each.positions) for each in windows] == [(39, 39), (6, 6), (22, 22), (1, 1)]
    wanted = divergence.measure(base.net, tuned.net, text)
    assert wanted.kl_mean > 0.01
    assert found["kl"] == pytest.approx(wanted.kl_mean, rel=1e-4)
    assert found["kl_error"] == pytest.approx(wanted.kl_error, rel=1e-4)
    assert found["tokens"] == 39 + 6 + 22 + 1
    assert found["base_loss"] == pytest.approx(float(np.log(wanted.perplexity_source)), rel=1e-5)
    assert found["tuned_loss"] == pytest.approx(float(np.log(wanted.perplexity)), rel=1e-5)
    assert told == [1, 2, 3, 4] * 2


def test_few_positions_are_kept_of_a_long_text(tiny: Path, adapter_folder: Path) -> None:
    """With room for two of 39 positions, every twentieth: the first and the twenty-first."""
    text = samples(40)
    base, tuned = model.load(tiny).net, with_adapter(tiny, adapter_folder).net
    before = forgetting.remember(base, text, most_bytes=2 * 4 * 1024)
    assert before.kept[0][1] == 2
    found = forgetting.summed_up(forgetting.measure(before, tuned))
    kl = divergence.positions(base, tuned, text).kl
    assert found["kl"] == pytest.approx(float(kl[[0, 20]].mean()), rel=1e-4)
    assert found["kl_error"] is None


def test_the_base_forgets_nothing_of_itself(tiny: Path) -> None:
    net = model.load(tiny).net
    found = forgetting.summed_up(forgetting.measure(forgetting.remember(net, samples(9, 30)), net))
    assert found["kl"] == pytest.approx(0, abs=1e-6)
    assert found["tuned_loss"] == found["base_loss"]


def test_the_anchor(tiny: Path, tmp_path: Path) -> None:
    lm = model.load(tiny)
    name, text = forgetting.anchor_samples(lm, None, "somewhere.jsonl", 0)
    assert (name, len(text)) == ("tickets", 64)
    file = tmp_path / "mine.txt"
    file.write_text("Once upon a time there was a lamp. " * 20)
    name, text = forgetting.anchor_samples(lm, str(file), "tickets", 0)
    assert name == str(file)
    assert lm.tokenizer.decode(text[0].tokens).startswith("Once upon a time there was a lamp.")


def test_who_was_tuned_on_the_embedded_text_is_asked_about_its_own(tiny: Path) -> None:
    """What the base writes has a loss near the base's own entropy there, not that of random tokens."""
    lm = model.load(tiny)
    name, text = forgetting.anchor_samples(lm, None, "tickets", 3)
    assert (name, len(text), {len(each.tokens) for each in text}) == ("own text", 32, {128})
    again = forgetting.anchor_samples(lm, None, "tickets", 3)[1]
    assert [each.tokens for each in again] == [each.tokens for each in text]
    logits = lm.net(mx.array([each.tokens for each in text]))[:, :-1].astype(mx.float32)
    rates = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    entropy = -(mx.exp(rates) * rates).sum(axis=-1).mean().item()
    assert likelihood.mean_nats(lm.net, text) == pytest.approx(entropy, rel=0.05)


def test_an_anchor_without_two_tokens(tiny: Path) -> None:
    with pytest.raises(DataError, match="no two tokens"):
        forgetting.remember(model.load(tiny).net, samples(1))


def test_windows_by_hand() -> None:
    """Of 2 and 8 tokens: KL (2 · 0.5 + 4 · 0.2) / 6, whose windows are 2 · 0.2 and -4 · 0.1 off it."""
    windows = [
        Window(tokens=2, base_nats=3.0, tuned_nats=4.0, kl=0.5, positions=2),
        Window(tokens=8, base_nats=7.0, tuned_nats=11.0, kl=0.2, positions=4),
    ]
    found = forgetting.summed_up(windows)
    assert (found["tokens"], found["base_loss"], found["tuned_loss"]) == (10, 1.0, 1.5)
    assert found["kl"] == pytest.approx(0.3)
    assert found["kl_error"] == pytest.approx(np.sqrt(2 * (0.4**2 + 0.4**2)) / 6)
    assert forgetting.summed_up(windows[:1])["kl_error"] is None


@pytest.mark.parametrize("odd", [{"tokens": 0}, {"positions": 0}])
def test_windows_without_tokens(odd: dict[str, int]) -> None:
    usual = {"tokens": 2, "base_nats": 3.0, "tuned_nats": 4.0, "kl": 0.5, "positions": 2}
    with pytest.raises(DataError, match="has no token"):
        forgetting.summed_up([Window(**{**usual, **odd})])  # type: ignore[arg-type]
    with pytest.raises(DataError, match="has no token"):
        forgetting.summed_up([])
