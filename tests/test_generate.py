"""Generation: streams against mlx-lm and a plain loop without a cache, batches against single answers, the cache."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlxtune import generate, model
from mlxtune.errors import InputError, ModelError
from mlxtune.model import LanguageModel
from mlxtune.tokenizer import load_tokenizer
from tests import zoo

HELLO = [{"role": "user", "content": "Where is my card?"}]


@pytest.fixture(scope="module")
def lm(tiny: Path) -> LanguageModel:
    return model.load(tiny)


@pytest.fixture(scope="module")
def story(stories: Path) -> LanguageModel:
    return model.load(stories)


def slow_greedy(lm: LanguageModel, tokens: list[int], count: int) -> list[int]:
    """The oracle: the whole sequence through the network for each token, no cache."""
    sequence = list(tokens)
    for _ in range(count):
        sequence.append(int(mx.argmax(lm.net(mx.array([sequence]))[0, -1]).item()))
        if sequence[-1] in lm.tokenizer.eos_token_ids:
            break
    return sequence[len(tokens) :]


def stopping_at(lm: LanguageModel, tokens: set[int]) -> LanguageModel:
    """The same model with other stop tokens."""
    tokenizer = load_tokenizer(lm.path, lm.config)
    tokenizer.eos_token_ids = tokens
    return dataclasses.replace(lm, tokenizer=tokenizer)


def copy_with(source: Path, target: Path, file: str, **values: Any) -> LanguageModel:
    """A copy of a model folder with other values in one of its JSON files."""
    shutil.copytree(source, target)
    (target / file).write_text(json.dumps(json.loads((target / file).read_text()) | values))
    return model.load(target)


class Breaking(nn.Module):
    """A network that is interrupted in the middle of its n-th step, when one layer's cache has grown."""

    def __init__(self, net: nn.Module, step: int):
        super().__init__()
        self.net, self.step, self.layers = net, step, net.layers

    def __call__(self, tokens: mx.array, cache: Any = None) -> mx.array:
        self.step -= 1
        if self.step == 0:
            cache[0].update_and_fetch(*[mx.zeros((1, 1, 1, 64))] * 2)
            raise KeyboardInterrupt
        return self.net(tokens, cache=cache)


# prompts


def test_prompt_tokens_are_the_templates_rendering(lm: LanguageModel) -> None:
    messages = [{"role": "system", "content": "Be kind."}, *HELLO]
    text = (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nWhere is my card?<|im_end|>\n<|im_start|>assistant\n"
    )
    tokens = generate.prompt_tokens(lm, messages)
    assert tokens == lm.tokenizer.encode(text, add_special_tokens=False)
    assert lm.tokenizer.decode(tokens) == text


def test_a_model_without_template_cannot_be_given_messages(story: LanguageModel) -> None:
    with pytest.raises(ModelError, match="has no chat template; continue a text with `mlxtune generate` instead"):
        generate.prompt_tokens(story, HELLO)


def test_a_template_may_refuse(tiny: Path, tmp_path: Path) -> None:
    refusal = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    template = refusal + "{% for message in messages %}{{ message.content }}{% endfor %}"
    lm = copy_with(tiny, tmp_path / "copy", "tokenizer_config.json", chat_template=template)
    assert lm.tokenizer.decode(generate.prompt_tokens(lm, HELLO)) == "Where is my card?"
    with pytest.raises(ModelError, match="has a chat template that refuses these messages: no system role"):
        generate.prompt_tokens(lm, [{"role": "system", "content": "Be kind."}, *HELLO])


def test_text_tokens_begin_with_the_begin_token_once(story: LanguageModel, lm: LanguageModel) -> None:
    assert story.tokenizer.bos_token_id == 1
    plain = generate.text_tokens(story, "Once upon a time")
    assert plain[0] == 1 and plain.count(1) == 1
    assert generate.text_tokens(story, "<s>Once upon a time").count(1) == 1
    assert generate.text_tokens(lm, "card") == lm.tokenizer.encode("card")


def test_text_that_is_no_unicode_is_refused(lm: LanguageModel) -> None:
    with pytest.raises(InputError, match="not UTF-8"):
        generate.text_tokens(lm, "caf\udce9")
    with pytest.raises(InputError, match="not UTF-8"):
        generate.prompt_tokens(lm, [{"role": "user", "content": "caf\udce9"}])


