"""The trainer: exact loss and gradient, every row once, the same adapter from the same seed, safe stops."""

import json
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

from mlxtune import adapter, checkpoint, gradient, likelihood, machine, model
from mlxtune import train as trainer
from mlxtune.data.batches import epoch_order, make_batch
from mlxtune.data.render import Sample
from mlxtune.errors import DataError, Interrupted, MemoryShort, OutputError, TrainingError
from mlxtune.memory import Job, Rows
from mlxtune.noise import noisy_embeddings
from mlxtune.recipe import LoraRecipe, Recipe, TrainRecipe
from mlxtune.train import train
from mlxtune.workers import Workers
from tests.gradients import loss_and_gradient


def sample(number: int, length: int, learned: int) -> Sample:
    """A row of `length` tokens whose last `learned` are supervised; its tokens follow from its number."""
    tokens = [(7 * number + 3 * place) % 900 + 10 for place in range(length)]
    trained = [place >= length - learned for place in range(length)]
    return Sample(f"rows.jsonl:{number + 1}", tokens, trained, length - learned, "x")


SAMPLES = [sample(number, 8 + 5 * (number % 4), 2 + number % 6) for number in range(11)]
UNRELATED = [sample(number, 9 + number % 3, 3) for number in range(20, 25)]
VALID = [sample(number, 9 + number % 3, 3) for number in range(5)]


@pytest.fixture
def load(tiny: Path) -> Callable[[], model.LanguageModel]:
    return lambda: model.load(tiny)


def recipe(lora: LoraRecipe | None = None, seed: int = 3, **settings: Any) -> Recipe:
    defaults = {"iters": 6, "batch_size": 4, "learning_rate": 5e-3}
    return Recipe(seed=seed, lora=lora or LoraRecipe(rank=4), train=TrainRecipe(**(defaults | settings)))


def adapters(out: Path) -> dict[str, np.ndarray]:
    tensors = mx.load(str(out / "adapter" / "adapters.safetensors"))
    assert isinstance(tensors, dict)
    return {name: np.array(value) for name, value in tensors.items()}


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def gradient_of(lm: model.LanguageModel, parts: Sequence[list[int]], pad_multiple: int = 1) -> tuple[float, Any]:
    batches = [make_batch(SAMPLES, part, pad_multiple) for part in parts]
    tokens = sum(SAMPLES[row].trained_count for part in parts for row in part)
    return loss_and_gradient(lm.net, batches, tokens)


def perturbed(lm: model.LanguageModel) -> None:
    """An adapter whose B is not zero, so that both factors have a gradient."""
    adapter.attach(lm, LoraRecipe(rank=4), seed=1)
    mx.random.seed(5)
    noisy = [(n, mx.random.normal(w.shape) * 0.05) for n, w in adapter.trained(lm.net).items() if n.endswith("lora_b")]
    lm.net.load_weights(noisy, strict=False)


def difference(one: Any, other: Any) -> float:
    """Largest difference of two gradients relative to their norm, over all tensors."""
    pairs = zip(tree_flatten(one), tree_flatten(other), strict=True)
    return max(np.linalg.norm(np.array(a) - np.array(b)) / np.linalg.norm(np.array(b)) for (_, a), (_, b) in pairs)


def test_accumulated_gradient_is_that_of_the_one_big_batch(load: Callable[[], model.LanguageModel]) -> None:
    lm = load()
    perturbed(lm)
    loss, whole = gradient_of(lm, [list(range(11))])
    for parts in ([[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]], [[row] for row in range(11)], [[10], list(range(10))]):
        part_loss, accumulated = gradient_of(lm, parts)
        assert part_loss == pytest.approx(loss, rel=1e-5)
        assert difference(accumulated, whole) <= 1e-5


