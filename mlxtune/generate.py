"""Tokens in, text out: one answer as a stream, many answers in batches, and a cache that lasts between answers.

Knows a network, its tokenizer and its key-value cache; knows nothing of conversations, data or terminals.
"""

import contextlib
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jinja2
import mlx.core as mx

from mlxtune import beginnings
from mlxtune.borrow import (
    BatchGenerator,
    can_trim_prompt_cache,
    generate_step,
    make_prompt_cache,
    trim_prompt_cache,
)
from mlxtune.errors import InputError, ModelError
from mlxtune.model import LanguageModel

SHORTEST_ANSWER = 16  # tokens: with less room than this in the context, no answer is begun


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """One token of an answer and the text that it completes (often a word, sometimes nothing).

    `token` is the stop token when `finish_reason` is `stop`; it adds no text. `count`: tokens so far, stop token
    included. `prompt_tokens`: tokens fed before the first one. `tokens_per_second` counts from the first token on
    and is 0 there. `peak_memory_gb`: the most that MLX held since the process began, in 10^9 bytes.
    """

    text: str
    token: int
    count: int
    finish_reason: Literal["stop", "length"] | None
    prompt_tokens: int
    prompt_tokens_per_second: float
    tokens_per_second: float
    peak_memory_gb: float

    @property
    def done(self) -> bool:
        """Whether this is the last piece."""
        return self.finish_reason is not None

    @property
    def answer_tokens(self) -> int:
        """Tokens of the answer so far, without the stop token."""
        return self.count - (self.finish_reason == "stop")


class Cache:
    """A network's key-value cache and the tokens that are in it, so that the next prompt feeds only what is new."""

    def __init__(self, lm: LanguageModel):
        self.net = lm.net
        self.clear()

    def clear(self) -> None:
        """Empties the cache."""
        self.layers: list[Any] = make_prompt_cache(self.net)
        self.tokens: list[int] = []

    def begin(self, tokens: Sequence[int]) -> list[int]:
        """Keeps the longest beginning that the cache shares with `tokens` and returns the rest: what is to be fed.

        At least the last token is to be fed: its logits choose the next one. Caches that cannot go back, such as a
        full sliding window or a recurrent state, are emptied instead.
        """
        shared = min(_shared_length(self.tokens, tokens), len(tokens) - 1)
        surplus = len(self.tokens) - shared
        if surplus and (not can_trim_prompt_cache(self.layers) or trim_prompt_cache(self.layers, surplus) != surplus):
            self.clear()
        del self.tokens[shared:]
        return list(tokens[len(self.tokens) :])