@pytest.mark.parametrize(
    ("prompt_length", "wanted", "allowed"), [(100, 256, 256), (400, 256, 112), (496, 256, 16), (511, 1, 1)]
)
def test_room_in_the_context(lm: LanguageModel, prompt_length: int, wanted: int, allowed: int) -> None:
    assert lm.context_length == 512
    assert generate.room(lm, prompt_length, wanted, "hint") == allowed


@pytest.mark.parametrize(("prompt_length", "wanted"), [(497, 256), (512, 1), (10_000, 256), (510, 3)])
def test_no_room_in_the_context(lm: LanguageModel, prompt_length: int, wanted: int) -> None:
    message = f"the model's context of 512 tokens is full: {prompt_length:,} are taken; write less"
    with pytest.raises(InputError) as caught:
        generate.room(lm, prompt_length, wanted, "write less")
    assert str(caught.value) == message


def test_a_context_of_unknown_length_has_room(lm: LanguageModel) -> None:
    assert generate.room(dataclasses.replace(lm, config={}), 10**6, 256, "hint") == 256


# streams


def test_greedy_text_is_that_of_mlx_lm(story: LanguageModel) -> None:
    from mlx_lm.generate import generate as mlx_lm_generate

    tokens = generate.text_tokens(story, "Once upon a time")
    text = "".join(piece.text for piece in generate.stream(story, tokens, max_tokens=80))
    assert text == mlx_lm_generate(story.net, story.tokenizer, "Once upon a time", max_tokens=80)
    assert len(text) > 150


def test_greedy_tokens_are_those_of_a_plain_loop(lm: LanguageModel) -> None:
    endless = stopping_at(lm, set())
    tokens = generate.prompt_tokens(lm, HELLO)
    pieces = list(generate.stream(endless, tokens, max_tokens=30))
    assert [piece.token for piece in pieces] == slow_greedy(endless, tokens, 30)
    assert [piece.count for piece in pieces] == list(range(1, 31))
    assert [piece.finish_reason for piece in pieces] == [None] * 29 + ["length"]
    assert [piece.done for piece in pieces] == [False] * 29 + [True]
    assert pieces[-1].answer_tokens == 30
    assert {piece.prompt_tokens for piece in pieces} == {len(tokens)}
    assert pieces[0].tokens_per_second == 0 and pieces[-1].tokens_per_second > 0
    assert pieces[-1].prompt_tokens_per_second > 0 and 0 < pieces[-1].peak_memory_gb < 2


def test_the_last_piece_completes_the_text(story: LanguageModel) -> None:
    tokens = generate.text_tokens(story, "Once upon a time")
    for count in (1, 2, 9):
        pieces = list(generate.stream(story, tokens, max_tokens=count))
        assert len(pieces) == count and pieces[-1].finish_reason == "length"
        whole = story.tokenizer.decode(tokens + [piece.token for piece in pieces], skip_special_tokens=True)
        assert "Once upon a time" + "".join(piece.text for piece in pieces) == whole


def test_a_stop_token_ends_the_answer_and_adds_no_text(lm: LanguageModel) -> None:
    tokens = generate.prompt_tokens(lm, HELLO)
    endless = slow_greedy(stopping_at(lm, set()), tokens, 30)
    at = next(i for i, token in enumerate(endless) if i >= 3 and token not in endless[:i])
    pieces = list(generate.stream(stopping_at(lm, {endless[at]}), tokens, max_tokens=30))
    assert [piece.token for piece in pieces] == endless[: at + 1]
    assert pieces[-1].finish_reason == "stop" and pieces[-1].count == at + 1 and pieces[-1].answer_tokens == at
    detokenizer = lm.tokenizer.detokenizer
    for token in endless[:at]:
        detokenizer.add_token(token)
    detokenizer.finalize()
    assert "".join(piece.text for piece in pieces) == detokenizer.text


def test_a_stop_token_at_the_limit_is_a_stop(lm: LanguageModel) -> None:
    tokens = generate.prompt_tokens(lm, HELLO)
    first = slow_greedy(stopping_at(lm, set()), tokens, 1)[0]
    (piece,) = generate.stream(stopping_at(lm, {first}), tokens, max_tokens=1)
    assert (piece.text, piece.finish_reason, piece.answer_tokens) == ("", "stop", 0)