@pytest.mark.parametrize("parts", [2, 3, 16])
def test_the_parts_of_a_batch_add_up_to_its_gradient(
    load: Callable[[], model.LanguageModel], monkeypatch: pytest.MonkeyPatch, parts: int
) -> None:
    """On a CPU each core computes a part of the rows: as many parts as rows where there are more cores."""
    lm = load()
    perturbed(lm)
    monkeypatch.setattr(machine, "batch_parts", lambda device, cores: 1)
    loss, whole = gradient_of(lm, [list(range(11))])
    monkeypatch.setattr(machine, "batch_parts", lambda device, cores: parts)
    part_loss, split = gradient_of(lm, [list(range(11))])
    assert part_loss == pytest.approx(loss, rel=1e-5)
    assert difference(split, whole) <= 1e-5


def test_padding_changes_nothing(load: Callable[[], model.LanguageModel]) -> None:
    lm = load()
    perturbed(lm)
    loss, tight = gradient_of(lm, [[0, 1, 2, 3]])
    wide_loss, wide = gradient_of(lm, [[0, 1, 2, 3]], pad_multiple=64)
    assert wide_loss == pytest.approx(loss, rel=1e-6)
    assert difference(wide, tight) <= 1e-5


def test_only_supervised_tokens_count(load: Callable[[], model.LanguageModel]) -> None:
    lm = load()
    perturbed(lm)
    loss, _ = gradient_of(lm, [[2]])
    batch = make_batch(SAMPLES, [2])
    logits = np.array(lm.net(mx.array(batch.tokens))).astype(np.float64)[0]
    log_probabilities = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
    log_probabilities -= logits.max(-1, keepdims=True)
    supervised = [t for t, on in enumerate(SAMPLES[2].trained) if on]
    nats = [-log_probabilities[t - 1, SAMPLES[2].tokens[t]] for t in supervised]
    assert loss == pytest.approx(float(np.mean(nats)), rel=1e-5)


def test_every_row_is_seen_once_an_epoch_and_no_update_spans_two() -> None:
    settings = recipe(batch_size=3, grad_accumulation_steps=2)
    order = gradient.update_order(SAMPLES, settings)
    epochs = [[next(order) for _ in range(2)] for _ in range(3)]  # 11 rows: 4 batches, 2 updates
    for updates in epochs:
        assert sorted(row for update in updates for batch in update for row in batch) == list(range(11))
    assert epochs[0] != epochs[1]
    again = gradient.update_order(SAMPLES, settings)
    assert [[next(again) for _ in range(2)] for _ in range(3)] == epochs


def test_a_run_leaves_the_best_adapter_and_its_log(load: Callable[[], model.LanguageModel], tmp_path: Path) -> None:
    lm = load()
    seen: list[tuple[int, int]] = []
    result = train(
        lm,
        SAMPLES,
        VALID,
        recipe(eval_every=2, report_every=1),
        tmp_path,
        on_step=lambda s, n: seen.append((s.step, n)),
    )
    assert {file.name for file in tmp_path.iterdir()} == {"adapter", "log.jsonl"}
    names = {"adapters.safetensors", "adapter_config.json", "training.json"}
    assert {file.name for file in (tmp_path / "adapter").iterdir()} == names
    assert seen == [(step, 6) for step in range(1, 7)]
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    losses = {line["step"]: line["valid_loss"] for line in lines if line["valid_loss"] is not None}
    assert set(losses) == {2, 4, 6}
    best = min(losses, key=lambda step: losses[step])
    assert (result.best_step, result.best_valid_loss) == (best, losses[best])
    assert likelihood.mean_nats(lm.net, VALID, 4) == losses[best]  # the network carries the best adapter
    reloaded = load()
    adapter.load(reloaded, tmp_path / "adapter")
    assert likelihood.mean_nats(reloaded.net, VALID, 4) == losses[best]
    assert result.first_valid_loss is not None
    assert losses[best] < result.first_valid_loss


