"""Strengths of an adapter: each scale's losses are those of that model, and the choice follows a stated rule."""

from pathlib import Path

import pytest

from mlxtune import adapter, likelihood, model
from mlxtune.errors import DataError, InputError
from mlxtune.fidelity import read_text
from mlxtune.fusing.blend import Part
from mlxtune.fusing.strength import Strength, best, sweep
from mlxtune.recipe import LoraRecipe
from tests.learned import SAMPLES, learn

SCALES = (0.5, 1.0, 1.5)


@pytest.fixture(scope="module")
def learned(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return learn(tiny, tmp_path_factory.mktemp("strength") / "learned", LoraRecipe(rank=4), 8, 5e-3)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_each_scale_is_measured_as_that_model(tiny: Path, learned: Path, tmp_path: Path, method: str) -> None:
    folder = learned
    if method == "full":
        folder = learn(tiny, tmp_path / "full", LoraRecipe(method="full"), 2, 1e-3)
    text = tmp_path / "text.txt"
    text.write_text("The keeper of the lighthouse counts the ships that pass. " * 40)
    seen: list[tuple[int, int]] = []
    found = sweep(tiny, [Part(folder)], SAMPLES, str(text), SCALES, lambda done, total: seen.append((done, total)))
    assert [point.scale for point in found.points] == [0.0, *SCALES] and found.rows == 6
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    lm = model.load(tiny)
    windows = read_text(lm, str(text))
    for scale, point in ((0.0, found.points[0]), (1.0, found.points[2])):
        if scale:
            adapter.load(lm, folder)
        assert point.loss == pytest.approx(likelihood.mean_nats(lm.net, SAMPLES), rel=1e-5)
        assert point.anchor_loss == pytest.approx(likelihood.mean_nats(lm.net, windows), rel=1e-5)
    first = found.points[0]
    for point in found.points:
        assert point.gain == first.loss - point.loss
        assert point.forgotten == pytest.approx(point.anchor_loss - first.anchor_loss, abs=1e-9)
    assert found.points[2].gain > 0.1


def test_without_a_text_nothing_is_said_to_be_forgotten(tiny: Path, learned: Path) -> None:
    found = sweep(tiny, [Part(learned)], SAMPLES, None, (1.0,))
    assert {(point.anchor_loss, point.forgotten) for point in found.points} == {(None, None)}
    assert found.to_dict()["chosen"] == found.chosen == 1.0


def point(scale: float, gain: float, forgotten: float | None) -> Strength:
    return Strength(scale=scale, loss=3 - gain, gain=gain, anchor_loss=forgotten, forgotten=forgotten)


@pytest.mark.parametrize(
    ("points", "chosen"),
    [
        ([point(0, 0, None), point(0.5, 1, None), point(1, 0.9, None)], 0.5),
        ([point(0, 0, None), point(1, 0.99, None), point(1.5, 1, None)], 1.5),
        # within 2 % of the largest gain: what forgets least
        ([point(0, 0, 0), point(0.5, 0.985, 0.01), point(1, 1, 0.3)], 0.5),
        ([point(0, 0, 0), point(0.5, 0.97, 0.01), point(1, 1, 0.3)], 1),
        # an adapter that only harms
        ([point(0, 0, 0), point(0.5, -0.1, 0.1), point(1, -0.3, 0.2)], 0),
    ],
)
def test_the_choice_by_hand(points: list[Strength], chosen: float) -> None:
    assert best(points) == chosen


def test_what_has_no_strength(tiny: Path, learned: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        sweep(tiny, [Part(learned)], [])
    assert str(caught.value) == "--sweep-scale: has no rows to measure strengths on; give --data FILE"
    dora = learn(tiny, tmp_path / "dora", LoraRecipe(method="dora", rank=2), 1, 1e-3)
    with pytest.raises(InputError, match="is a DoRA adapter"):
        sweep(tiny, [Part(dora)], SAMPLES)
