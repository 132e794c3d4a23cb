"""A step of LoRA, DoRA and rsLoRA against peft with torch, and their gradients against float64 NumPy alone.

`pytest -m interop --log-cli-level=INFO` shows how far apart they are.
"""

import contextlib
import itertools
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest
from mlx.utils import tree_flatten, tree_unflatten

from mlxtune import adapter, model
from mlxtune import train as trainer
from mlxtune.data.batches import Batch, make_batch
from mlxtune.data.render import Sample
from mlxtune.optimizer import learning_rate, make_optimizer, set_rate
from mlxtune.recipe import LoraRecipe, Recipe, TrainRecipe
from tests.gradients import loss_and_gradient

from mlx_lm.models import llama  # isort: skip  # after mlxtune.model, which keeps its import from lowering the limit

Wide = npt.NDArray[np.float64]
METHODS = {
    "lora": LoraRecipe(rank=4, scale=2.0),
    "dora": LoraRecipe(rank=4, scale=2.0, method="dora"),
    "rslora": LoraRecipe(rank=4, scale=2.0, rslora=True),
}
# no weight decay, no clipping, the same rate for every update
OPTIMIZERS = {
    "adamw": TrainRecipe(optimizer="adamw", learning_rate=1e-3, schedule="constant", warmup=0, max_grad_norm=None),
    "sgd": TrainRecipe(optimizer="sgd", learning_rate=1e-2, schedule="constant", warmup=0, max_grad_norm=None),
}
UPDATES = 3
LAYERS = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip


def sample(number: int, length: int, learned: set[int], vocabulary: int) -> Sample:
    """A row of tokens that follow from its number, learned at the places `learned`."""
    tokens = np.random.default_rng(number).integers(3, vocabulary, length).tolist()
    return Sample(f"rows.jsonl:{number}", tokens, [place in learned for place in range(length)], 1, "x")


def ragged(vocabulary: int) -> list[Sample]:
    """Rows of several lengths: an answer at the end, two answers with a gap, a single token, all but the first."""
    return [
        sample(1, 19, set(range(11, 19)), vocabulary),
        sample(2, 31, {4, 5, 6, 20, 21, 22, 23, 30}, vocabulary),
        sample(3, 5, {4}, vocabulary),
        sample(4, 12, set(range(1, 12)), vocabulary),
    ]


def with_factors(lm: model.LanguageModel, lora: LoraRecipe) -> dict[str, mx.array]:
    """Attaches an adapter and moves it off its start, where B is zero and A has no gradient."""
    adapter.attach(lm, lora, seed=0)
    random = np.random.default_rng(0)
    made = {}
    for name, each in adapter.trained(lm.net).items():
        value = np.array(each)
        if name.endswith("lora_b"):
            value = random.normal(0, 0.03, value.shape)
        elif name.endswith(".m"):
            value = value * random.uniform(0.9, 1.1, value.shape)
        made[name] = mx.array(value.astype(np.float32))
    lm.net.load_weights(list(made.items()), strict=False)
    return adapter.trained(lm.net)


def gradient_of(lm: model.LanguageModel, batch: Batch) -> tuple[float, Any]:
    """Loss in nats per token and the gradient tree, by the trainer's own functions."""
    loss, found = loss_and_gradient(lm.net, [batch], int(batch.trained[:, 1:].sum()))
    return loss, tree_unflatten(list(found.items()))


def arrays(tensors: dict[str, mx.array]) -> dict[str, npt.NDArray[np.float32]]:
    return {name: np.array(each) for name, each in tensors.items()}


def difference(one: npt.ArrayLike, other: npt.ArrayLike) -> float:
    """Norm of the difference relative to the norm of `other`."""
    wide = np.asarray(other, dtype=np.float64)
    return float(np.linalg.norm(np.asarray(one, dtype=np.float64) - wide) / np.linalg.norm(wide))