def saying_first(lm: LanguageModel, token: int, folder: Path) -> LanguageModel:
    """A copy of a model that begins its answer to `HELLO` with `token`.

    The token's embedding lies along the last hidden state and is far longer than the others: its logit wins.
    """
    hidden = lm.net.model(mx.array([generate.prompt_tokens(lm, HELLO)]))[0, -1]
    weights = dict(tree_flatten(lm.net.parameters()))
    table = weights["model.embed_tokens.weight"]
    vocabulary = max(table.shape[0], token + 1)
    table = mx.concatenate([table, mx.zeros((vocabulary - table.shape[0], table.shape[1]))])
    table[token] = 1000 * hidden
    weights["model.embed_tokens.weight"] = table
    shutil.copytree(lm.path, folder)
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    (folder / "config.json").write_text(json.dumps(lm.config | {"vocab_size": vocabulary}))
    return model.load(folder)


def test_tokens_beyond_the_vocabulary_have_no_text(lm: LanguageModel, tmp_path: Path) -> None:
    padded = saying_first(lm, 1030, tmp_path / "copy")
    pieces = list(generate.stream(padded, generate.prompt_tokens(lm, HELLO), max_tokens=2))
    assert (pieces[0].token, pieces[0].text) == (1030, "")


def test_half_a_character_at_the_end_is_shown_as_such(lm: LanguageModel, tmp_path: Path) -> None:
    half = lm.tokenizer.convert_tokens_to_ids("Ã")  # how a byte-level tokenizer writes byte C3, as in "é"
    cut = saying_first(lm, half, tmp_path / "copy")
    (piece,) = generate.stream(cut, generate.prompt_tokens(lm, HELLO), max_tokens=1)
    assert (piece.token, piece.text) == (half, "\ufffd")


def test_an_empty_prompt_is_refused(lm: LanguageModel) -> None:
    with pytest.raises(InputError, match="the prompt is empty; give at least one word"):
        next(generate.stream(lm, []))


