"""What is kept of an adapter: figures against float64 NumPy over the supervised tokens, and the share by hand."""

import tempfile
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlxtune import likelihood, model
from mlxtune.data.render import Sample
from mlxtune.fusing import survival
from mlxtune.fusing.survival import compared_rows, kept_share
from tests.learned import SAMPLES

UNEVEN = [Sample(f"{n}", list(range(5, 9 + n)), [False] * 2 + [True] * (2 + n), 2, None) for n in range(12)]


def test_figures_are_those_of_float64(tiny: Path) -> None:
    source, other = model.load(tiny).net, model.load(tiny).net
    other.model.layers[1].mlp.up_proj.weight = other.model.layers[1].mlp.up_proj.weight * 0.5
    with tempfile.TemporaryFile() as file:
        survival.remember(source, UNEVEN, file)
        found = survival.compare(other, UNEVEN, file)
        same = survival.compare(source, UNEVEN, file)
    kl, top = [], []
    for sample in UNEVEN:
        tokens = mx.array([sample.tokens])[:, :-1]
        p, q = (np.array(net(tokens)[0].astype(mx.float32), dtype=np.float64) for net in (source, other))
        p, q = (each - np.log(np.exp(each).sum(axis=-1, keepdims=True)) for each in (p, q))
        trained = np.array(sample.trained)[1:]
        kl += list((np.exp(p) * (p - q)).sum(axis=-1)[trained])
        top += list((p.argmax(axis=-1) == q.argmax(axis=-1))[trained])
    assert found.tokens == len(kl) == sum(sample.trained_count for sample in UNEVEN)
    assert np.mean(kl) > 1e-3
    assert found.kl == pytest.approx(np.mean(kl), rel=1e-4)
    assert found.same_top == pytest.approx(np.mean(top)) and found.same_top < 1
    assert (same.kl, same.same_top) == (pytest.approx(0, abs=1e-9), 1.0)


def test_predictions_that_are_far_apart_have_a_finite_divergence(tiny: Path) -> None:
    """What one model finds all but impossible, e^-100 and less, the other may be sure of."""
    source, other = model.load(tiny).net, model.load(tiny).net
    source.model.norm.weight = source.model.norm.weight * 30
    other.model.norm.weight = other.model.norm.weight * -30
    tokens = mx.array([UNEVEN[-1].tokens])[:, :-1]
    p, q = (np.array(net(tokens)[0], dtype=np.float64) for net in (source, other))
    p, q = (each - each.max(axis=-1, keepdims=True) for each in (p, q))
    p, q = (each - np.log(np.exp(each).sum(axis=-1, keepdims=True)) for each in (p, q))
    assert (q - p).max() > 89  # e^89 is more than float32 holds
    expected = (np.exp(p) * (p - q)).sum(axis=-1)[np.array(UNEVEN[-1].trained)[1:]].mean()
    with tempfile.TemporaryFile() as file:
        survival.remember(source, UNEVEN[-1:], file)
        assert survival.compare(other, UNEVEN[-1:], file).kl == pytest.approx(expected, rel=1e-4)


def test_many_logits_come_in_parts(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = model.load(tiny).net
    with tempfile.TemporaryFile() as file:
        survival.remember(net, UNEVEN, file)
        monkeypatch.setattr(survival, "LOGITS_BYTES", 4 * 1024 * 7)  # seven tokens at once
        with tempfile.TemporaryFile() as parted:
            survival.remember(net, UNEVEN, parted)
            assert survival.compare(net, UNEVEN, parted).kl == pytest.approx(0, abs=1e-6)
            assert parted.tell() == file.tell()


def test_where_predictions_would_not_fit_fewer_rows_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    assert compared_rows(SAMPLES, 1024) == SAMPLES
    monkeypatch.setattr(survival, "FILE_BYTES", 4 * 1024 * 9)  # of 18 supervised tokens
    assert compared_rows(SAMPLES, 1024) == SAMPLES[::2]


def test_the_loss_follows_from_what_is_remembered(tiny: Path) -> None:
    """The same tokens and the same numbers as the loss that is reported beside."""
    net = model.load(tiny).net
    with tempfile.TemporaryFile() as file:
        survival.remember(net, SAMPLES, file)
        file.seek(0)
        logs = np.frombuffer(file.read(), dtype=np.float32).reshape(-1, 1024)
    targets = [token for sample in SAMPLES for token, on in zip(sample.tokens, sample.trained, strict=True) if on]
    mean = -logs[np.arange(len(targets)), targets].mean()  # rows of one length stay in their order
    assert mean == pytest.approx(likelihood.mean_nats(net, SAMPLES), rel=1e-5)


@pytest.mark.parametrize(
    ("base", "tuned", "fused", "kept"),
    [
        (2.0, 1.0, 1.0, 1.0),
        (2.0, 1.0, 1.25, 0.75),
        (2.0, 1.0, 2.0, 0.0),
        (2.0, 1.0, 2.5, -0.5),
        (2.0, 1.0, 0.5, 1.5),
        (0.75, 0.25, 0.5, 0.5),
        (2.0, 2.0, 2.0, None),  # nothing was gained
        (2.0, 3.0, 2.5, None),
        (None, None, None, None),
    ],
)
def test_kept_share_by_hand(base: float | None, tuned: float | None, fused: float | None, kept: float | None) -> None:
    assert kept_share(base, tuned, fused) == kept