def test_the_best_adapter_is_kept_when_training_goes_wrong(
    load: Callable[[], model.LanguageModel], tmp_path: Path
) -> None:
    """With a far too high learning rate every update hurts: the untouched adapter is the best."""
    result = train(load(), SAMPLES, UNRELATED, recipe(learning_rate=100.0, warmup=0, eval_every=1), tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert result.best_valid_loss is not None
    assert all(line["valid_loss"] >= result.best_valid_loss for line in lines)
    assert result.best_step == 0
    assert all(not value.any() for name, value in adapters(tmp_path).items() if name.endswith("lora_b"))


def test_the_same_seed_gives_the_same_adapter(load: Callable[[], model.LanguageModel], tmp_path: Path) -> None:
    settings = recipe(LoraRecipe(rank=4, dropout=0.2))
    for name in ("one", "two"):
        train(load(), SAMPLES, VALID, settings, tmp_path / name)
    train(load(), SAMPLES, VALID, replace(settings, seed=4), tmp_path / "other")
    one, two, other = (adapters(tmp_path / name) for name in ("one", "two", "other"))
    assert same(one, two)
    assert not same(one, other)


def test_nan_stops_with_the_last_good_adapter(
    load: Callable[[], model.LanguageModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = likelihood.row_nats
    calls = 0

    def poisoned(*args: Any, **kwargs: Any) -> mx.array:
        nonlocal calls
        calls += 1
        return real(*args, **kwargs) * (float("nan") if calls == 4 else 1.0)

    monkeypatch.setattr(trainer.likelihood, "row_nats", poisoned)
    monkeypatch.setattr(machine, "batch_parts", lambda device, cores: 1)  # so that each update is one call
    lm = load()
    with pytest.raises(TrainingError, match=r"not finite .* update 4, rows rows.jsonl:\d+") as stopped:
        train(lm, SAMPLES, [], recipe(), tmp_path)
    assert stopped.value.exit_code == 1
    assert not (tmp_path / "adapter").exists()
    found, _ = checkpoint.newest(tmp_path / "checkpoints")
    assert found is not None
    assert found.step == 3
    kept = load()
    adapter.load(kept, tmp_path / "checkpoints" / "step-0000003")  # any command can use it
    assert np.isfinite(likelihood.mean_nats(kept.net, VALID))
    assert all(np.isfinite(np.array(value)).all() for value in found.arrays["adapters"].values())


def test_the_last_good_adapter_is_the_one_before_the_update_that_broke_it(
    load: Callable[[], model.LanguageModel], tmp_path: Path
) -> None:
    settings = recipe(learning_rate=1e25, schedule="constant", warmup=0)
    with pytest.raises(TrainingError, match="not finite"):
        train(load(), SAMPLES, [], settings, tmp_path)
    kept = load()
    (folder,) = (tmp_path / "checkpoints").iterdir()
    adapter.load(kept, folder)
    assert likelihood.mean_nats(kept.net, VALID) == pytest.approx(likelihood.mean_nats(load().net, VALID), rel=1e-5)


def test_a_validation_loss_that_is_not_finite_stops_with_the_best_adapter(
    load: Callable[[], model.LanguageModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = likelihood.mean_nats
    losses: list[float] = []

    def third_is_infinite(net: nn.Module, samples: Sequence[Sample], batch_size: int, workers: Workers) -> float:
        losses.append(real(net, samples, batch_size, workers) if len(losses) < 2 else float("inf"))
        return losses[-1]

    monkeypatch.setattr(trainer.likelihood, "mean_nats", third_is_infinite)
    with pytest.raises(TrainingError, match="validation loss is inf after update 2; the best adapter so far"):
        train(load(), SAMPLES, VALID, recipe(eval_every=1), tmp_path)
    assert not (tmp_path / "adapter").exists()
    kept = load()
    adapter.load(kept, tmp_path / "checkpoints" / "step-0000002")
    assert real(kept.net, VALID, 4) == pytest.approx(min(losses[:2]), rel=1e-6)


def test_an_infinite_adapter_is_never_written(load: Callable[[], model.LanguageModel], tmp_path: Path) -> None:
    settings = recipe(iters=1, learning_rate=1e39, warmup=0, max_grad_norm=None, optimizer="sgd")
    with pytest.raises(TrainingError, match="made the adapter infinite"):
        train(load(), SAMPLES, [], settings, tmp_path)
    assert not (tmp_path / "adapter").exists()


def test_refused_before_anything_is_written(load: Callable[[], model.LanguageModel], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no rows to train on"):
        train(load(), [], VALID, recipe(), tmp_path)
    bare = replace(SAMPLES[3], trained=[True] + [False] * (len(SAMPLES[3].tokens) - 1))
    with pytest.raises(DataError, match=r"rows.jsonl:4: has no token to learn"):
        train(load(), [SAMPLES[0], bare], VALID, recipe(), tmp_path)
    (tmp_path / "adapter").mkdir()
    with pytest.raises(OutputError, match="exists already"):
        train(load(), SAMPLES, VALID, recipe(), tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"adapter"}


def test_checkpoints_of_another_shape_are_refused(load: Callable[[], model.LanguageModel], tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        train(load(), SAMPLES, VALID, recipe(), tmp_path, stop=lambda: signal.SIGINT)
    with pytest.raises(OutputError, match="another recipe"):
        train(load(), SAMPLES, VALID, recipe(LoraRecipe(rank=8)), tmp_path)


def test_a_batch_that_fits_is_chosen_once(
    load: Callable[[], model.LanguageModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_hand = recipe(batch_size=2, grad_accumulation_steps=2)
    train(load(), SAMPLES, VALID, by_hand, tmp_path / "by hand")
    lm = load()
    needed = Job.here(lm.net, lm.config, Rows.of([*SAMPLES, *VALID])).peak(by_hand).training
    monkeypatch.setattr(machine, "usable_here", lambda: needed)
    wanted, out = recipe(batch_size=4, fit_batch=True), tmp_path / "auto"
    with pytest.raises(Interrupted):
        train(lm, SAMPLES, VALID, wanted, out, stop=lambda: signal.SIGINT)
    monkeypatch.setattr(machine, "usable_here", lambda: 10**9)  # it goes on as it began
    result = train(load(), SAMPLES, VALID, wanted, out)
    assert (result.batch_size, result.grad_accumulation_steps, result.resumed_at) == (2, 2, 1)
    assert same(adapters(out), adapters(tmp_path / "by hand"))
    assert train(load(), SAMPLES, VALID, wanted, tmp_path / "more").batch_size == 4


def test_what_cannot_fit_is_refused_at_once(
    load: Callable[[], model.LanguageModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "usable_here", lambda: 10**6)
    with pytest.raises(MemoryShort, match="training takes about .* MB of memory, and has 1.0 MB"):
        train(load(), SAMPLES, VALID, recipe(), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_without_validation_rows_the_last_adapter_is_kept(
    load: Callable[[], model.LanguageModel], tmp_path: Path
) -> None:
    result = train(load(), SAMPLES, [], recipe(), tmp_path)
    assert (result.best_step, result.best_valid_loss) == (6, None)


def test_gradient_checkpointing_changes_no_gradient(load: Callable[[], model.LanguageModel], tmp_path: Path) -> None:
    train(load(), SAMPLES, VALID, recipe(), tmp_path / "plain")
    train(load(), SAMPLES, VALID, recipe(grad_checkpoint=True), tmp_path / "saving")
    plain, saving = adapters(tmp_path / "plain"), adapters(tmp_path / "saving")
    assert all(np.allclose(plain[name], saving[name], atol=1e-5) for name in plain)


@pytest.mark.skipif(machine.facts().compiler is None, reason="needs a C++ compiler, as mx.compile on a CPU does")
@pytest.mark.parametrize(("dropout", "pad_multiple"), [(0.1, 1), (0.0, 32)])
def test_compiled_training_gives_the_same_adapter(
    load: Callable[[], model.LanguageModel],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    dropout: float,
    pad_multiple: int,
) -> None:
    """What Metal and CUDA do, on this device."""
    settings = recipe(
        LoraRecipe(rank=4, dropout=dropout), eval_every=2, grad_accumulation_steps=2, grad_checkpoint=dropout == 0
    )
    monkeypatch.setattr(machine, "batch_parts", lambda device, cores: 1)  # a GPU computes a batch as one
    train(load(), SAMPLES, VALID, settings, tmp_path / "plain")
    policy = trainer.machine.compute_policy(device="metal", memory_bytes=1, float32_bytes=1, blas="")
    assert policy.compile
    # dropout draws by shape, so it can only be compared without padding
    policy = replace(policy, pad_multiple=pad_multiple)
    monkeypatch.setattr(trainer.machine, "compute_policy", lambda **_: policy)
    lm = load()
    mx.enable_compile()
    try:
        train(lm, SAMPLES, VALID, settings, tmp_path / "compiled")
    finally:
        mx.disable_compile()
    plain, compiled = adapters(tmp_path / "plain"), adapters(tmp_path / "compiled")
    assert all(np.allclose(plain[name], compiled[name], atol=1e-4) for name in plain)


def test_neftune_is_noise_of_the_right_size_and_leaves_nothing(load: Callable[[], model.LanguageModel]) -> None:
    net = load().net
    tokens = mx.array([[5, 6, 7, 8]])
    plain = net.model.embed_tokens(tokens)
    mx.random.seed(0)
    with noisy_embeddings(net, 5.0):
        noise = np.array(net.model.embed_tokens(tokens) - plain)
    bound = 5.0 / np.sqrt(4 * 192)
    assert 0.9 * bound < np.abs(noise).max() <= bound * (1 + 1e-4)
    assert abs(noise.mean()) < bound / 10
    assert mx.array_equal(net.model.embed_tokens(tokens), plain).item()
    assert type(net.model.embed_tokens) is nn.Embedding


def test_training_with_noise_differs_and_validates_without(
    load: Callable[[], model.LanguageModel], tmp_path: Path
) -> None:
    results = [
        train(load(), SAMPLES, VALID, recipe(neftune=strength), tmp_path / str(strength)) for strength in (None, 5.0)
    ]
    assert results[0].first_valid_loss == results[1].first_valid_loss
    assert not same(adapters(tmp_path / "None"), adapters(tmp_path / "5.0"))


def test_patience_ends_a_run_that_no_longer_gets_better(
    load: Callable[[], model.LanguageModel], tmp_path: Path
) -> None:
    wanted = recipe(iters=40, eval_every=1, patience=3, learning_rate=3e-2, schedule="constant", warmup=0)
    result = train(load(), SAMPLES, UNRELATED, wanted, tmp_path)
    assert result.stopped_early
    assert result.steps < 40
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    losses = [result.first_valid_loss, *(line["valid_loss"] for line in lines)]
    assert result.best_valid_loss == min(losses)
    assert len(losses) - 1 - losses.index(min(losses)) == 3
    # a smaller gain than min_delta does not begin the patience anew
    short = train(load(), SAMPLES, VALID, recipe(iters=9, eval_every=1, patience=2, min_delta=9.0), tmp_path / "short")
    assert (short.steps, short.stopped_early) == (2, True)


def test_the_best_adapter_keeps_the_forgetting_budget(load: Callable[[], model.LanguageModel], tmp_path: Path) -> None:
    settings: dict[str, Any] = {"iters": 8, "eval_every": 1, "learning_rate": 2e-2, "schedule": "constant", "warmup": 0}
    free = train(load(), SAMPLES, VALID, recipe(**settings, forget_budget=1e9), tmp_path / "free", anchor=UNRELATED)
    tight = train(load(), SAMPLES, VALID, recipe(**settings, forget_budget=0.05), tmp_path / "tight", anchor=UNRELATED)
    assert free.first_anchor_loss == pytest.approx(likelihood.mean_nats(load().net, UNRELATED), rel=1e-5)
    assert free.anchor_loss is not None and tight.anchor_loss is not None and free.first_anchor_loss is not None
    lines = [json.loads(line) for line in (tmp_path / "free" / "log.jsonl").read_text().splitlines()]
    rises = {line["step"]: line["anchor_loss"] - free.first_anchor_loss for line in lines}
    assert max(rises.values()) > 0.05  # else this shows nothing
    within = [line for line in lines if rises[line["step"]] <= 0.05]
    best = min([(free.first_valid_loss, 0), *((line["valid_loss"], line["step"]) for line in within)])
    assert (tight.best_valid_loss, tight.best_step) == best
    assert tight.anchor_loss <= free.first_anchor_loss + 0.05
    assert (free.best_valid_loss, free.best_step) == min((line["valid_loss"], line["step"]) for line in lines)


def test_a_loss_that_stays_far_above_its_start_is_warned_of_once(
    load: Callable[[], model.LanguageModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    factors = [1.0, 3.0, 3.0, 1.0, *[3.0] * 41]  # two high ones are no divergence; the next 20 in a row are

    real = gradient.token_weighted

    def high(*args: Any) -> tuple[float, Any]:
        _, found = real(*args)
        return 4.0 * factors.pop(0), tree_map(lambda each: each * 0, found)

    monkeypatch.setattr(gradient, "token_weighted", high)
    warnings: list[tuple[int, str]] = []
    train(
        load(), SAMPLES, [], recipe(iters=45), tmp_path, on_warning=lambda text: warnings.append((len(factors), text))
    )
    assert warnings == [
        (
            45 - 24,
            "the loss has been above 2 times its start (4.000) for 20 updates, now 12.000: lower train.learning_rate",
        )
    ]


def test_the_first_validation_row_is_answered_as_it_learns(
    load: Callable[[], model.LanguageModel], tmp_path: Path
) -> None:
    seen: list[str | None] = []
    train(load(), SAMPLES, VALID, recipe(eval_every=3), tmp_path, on_step=lambda log, n: seen.append(log.answer))
    assert [answer is not None for answer in seen] == [False, False, True, False, False, True]
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line.get("answer") for line in lines] == [seen[2], seen[5]]


def test_every_row_is_seen_once_for_any_size_and_batch() -> None:
    for rows in range(1, 51):
        for batch_size in range(1, 10):
            batches = epoch_order([7] * rows, batch_size, seed=1, epoch=2)
            assert sorted(row for batch in batches for row in batch) == list(range(rows))
            assert len(batches) == -(-rows // batch_size)


PACKINGS = [
    *(("affine", bits, 64) for bits in (2, 3, 4, 5, 6, 8)),
    ("mxfp4", 4, 32),
    ("nvfp4", 4, 16),
    ("mxfp8", 8, 32),
]


@pytest.mark.parametrize(
    ("method", "mode", "bits", "group_size"),
    [*(("lora", *each) for each in PACKINGS), ("dora", "affine", 3, 64), ("dora", "nvfp4", 4, 16)],
)
def test_adapters_learn_on_packed_layers(
    tiny: Path, tmp_path: Path, method: str, mode: str, bits: int, group_size: int
) -> None:
    """As a GPU holds them: the gradient flows through the packed layers, and the loss falls."""
    lm = model.load(tiny, stored=True)
    nn.quantize(lm.net, group_size, bits, mode=mode)
    result = train(lm, SAMPLES[:4], SAMPLES[:4], recipe(LoraRecipe(method=method, rank=4), iters=2), tmp_path)
    assert result.best_valid_loss is not None and result.first_valid_loss is not None
    assert result.best_valid_loss < result.first_valid_loss - 0.01