def show(what: str, found: dict[str, float]) -> None:
    """Logs the relative differences."""
    logging.getLogger(__name__).info("%s: %s", what, ", ".join(f"{name} {value:.1e}" for name, value in found.items()))


# --- peft ---


class Peft:
    """The same network and adapter in transformers, torch and peft, in float32."""

    def __init__(self, folder: Path, lora: LoraRecipe):
        self.torch = pytest.importorskip("torch", reason="torch is not installed")
        peft = pytest.importorskip("peft", reason="peft is not installed")
        transformers = pytest.importorskip("transformers")
        base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=self.torch.float32)
        config = peft.LoraConfig(
            r=lora.rank,
            lora_alpha=lora.scale * lora.rank,
            lora_dropout=0.0,
            target_modules=[name.rsplit(".", 1)[-1] for name in LAYERS],
            use_dora=lora.method == "dora",
            use_rslora=lora.rslora,
            task_type="CAUSAL_LM",
        )
        self.net = peft.get_peft_model(base, config)
        self.net.train()
        self.trained = {ours(name): each for name, each in self.net.named_parameters() if each.requires_grad}

    def load(self, tensors: dict[str, mx.array]) -> None:
        assert self.trained.keys() == tensors.keys()
        with self.torch.no_grad():
            for name, each in tensors.items():
                self.trained[name].copy_(self.torch.from_numpy(turned(name, np.array(each))))

    def optimizer(self, train: TrainRecipe) -> Any:
        if train.optimizer == "sgd":
            return self.torch.optim.SGD(self.trained.values(), lr=train.learning_rate)
        return self.torch.optim.AdamW(self.trained.values(), lr=train.learning_rate, weight_decay=0.0)

    def loss(self, batch: Batch, samples: list[Sample]) -> Any:
        """The mean over the labels that transformers computes by itself; -100 marks what is not learned."""
        tokens = self.torch.from_numpy(batch.tokens.astype(np.int64))
        labels = self.torch.where(self.torch.from_numpy(batch.trained), tokens, -100)
        lengths = self.torch.tensor([[len(samples[row].tokens)] for row in batch.rows])
        mask = (self.torch.arange(tokens.shape[1]) < lengths).long()
        return self.net(input_ids=tokens, attention_mask=mask, labels=labels).loss

    def gradients(self) -> dict[str, npt.NDArray[np.float32]]:
        return {name: turned(name, each.grad.numpy().copy()) for name, each in self.trained.items()}

    def tensors(self) -> dict[str, npt.NDArray[np.float32]]:
        return {name: turned(name, each.detach().numpy().copy()) for name, each in self.trained.items()}


def ours(name: str) -> str:
    """Our name of a tensor of peft's."""
    for theirs, mine in (("lora_A", "lora_a"), ("lora_B", "lora_b"), ("lora_magnitude_vector", "m")):
        name = name.replace(f"{theirs}.default.weight", mine)
    return name.removeprefix("base_model.model.")