def _shared_length(one: Sequence[int], other: Sequence[int]) -> int:
    differs = (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(differs, min(len(one), len(other)))


def no_chat_template(path: Path) -> ModelError:
    """The error for a model that cannot chat."""
    return ModelError("has no chat template", where=path, hint="continue a text with `mlxtune generate` instead")


def prompt_tokens(lm: LanguageModel, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """Tokens of the chat template's rendering of `messages`, up to where the assistant's answer begins.

    Templates that know thinking are asked not to, as in training.

    Raises ModelError if there is no template or it refuses the messages, InputError for text that is no Unicode.
    """
    if not lm.has_chat_template:
        raise no_chat_template(lm.path)
    for message in messages:
        _refuse_broken(message["content"])
    try:
        tokens = lm.tokenizer.apply_chat_template(
            [dict(each) for each in messages], add_generation_prompt=True, enable_thinking=False
        )
    except (jinja2.TemplateError, ValueError, TypeError) as error:
        raise ModelError(f"has a chat template that refuses these messages: {error}", where=lm.path) from None
    return [int(token) for token in tokens]


def text_tokens(lm: LanguageModel, text: str) -> list[int]:
    """Tokens of a plain text to be continued, with the tokenizer's beginning-of-text token where it has one.

    Raises InputError for text that is no Unicode.
    """
    _refuse_broken(text)
    begin = lm.tokenizer.bos_token
    return list(lm.tokenizer.encode(text, add_special_tokens=begin is None or not text.startswith(begin)))


def _refuse_broken(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise InputError("the text holds bytes that are not UTF-8", hint="save or type it as UTF-8") from None


def room(lm: LanguageModel, prompt_length: int, wanted: int, hint: str) -> int:
    """How many of the `wanted` tokens fit into the model's context behind a prompt of `prompt_length` tokens.

    Raises InputError with `hint` when it is less than was wanted and less than 16.
    """
    if lm.context_length is None:
        return wanted
    left = lm.context_length - prompt_length
    if left < min(wanted, SHORTEST_ANSWER):
        raise InputError(
            f"the model's context of {lm.context_length:,} tokens is full: {prompt_length:,} are taken", hint=hint
        )
    return min(wanted, left)


def stream(
    lm: LanguageModel,
    tokens: Sequence[int],
    *,
    max_tokens: int = 256,
    temp: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    cache: Cache | None = None,
) -> Generator[Piece]:
    """Continues `tokens` up to a stop token or `max_tokens`, a piece a token; the last piece has a finish reason.

    Greedy at `temp` 0; else sampled as `sampler` says. With a `cache`, only what is not in it is fed, and it holds
    prompt and answer afterwards, also where the stream is closed early. Raises InputError if `tokens` is empty.
    """
    if not tokens:
        raise InputError("the prompt is empty", hint="give at least one word")
    lm.net.eval()  # no dropout, even between two spells of training
    kept = cache if cache is not None else Cache(lm)
    detokenizer, known = lm.tokenizer.detokenizer, len(lm.tokenizer)
    whole = False  # whether kept.tokens says what is in kept.layers: not so while a step is under way
    try:
        started = time.perf_counter()
        fed = kept.begin(tokens)
        steps = generate_step(
            mx.array(fed),
            lm.net,
            max_tokens=max_tokens,
            sampler=sampler(temp, top_p, seed),
            prompt_cache=kept.layers,
        )
        with contextlib.closing(steps):
            for count, (token, _) in enumerate(steps, start=1):
                if count == 1:
                    first = time.perf_counter()
                    kept.tokens += fed
                kept.tokens.append(token)  # generate_step has fed it already, to compute the next one meanwhile
                finish: Literal["stop", "length"] | None = None
                if token in lm.tokenizer.eos_token_ids:
                    finish = "stop"
                else:
                    finish = "length" if count == max_tokens else None
                    if token < known:  # embeddings are often padded beyond the vocabulary
                        detokenizer.add_token(token)
                if finish:
                    detokenizer.finalize()
                now = time.perf_counter()
                whole = True
                yield Piece(
                    text=detokenizer.last_segment,
                    token=token,
                    count=count,
                    finish_reason=finish,
                    prompt_tokens=len(fed),
                    prompt_tokens_per_second=len(fed) / (first - started),
                    tokens_per_second=(count - 1) / (now - first) if count > 1 else 0.0,
                    peak_memory_gb=mx.get_peak_memory() / 1e9,
                )
                if finish:
                    return
                whole = False
    finally:
        if not whole:
            kept.clear()


def sampler(temp: float, top_p: float, seed: int) -> Callable[[mx.array], mx.array]:
    """Log-probabilities (1, V) -> tokens (1,), drawn from softmax(logprobs / temp) within the nucleus of mass `top_p`.

    Its randomness comes from `seed` alone. mlx-lm's samplers draw from the global state, and on a CPU they call a C++
    compiler for some seconds.
    """
    if temp == 0:
        return lambda logprobs: mx.argmax(logprobs, axis=-1)
    key = mx.random.key(seed)

    def draw(logprobs: mx.array) -> mx.array:
        nonlocal key
        key, now = mx.random.split(key)
        allowed = nucleus(logprobs.astype(mx.float32), top_p) if top_p < 1 else logprobs
        return mx.random.categorical(allowed / temp, key=now)

    return draw


def nucleus(logprobs: mx.array, top_p: float) -> mx.array:
    """Log-probabilities (1, V) with -inf outside the fewest likeliest tokens whose probabilities sum to `top_p`.

    A token stays if the likelier ones sum to less than `top_p`, so the likeliest always does; equals stay together.
    Nucleus sampling: Holtzman et al., "The Curious Case of Neural Text Degeneration", 2020, https://arxiv.org/abs/1904.09751
    """
    ranked = -mx.sort(-mx.exp(logprobs), axis=-1)  # (1, V), likeliest first
    likelier = mx.cumsum(ranked, axis=-1) - ranked
    least = mx.min(mx.where(likelier < top_p, ranked, mx.inf), axis=-1, keepdims=True)
    return mx.where(mx.exp(logprobs) >= least, logprobs, -mx.inf)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A whole answer: its text, its tokens without the stop token, and whether a stop token ended it."""

    text: str
    tokens: int
    finished: bool


def answers(
    lm: LanguageModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int | Sequence[int],
    batch_size: int = 32,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Answer]:
    """Greedy answers to `prompts`, in their order, `batch_size` at a time; special tokens are left out of the text.

    `max_tokens` is for all, or one number each. `on_progress(done, total)` is told of each finished answer.
    What many prompts begin with is computed once. Logits are the same at any batch size but for rounding, so in
    float32 an answer can differ only where the two likeliest tokens are equal to some six digits.
    Raises InputError for an empty prompt.
    """
    limits = [max_tokens] * len(prompts) if isinstance(max_tokens, int) else list(max_tokens)
    empty = next((number for number, prompt in enumerate(prompts, start=1) if not prompt), None)
    if empty is not None:
        raise InputError(f"prompt {empty} is empty", hint="give at least one word")
    lm.net.eval()
    solve = _solve_batched if beginnings.copies_are_exact(lm.net, 0) else _solve_singly
    found: list[tuple[list[int], bool]] = [([], False) for _ in prompts]
    # rows of like length together: little padding, and the longest ones, which need the most memory, first
    order = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))
    solved = solve(lm, [list(prompts[row]) for row in order], [limits[row] for row in order], batch_size)
    for done, (position, tokens, finished) in enumerate(solved, start=1):
        found[order[position]] = tokens, finished
        on_progress(done, len(prompts))
    return [
        Answer(text=lm.tokenizer.decode(tokens, skip_special_tokens=True), tokens=len(tokens), finished=finished)
        for tokens, finished in found
    ]


Solved = Iterator[tuple[int, list[int], bool]]


def _solve_batched(lm: LanguageModel, prompts: list[list[int]], limits: list[int], batch_size: int) -> Solved:
    """Each prompt's position, answer and whether it ended by itself, as they finish.

    A finished row's place is taken by the next prompt.
    """
    if not prompts:
        return
    caches = _begun(lm, prompts)
    batch = BatchGenerator(
        lm.net,
        stop_tokens=[[token] for token in lm.tokenizer.eos_token_ids],
        completion_batch_size=batch_size,
        prefill_batch_size=batch_size,
    )
    with contextlib.closing(batch):
        rest = [prompt[length:] for prompt, (length, _) in zip(prompts, caches, strict=True)]
        inserted = batch.insert(rest, limits, caches=[cache for _, cache in caches])
        positions = {identity: position for position, identity in enumerate(inserted)}
        found: list[list[int]] = [[] for _ in prompts]
        while responses := batch.next_generated():
            for response in responses:
                position = positions[response.uid]
                if response.finish_reason != "stop":
                    found[position].append(response.token)
                if response.finish_reason is not None:
                    yield position, found[position], response.finish_reason == "stop"


def _solve_singly(lm: LanguageModel, prompts: list[list[int]], limits: list[int], _batch_size: int) -> Solved:
    """As `_solve_batched`, for architectures whose caches cannot hold a batch of unequal rows, or do so wrongly."""
    for position, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
        pieces = list(stream(lm, prompt, max_tokens=limit))
        tokens = [piece.token for piece in pieces if piece.finish_reason != "stop"]
        yield position, tokens, pieces[-1].finish_reason == "stop"


def _begun(lm: LanguageModel, prompts: list[list[int]]) -> list[tuple[int, list[Any] | None]]:
    """For each prompt how many of its tokens are in a cache already, and that cache, which is only copied from."""
    lengths = beginnings.shared(prompts)
    if not any(lengths) or not beginnings.copies_are_exact(lm.net, max(lengths)):
        return [(0, None) for _ in prompts]
    made: dict[tuple[int, ...], list[Any]] = {}
    for prompt, length in zip(prompts, lengths, strict=True):
        start = tuple(prompt[:length])
        if start and start not in made:
            made[start] = beginnings.computed(lm.net, start)
    return [(length, made.get(tuple(prompt[:length]))) for prompt, length in zip(prompts, lengths, strict=True)]