def test_importing_and_generating_prints_nothing_and_keeps_the_limits(tiny: Path) -> None:
    code = (
        "import resource, sys\n"
        "before = resource.getrlimit(resource.RLIMIT_NOFILE)\n"
        "from mlxtune import generate, model\n"
        "from pathlib import Path\n"
        f"lm = model.load(Path({str(tiny)!r}))\n"
        "list(generate.stream(lm, [1, 5], max_tokens=3))\n"
        "generate.answers(lm, [[1, 5]], max_tokens=3)\n"
        "sys.exit(resource.getrlimit(resource.RLIMIT_NOFILE) != before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# sampling

PROBABILITIES = [0.5, 0.25, 0.15, 0.1]


def logprobs(rows: int = 1) -> mx.array:
    return mx.broadcast_to(mx.log(mx.array(PROBABILITIES)), (rows, 4))


def test_the_same_seed_draws_the_same_answer(lm: LanguageModel) -> None:
    tokens = generate.prompt_tokens(lm, HELLO)

    def answer(seed: int) -> list[int]:
        return [piece.token for piece in generate.stream(lm, tokens, max_tokens=20, temp=1.5, seed=seed)]

    mx.random.seed(7)
    untouched = mx.random.state[0].tolist()
    assert answer(0) == answer(0)
    assert answer(0) != answer(1)
    assert mx.random.state[0].tolist() == untouched


@pytest.mark.parametrize("temp", [0.5, 1.0, 2.0])
def test_draws_follow_the_temperature(temp: float) -> None:
    drawn = np.array(generate.sampler(temp, 1.0, 3)(logprobs(40_000)))
    expected = np.array(PROBABILITIES) ** (1 / temp)
    found = np.bincount(drawn, minlength=4) / drawn.size
    assert np.abs(found - expected / expected.sum()).max() < 0.01  # four standard errors


def test_each_draw_is_a_new_one() -> None:
    draw = generate.sampler(1.0, 1.0, 0)
    assert len({int(draw(logprobs()).item()) for _ in range(60)}) == 4


def test_draws_stay_in_the_nucleus() -> None:
    drawn = np.array(generate.sampler(1.0, 0.7, 0)(logprobs(5_000)))
    assert set(drawn.tolist()) == {0, 1}
    assert abs((drawn == 0).mean() - 2 / 3) < 0.03


@pytest.mark.parametrize(("top_p", "kept"), [(0.01, 1), (0.4, 1), (0.6, 2), (0.8, 3), (0.89, 3), (0.95, 4)])
def test_the_nucleus_worked_by_hand(top_p: float, kept: int) -> None:
    """Sums of the likelier ones: 0, 0.5, 0.75, 0.9."""
    shuffled = logprobs()[:, mx.array([2, 0, 3, 1])]
    found = generate.nucleus(shuffled, top_p)
    expected = [p if p in PROBABILITIES[:kept] else 0.0 for p in (0.15, 0.5, 0.1, 0.25)]
    assert mx.exp(found)[0].tolist() == pytest.approx(expected)


def test_greedy_needs_no_seed() -> None:
    assert generate.sampler(0.0, 0.1, 0)(logprobs()).tolist() == [0]


# the cache


def in_step(cache: generate.Cache) -> bool:
    return all(layer.offset == len(cache.tokens) for layer in cache.layers)


def test_a_cache_holds_prompt_and_answer(lm: LanguageModel) -> None:
    for endings in (set[int](), {2}):
        cache = generate.Cache(lm)
        tokens = generate.prompt_tokens(lm, HELLO)
        pieces = list(generate.stream(stopping_at(lm, endings), tokens, max_tokens=40, cache=cache))
        assert cache.tokens == tokens + [piece.token for piece in pieces]
        assert in_step(cache)


def test_a_cache_feeds_only_what_is_new(lm: LanguageModel) -> None:
    endless, cache = stopping_at(lm, set()), generate.Cache(lm)
    first = list(generate.stream(endless, [1, 50, 60, 70], max_tokens=5, cache=cache))
    assert first[0].prompt_tokens == 4
    longer = [*cache.tokens, 80, 90]  # goes on
    assert [p.prompt_tokens for p in generate.stream(endless, longer, max_tokens=1, cache=cache)] == [2]
    (piece,) = generate.stream(endless, [1, 50, 60, 99, 98], max_tokens=1, cache=cache)  # leaves after three
    assert piece.prompt_tokens == 2 and in_step(cache)
    assert [piece.token] == slow_greedy(endless, [1, 50, 60, 99, 98], 1)
    (again,) = generate.stream(endless, [1, 50, 60, 99, 98], max_tokens=1, cache=cache)  # is all there already
    assert (again.prompt_tokens, again.token) == (1, piece.token)
    assert cache.tokens == [1, 50, 60, 99, 98, piece.token] and in_step(cache)


def test_a_stream_closed_early_leaves_what_was_fed(lm: LanguageModel) -> None:
    endless, cache = stopping_at(lm, set()), generate.Cache(lm)
    stream = generate.stream(endless, [1, 50, 60], max_tokens=50, cache=cache)
    seen = [next(stream).token for _ in range(4)]
    stream.close()
    assert cache.tokens == [1, 50, 60, *seen] and in_step(cache)


@pytest.mark.parametrize("step", [1, 2, 6])
def test_a_stream_interrupted_within_a_step_empties_the_cache(lm: LanguageModel, step: int) -> None:
    broken = dataclasses.replace(stopping_at(lm, set()), net=Breaking(lm.net, step))
    cache = generate.Cache(lm)
    with pytest.raises(KeyboardInterrupt):
        list(generate.stream(broken, [1, 50, 60], max_tokens=50, cache=cache))
    assert cache.tokens == [] and all(layer.empty() for layer in cache.layers)


def test_a_full_sliding_window_starts_anew(tiny: Path, tmp_path: Path) -> None:
    kinds = ["full_attention", "sliding_attention", "sliding_attention"]
    lm = copy_with(tiny, tmp_path / "copy", "config.json", layer_types=kinds, sliding_window=8)
    endless, cache = stopping_at(lm, set()), generate.Cache(lm)
    list(generate.stream(endless, [1, 50, 60, 70], max_tokens=10, cache=cache))
    further = [*cache.tokens, 80]
    (piece,) = generate.stream(endless, further, max_tokens=1, cache=cache)  # onwards it needs no trimming
    assert [piece.token] == slow_greedy(endless, further, 1) and piece.prompt_tokens == 1
    (piece,) = generate.stream(endless, further[:-3], max_tokens=1, cache=cache)  # but it cannot go back
    assert [piece.token] == slow_greedy(endless, further[:-3], 1) and piece.prompt_tokens == len(further) - 3


# many answers


def ragged(count: int) -> list[list[int]]:
    random = np.random.default_rng(0)
    return [[1, *map(int, random.integers(3, 500, random.integers(1, 40)))] for _ in range(count)]


def streamed(lm: LanguageModel, prompt: list[int], limit: int) -> generate.Answer:
    """The answer as a stream gives it."""
    pieces = list(generate.stream(lm, prompt, max_tokens=limit))
    tokens = [piece.token for piece in pieces if piece.finish_reason != "stop"]
    text = lm.tokenizer.decode(tokens, skip_special_tokens=True)
    return generate.Answer(text=text, tokens=len(tokens), finished=pieces[-1].finish_reason == "stop")


@pytest.mark.parametrize("which", ["lm", "story"])
@pytest.mark.parametrize("batch_size", [1, 5])
def test_answers_are_those_given_one_at_a_time(which: str, batch_size: int, request: pytest.FixtureRequest) -> None:
    lm = request.getfixturevalue(which)
    prompts, limits = ragged(9), [1 + 5 * (row % 4) for row in range(9)]
    expected = [streamed(lm, prompt, limit) for prompt, limit in zip(prompts, limits, strict=True)]
    heard: list[tuple[int, int]] = []
    found = generate.answers(
        lm,
        prompts,
        max_tokens=limits,
        batch_size=batch_size,
        on_progress=lambda done, total: heard.append((done, total)),
    )
    assert found == expected
    assert heard == [(done, 9) for done in range(1, 10)]


def test_answers_where_a_cache_holds_no_batch(lm: LanguageModel) -> None:
    prompts = ragged(6)
    singly = sorted(generate._solve_singly(lm, prompts, [9] * 6, 32))
    assert singly == sorted(generate._solve_batched(lm, prompts, [9] * 6, 32))


@pytest.mark.parametrize("name", ["llama", "gemma2", "jamba", "llama4", "plamo3"])
def test_answers_of_other_architectures_are_those_given_one_at_a_time(lm: LanguageModel, name: str) -> None:
    net = zoo.build(name)  # padding changes rows of gemma2 and jamba; a begun cache those of plamo3
    other = dataclasses.replace(stopping_at(lm, set()), net=net, config={})
    random = np.random.default_rng(2)
    begin = random.integers(3, 300, 20).tolist()
    prompts = [[*begin, *random.integers(3, 300, count).tolist()] for count in (1, 6, 3, 2)]
    expected = [streamed(other, prompt, 6) for prompt in prompts]
    assert generate.answers(other, prompts, max_tokens=6) == expected


@pytest.mark.parametrize("which", ["lm", "story"])
def test_answers_are_the_same_at_any_batch_size_and_with_a_shared_beginning_or_without(
    which: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = request.getfixturevalue(which)
    random = np.random.default_rng(1)
    begins = [[1, *random.integers(3, 500, count).tolist()] for count in (90, 40)]
    prompts = [[*begins[row % 3 == 0], *random.integers(3, 500, random.integers(1, 20)).tolist()] for row in range(14)]
    found = [generate.answers(lm, prompts, max_tokens=24, batch_size=size) for size in (1, 3, 14, 32)]
    fed: list[int] = []
    insert = generate.BatchGenerator.insert
    monkeypatch.setattr(
        generate.BatchGenerator,
        "insert",
        lambda batch, rows, *args, **named: fed.extend(map(len, rows)) or insert(batch, rows, *args, **named),
    )
    assert generate.answers(lm, prompts, max_tokens=24, batch_size=4) == found[0]
    assert max(fed) <= 20  # only what is behind the beginnings
    monkeypatch.setattr(generate.beginnings, "LEAST_ROWS", 99)
    found.append(generate.answers(lm, prompts, max_tokens=24, batch_size=7))
    assert max(fed) > 90
    assert all(each == found[0] for each in found)


def test_answers_stop_at_each_stop_token_and_show_no_special_tokens(lm: LanguageModel) -> None:
    prompt = generate.prompt_tokens(lm, HELLO)
    endless = slow_greedy(stopping_at(lm, set()), prompt, 30)
    at = next(i for i, token in enumerate(endless) if i >= 3 and token not in endless[:i])
    expected = lm.tokenizer.decode(endless[:at], skip_special_tokens=True)
    answer = generate.Answer(text=expected, tokens=at, finished=True)
    assert generate.answers(stopping_at(lm, {2, endless[at]}), [prompt] * 2, max_tokens=30) == [answer] * 2
    (answer,) = generate.answers(stopping_at(lm, {9999}), [prompt], max_tokens=80)
    assert "<|im" not in answer.text and "<|endoftext|>" not in answer.text
    assert (answer.tokens, answer.finished) == (80, False)


def test_answers_to_nothing(lm: LanguageModel) -> None:
    assert generate.answers(lm, [], max_tokens=5) == []
    with pytest.raises(InputError, match="prompt 2 is empty"):
        generate.answers(lm, [[1], []], max_tokens=5)