def turned(name: str, value: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """From our layout of a tensor to peft's, or back: factors are transposed, magnitudes the same."""
    return value if name.endswith(".m") else np.ascontiguousarray(value.T)


@contextlib.contextmanager
def one_torch_thread(torch: Any) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture(params=["tiny", "stories"])
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


@pytest.mark.interop
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("method", METHODS)
def test_a_step_is_that_of_peft(folder: Path, method: str, optimizer: str) -> None:
    """Loss, gradient and new factors of the first update, and the same after three, where Adam's moments count."""
    lora, settings = METHODS[method], OPTIMIZERS[optimizer]
    theirs = Peft(folder, lora)
    lm = model.load(folder)
    theirs.load(with_factors(lm, lora))
    samples = ragged(lm.config["vocab_size"])
    batch = make_batch(samples, [0, 1, 2, 3])
    mine, their_optimizer = make_optimizer(settings), theirs.optimizer(settings)
    mine.init(lm.net.trainable_parameters())
    worst = {"loss": 0.0, "gradient": 0.0, "factors": 0.0, "change": 0.0}
    with one_torch_thread(theirs.torch):
        for update in range(UPDATES):
            before = arrays(adapter.trained(lm.net))
            loss, gradient = gradient_of(lm, batch)
            set_rate(mine, learning_rate(update, UPDATES, settings, settings.learning_rate or 0.0), None)
            mine.update(lm.net, gradient)
            mx.eval(lm.net.trainable_parameters())
            their_optimizer.zero_grad()
            their_loss = theirs.loss(batch, samples)
            their_loss.backward()
            their_before, their_gradients = theirs.tensors(), theirs.gradients()
            their_optimizer.step()
            after, their_after = arrays(adapter.trained(lm.net)), theirs.tensors()
            flat = arrays(dict(tree_flatten(gradient)))
            assert flat.keys() == their_gradients.keys() == after.keys()
            found = {
                "loss": abs(loss - their_loss.item()) / their_loss.item(),
                "gradient": max(difference(flat[name], their_gradients[name]) for name in flat),
                "factors": max(difference(after[name], their_after[name]) for name in flat),
                "change": max(
                    difference(after[name] - before[name], their_after[name] - their_before[name]) for name in flat
                ),
            }
            worst = {name: max(worst[name], found[name]) for name in worst}
    show(f"{folder.name} {method} {optimizer}", worst)
    assert worst["loss"] <= 1e-5
    assert worst["gradient"] <= 1e-4
    # Adam makes as much of a gradient that is all rounding as of a large one
    assert worst["factors"] <= (1e-3 if optimizer == "adamw" else 1e-4)
    assert worst["change"] <= (5e-2 if optimizer == "adamw" else 5e-3)


@pytest.mark.interop
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", METHODS)
def test_a_run_of_one_update_is_that_of_peft(tiny: Path, method: str, tmp_path: Path) -> None:
    """From the verb to the written file: B starts at zero, and the batch goes through accumulation."""
    lora = METHODS[method]
    theirs = Peft(tiny, lora)
    start = model.load(tiny)
    adapter.attach(start, lora, seed=7)
    theirs.load(adapter.trained(start.net))
    lm = model.load(tiny)
    samples = ragged(lm.config["vocab_size"])
    settings = replace(OPTIMIZERS["sgd"], iters=1, batch_size=3, grad_accumulation_steps=2, learning_rate=1.0)
    result = trainer.train(lm, samples, [], Recipe(seed=7, lora=lora, train=settings), tmp_path)
    optimizer = theirs.optimizer(settings)
    loss = theirs.loss(make_batch(samples, [0, 1, 2, 3]), samples)
    loss.backward()
    optimizer.step()
    assert result.last_train_loss == pytest.approx(loss.item(), rel=1e-5)
    written, expected = adapter.read_tensors(tmp_path / "adapter" / adapter.WEIGHTS), theirs.tensors()
    assert written.keys() == expected.keys()
    for name, value in written.items():
        assert difference(np.array(value), expected[name]) <= 1e-4, name


# --- float64 ---


@dataclass(frozen=True, slots=True)
class Reference:
    """A Llama with an adapter in float64 NumPy, written from its formulas. `weights` and `factors` are by name."""

    args: dict[str, Any]
    weights: dict[str, Wide]
    factors: dict[str, Wide]
    scale: float
    norms: dict[str, Wide]  # of DoRA's rows, held constant as the paper does in its gradient

    def linear(self, name: str, x: Wide) -> Wide:
        """y = x Wᵀ + s (x A) B; DoRA: each output times m / ‖row of W + s (A B)ᵀ‖."""
        weight, a, b = self.parts(name)
        y = x @ weight.T + self.scale * (x @ a @ b)
        return y * (self.factors[f"{name}.m"] / self.norms[name]) if name in self.norms else y

    def parts(self, name: str) -> tuple[Wide, Wide, Wide]:
        return self.weights[f"{name}.weight"], self.factors[f"{name}.lora_a"], self.factors[f"{name}.lora_b"]

    def loss(self, samples: list[Sample]) -> float:
        """Nats per supervised token, each row by itself, without padding."""
        nats = 0.0
        for each in samples:
            logs = log_softmax(self.logits(each.tokens[:-1]))
            nats -= sum(logs[t - 1, each.tokens[t]] for t in range(1, len(each.tokens)) if each.trained[t])
        return nats / sum(each.trained_count for each in samples)

    def logits(self, tokens: list[int]) -> Wide:
        """(T,) -> (T, V)"""
        embedding = self.weights["model.embed_tokens.weight"]
        x = embedding[tokens]
        for block in range(self.args["num_hidden_layers"]):
            name = f"model.layers.{block}"
            x = x + self.attention(f"{name}.self_attn", self.normed(f"{name}.input_layernorm", x))
            h = self.normed(f"{name}.post_attention_layernorm", x)
            gate = self.linear(f"{name}.mlp.gate_proj", h)
            up = self.linear(f"{name}.mlp.up_proj", h)
            x = x + self.linear(f"{name}.mlp.down_proj", gate / (1 + np.exp(-gate)) * up)
        return self.normed("model.norm", x) @ embedding.T

    def normed(self, name: str, x: Wide) -> Wide:
        mean_square = (x**2).mean(axis=-1, keepdims=True)
        return x / np.sqrt(mean_square + self.args["rms_norm_eps"]) * self.weights[f"{name}.weight"]

    def attention(self, name: str, x: Wide) -> Wide:
        heads, shared, width = (self.args[key] for key in ("num_attention_heads", "num_key_value_heads", "head_dim"))
        q = rotated(self.heads(f"{name}.q_proj", x, heads, width), self.args["rope_theta"])
        k = rotated(self.heads(f"{name}.k_proj", x, shared, width), self.args["rope_theta"])
        v = self.heads(f"{name}.v_proj", x, shared, width)
        k, v = (np.repeat(each, heads // shared, axis=0) for each in (k, v))
        scores = q @ k.swapaxes(-1, -2) / math.sqrt(width)  # (H, T, T)
        scores = np.where(np.tri(len(x), dtype=bool), scores, -np.inf)
        mixed = np.exp(log_softmax(scores)) @ v
        return self.linear(f"{name}.o_proj", mixed.swapaxes(0, 1).reshape(len(x), heads * width))

    def heads(self, name: str, x: Wide, count: int, width: int) -> Wide:
        """(T, D) -> (H, T, W)"""
        return self.linear(name, x).reshape(len(x), count, width).swapaxes(0, 1)


def log_softmax(x: Wide) -> Wide:
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def rotated(x: Wide, base: float) -> Wide:
    """Rotary positions on (H, T, W): the pair (i, i + W/2) turns by t · base^(-2i/W)."""
    half = x.shape[-1] // 2
    angles = np.arange(x.shape[1])[:, None] * base ** (-np.arange(half) / half)
    first, second = x[..., :half], x[..., half:]
    return np.concatenate(
        [first * np.cos(angles) - second * np.sin(angles), second * np.cos(angles) + first * np.sin(angles)], axis=-1
    )


def reference(lm: model.LanguageModel, lora: LoraRecipe) -> Reference:
    """The reference with the float32 values of `lm` as they are."""
    everything = {name: np.array(each, np.float64) for name, each in tree_flatten(lm.net.parameters())}
    weights = {name.replace(".linear.", "."): each for name, each in everything.items()}
    factors = {name: weights.pop(name) for name in adapter.trained(lm.net)}
    scale = lora.scale * (math.sqrt(lora.rank) if lora.rslora else 1.0)
    made = Reference(lm.config, weights, factors, scale, {})
    if lora.method != "dora":
        return made
    norms = {}
    for name in (each.removesuffix(".m") for each in factors if each.endswith(".m")):
        weight, a, b = made.parts(name)
        norms[name] = np.linalg.norm(weight + scale * (a @ b).T, axis=-1)
    return replace(made, norms=norms)


def slope(made: Reference, direction: dict[str, Wide], samples: list[Sample], step: float = 1e-5) -> float:
    """Central difference of the loss along a `direction` of some factors."""
    ends = []
    for sign in (1, -1):
        moved = {name: made.factors[name] + sign * step * each for name, each in direction.items()}
        ends.append(replace(made, factors=made.factors | moved).loss(samples))
    return (ends[0] - ends[1]) / (2 * step)


@pytest.fixture
def toy() -> model.LanguageModel:
    """One block of random weights, so small that every element of a gradient can be checked."""
    config = {
        "model_type": "llama", "hidden_size": 12, "intermediate_size": 14, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 6, "vocab_size": 23,
        "rms_norm_eps": 1e-5, "rope_theta": 100.0, "tie_word_embeddings": True,
    }  # fmt: skip
    net = llama.Model(llama.ModelArgs.from_dict(config))
    random = np.random.default_rng(5)
    made = [
        (name, mx.array(random.normal(float("norm" in name), 0.4, each.shape).astype(np.float32)))
        for name, each in tree_flatten(net.parameters())
    ]
    net.load_weights(made)
    return model.LanguageModel(net, None, config, Path("toy"))


@pytest.mark.parametrize("method", METHODS)
def test_every_element_of_the_gradient_is_that_of_float64(toy: model.LanguageModel, method: str) -> None:
    lora = replace(METHODS[method], rank=2)
    with_factors(toy, lora)
    samples = ragged(23)
    loss, gradient = gradient_of(toy, make_batch(samples, [0, 1, 2, 3]))
    made = reference(toy, lora)
    assert loss == pytest.approx(made.loss(samples), rel=1e-6)
    flat = arrays(dict(tree_flatten(gradient)))
    assert len(flat) == len(LAYERS) * (3 if method == "dora" else 2)
    worst = 0.0
    for name, found in flat.items():
        expected = np.zeros(found.shape)
        for place in np.ndindex(found.shape):
            one = np.zeros(found.shape)
            one[place] = 1.0
            expected[place] = slope(made, {name: one}, samples)
        worst = max(worst, difference(found, expected))
    show(f"float64 toy {method}", {"loss": abs(loss - made.loss(samples)) / loss, "gradient": worst})
    assert worst <= 1e-5


def test_loss_and_gradient_of_the_embedded_model_are_those_of_float64(tiny: Path) -> None:
    """A whole network: in each block, the slope along the gradient of all A or of all B is the gradient's norm."""
    lm, lora = model.load(tiny), METHODS["lora"]
    with_factors(lm, lora)
    samples = ragged(1024)
    loss, gradient = gradient_of(lm, make_batch(samples, [0, 1, 2, 3]))
    made = reference(lm, lora)
    expected = made.loss(samples)
    worst = 0.0
    flat = {name: np.array(each, np.float64) for name, each in tree_flatten(gradient)}
    for block, factor in itertools.product(range(3), ("lora_a", "lora_b")):
        group = {name: each for name, each in flat.items() if f".{block}." in name and name.endswith(factor)}
        assert len(group) == len(LAYERS)
        norm = math.sqrt(sum(float((each**2).sum()) for each in group.values()))
        found = slope(made, {name: each / norm for name, each in group.items()}, samples, step=1e-4)
        worst = max(worst, abs(found / norm - 1))
    show("float64 tiny lora", {"loss": abs(loss - expected) / expected, "gradient": worst})
    assert loss == pytest.approx(expected, rel=1e-5)
    assert worst <= 1e-5
