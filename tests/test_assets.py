"""The embedded base model: what its card promises, and that every block takes part."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlxtune import model
from mlxtune.precision import parameter_count


@pytest.fixture(scope="module")
def lm(tiny: Path) -> model.LanguageModel:
    return model.load(tiny)


def test_small_and_of_whole_quantization_groups(tiny: Path, lm: model.LanguageModel) -> None:
    assert 1_000_000 <= parameter_count(lm.net) <= 1_500_000
    assert (tiny / "model.safetensors").stat().st_size <= 6_000_000
    weights = mx.load(str(tiny / "model.safetensors"))
    assert isinstance(weights, dict)
    assert all(weight.dtype == mx.float32 for weight in weights.values())
    assert all(side % 64 == 0 for weight in weights.values() for side in weight.shape)


def test_the_card_shows_the_figures_of_the_training(tiny: Path, lm: model.LanguageModel) -> None:
    card = (tiny / "README.md").read_text()
    figures = json.loads((tiny / "training.json").read_text())
    last = figures["curve"][-1]
    assert last["step"] == figures["steps"]
    assert f"| {last['step']:,} | {last['train_loss']:.3f} | {last['held_out_loss']:.3f} |" in card
    assert f"{figures['parameters']:,} parameters" in card
    assert figures["parameters"] == parameter_count(lm.net)
    for name, size in figures["corpora_bytes"].items():
        assert f"| {name} |" in card
        assert f"| {size:,} |" in card
    assert (tiny / "training.svg").read_text().startswith("<svg ")


def test_it_learned_english(tiny: Path, lm: model.LanguageModel) -> None:
    """Plain sentences are far likelier than the same words in reverse, and than chance."""

    def nats_per_token(text: str) -> float:
        tokens = lm.tokenizer.encode(text)
        logits = np.array(lm.net(mx.array([tokens])))[0].astype(np.float64)
        logits -= logits.max(-1, keepdims=True)
        chances = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        return -float(np.mean([chances[t, token] for t, token in enumerate(tokens[1:])]))

    for sentence in ("i want to cancel my order", "What is the exchange rate for my card?", "He has 12 apples."):
        backwards = " ".join(reversed(sentence.split()))
        assert nats_per_token(sentence) < 0.8 * nats_per_token(backwards)
        assert nats_per_token(sentence) < 0.6 * np.log(1024)


def test_every_block_attends(lm: model.LanguageModel) -> None:
    """A block whose attention has died would take no part in tuning either."""
    for block in lm.net.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            weight = block.self_attn[name].weight
            assert mx.sqrt(mx.square(weight).mean()).item() > 0.01


def test_the_chat_template_ends_a_turn_with_the_end_token(lm: model.LanguageModel) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    text = lm.tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
    assert lm.tokenizer.eos_token_ids == {lm.tokenizer.convert_tokens_to_ids("<|im_end|>")}
