"""Tasks of lm-evaluation-harness, an optional package, with a model and its adapter. Knows its LM interface.

The harness makes the prompts and counts; what it asks for is computed here, each prompt once.
"""

import contextlib
import functools
import importlib
import importlib.util
import io
import logging
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mlxtune import generate
from mlxtune.data.render import Sample
from mlxtune.errors import InputError, MlxtuneError, StorageError
from mlxtune.evaluation import choices
from mlxtune.evaluation.multiple_choice import beginning, grouped, pair
from mlxtune.metrics.intervals import Z, share
from mlxtune.model import LanguageModel
from mlxtune.report.score import Score

PACKAGE = "lm_eval"
RESAMPLES = 1000  # for the standard errors of what is no mean
MOST_ANSWER = 256  # tokens of an answer where a task names no number
SHARES = ("acc", "acc_norm", "exact_match")  # means of rows that are right or wrong: Wilson's interval
OnRow = Callable[[str, int, int], None]


def check(tasks: Sequence[str], folder: Path | None = None) -> None:
    """Refuses tasks that the harness does not have, before a model is loaded. Raises InputError."""
    _known(_manager(folder), tasks)


def _known(manager: Any, tasks: Sequence[str]) -> None:
    names = manager.match_tasks(list(tasks))
    for task in tasks:
        if task not in names:
            raise InputError(f"{task!r} is no task of lm-evaluation-harness", hint="see `lm-eval ls tasks`")


def measure(
    lm: LanguageModel,
    tasks: Sequence[str],
    *,
    folder: Path | None = None,
    few_shot: int | None = None,
    limit: int | None = None,
    batch_size: int = 32,
    on_row: OnRow = lambda phase, done, total: None,
) -> list[Score]:
    """The scores of each task, named `task.metric`, over at most `limit` rows; `folder` has further tasks' YAML.

    A task's YAML may run code of its own: `folder` is to be trusted as a script is. Raises InputError where the
    harness is not installed, knows no such task or asks for what is not there, StorageError for data out of reach.
    """
    manager = _manager(folder)
    _known(manager, tasks)
    harness = importlib.import_module(PACKAGE)
    shown = sys.stderr

    def told(phase: str, done: int, total: int) -> None:
        with contextlib.redirect_stderr(shown):
            on_row(phase, done, total)

    adapter = _adapter(lm, batch_size, told)
    try:
        with _quiet():
            found = harness.simple_evaluate(
                model=adapter,
                tasks=list(tasks),
                task_manager=manager,
                num_fewshot=few_shot,
                limit=limit,
                log_samples=False,
                bootstrap_iters=RESAMPLES,
                verbosity=None,
            )
    except MlxtuneError:
        raise
    except (OSError, ConnectionError) as error:
        hint = "its rows come from the hub of Hugging Face; without it use --choices with a file"
        raise StorageError(f"the rows of {', '.join(tasks)} cannot be had: {error}", hint=hint) from None
    return _scores(found)


def _installed() -> None:
    if importlib.util.find_spec(PACKAGE) is None:
        raise InputError("needs lm-evaluation-harness", where="--tasks", hint="pip install 'mlxtune[lm-eval]'")


@functools.lru_cache(maxsize=1)  # it reads some thousand files
def _manager(folder: Path | None) -> Any:
    _installed()
    with _quiet():
        tasks = importlib.import_module(f"{PACKAGE}.tasks")
        return tasks.TaskManager(include_path=str(folder) if folder is not None else None)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Inside, the harness and its libraries write nothing to the terminal; warnings and errors are raised as ever."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)


def _scores(found: Any) -> list[Score]:
    scores = []
    for task, values in found["results"].items():
        n = found["n-samples"].get(task, {}).get("effective", 0)
        for key, value in values.items():
            metric, _, kept = key.partition(",")
            if (
                not kept
                or not n
                or not isinstance(value, int | float)
                or metric.endswith("_stderr")
                or not math.isfinite(value)
            ):
                continue
            higher = found["higher_is_better"].get(task, {}).get(metric, True)
            error = values.get(f"{metric}_stderr,{kept}")
            scores.append(_score(f"{task}.{metric}", metric, float(value), error, n, higher is not False))
    return scores


def _score(name: str, metric: str, value: float, error: Any, n: int, higher: bool) -> Score:
    """Wilson's interval for a share of rows, else the harness's standard error; no width where it has none."""
    right = value * n
    if metric in SHARES and abs(right - round(right)) < 1e-6:
        return share(name, round(right), n)
    wide = Z * float(error) if isinstance(error, int | float) else 0.0
    return Score(
        metric=name, value=value, unit="", ci_low=value - wide, ci_high=value + wide, n=n,
        better="higher" if higher else "lower",
    )  # fmt: skip


def _adapter(lm: LanguageModel, batch_size: int, on_row: OnRow) -> Any:
    """An object of the harness's class LM that computes with `lm`."""
    api = importlib.import_module(f"{PACKAGE}.api.model")
    methods = {
        "loglikelihood": lambda _, requests, **__: loglikelihood(lm, [each.args for each in requests], on_row),
        "loglikelihood_rolling": lambda _, requests, **__: loglikelihood_rolling(
            lm, [each.args[0] for each in requests], batch_size, on_row
        ),
        "generate_until": lambda _, requests, **__: generate_until(
            lm, [each.args for each in requests], batch_size, on_row
        ),
    }
    return type("Mlxtune", (api.LM,), methods)()


def loglikelihood(
    lm: LanguageModel, requests: Sequence[tuple[str, str]], on_row: OnRow = lambda phase, done, total: None
) -> list[tuple[float, bool]]:
    """For each context and continuation the log-probability in nats, and whether greedy decoding would give it."""
    contexts: dict[str, list[int]] = {}
    for number, (context, _) in enumerate(requests):
        contexts.setdefault(context, []).append(number)
    rows = [[pair(lm, *requests[number]) for number in some] for some in contexts.values()]
    read = grouped(lm, rows, lambda done: on_row("choices", done, len(rows)))
    found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
    for some, pairs, each in zip(contexts.values(), rows, read, strict=True):
        for number, (_, continuation), nats, right in zip(some, pairs, each.nats, each.right, strict=True):
            found[number] = -float(nats), int(right) == len(continuation)
    return found


def loglikelihood_rolling(
    lm: LanguageModel,
    texts: Sequence[str],
    batch_size: int = 8,
    on_row: OnRow = lambda phase, done, total: None,
) -> list[float]:
    """The log-probability of each whole text behind the beginning-of-text token, in nats, each token once.

    A text longer than the model's context is read in windows of that length; the last one is full.
    """
    samples: list[Sample] = []
    owners: list[int] = []
    for number, text in enumerate(texts):
        tokens = [beginning(lm), *lm.tokenizer.encode(text, add_special_tokens=False)]
        for sample in windows(tokens, lm.context_length):
            samples.append(sample)
            owners.append(number)
    read = choices.measure(lm.net, samples, batch_size, lambda done: on_row("texts", done, len(samples)))
    sums = [0.0] * len(texts)
    for owner, nats in zip(owners, read.nats, strict=True):
        sums[owner] -= float(nats)
    return sums


def windows(tokens: Sequence[int], context: int | None) -> Iterator[Sample]:
    """Stretches that score each token but the first once, each reading at most `context` tokens."""
    most = context or max(1, len(tokens) - 1)
    scored = 1
    while scored < len(tokens):
        end = min(scored + most, len(tokens))
        start = max(0, end - most - 1)
        trained = [start + place >= scored for place in range(end - start)]
        yield Sample("", list(tokens[start:end]), trained, 0, None)
        scored = end


def generate_until(
    lm: LanguageModel,
    requests: Sequence[tuple[str, dict[str, Any]]],
    batch_size: int = 32,
    on_row: OnRow = lambda phase, done, total: None,
) -> list[str]:
    """Greedy answers, each cut before the first of its task's stop texts.

    Of a context that leaves no room for the answer the left goes. Raises InputError for a task that wants sampling.
    """
    prompts, limits = [], []
    for context, options in requests:
        if options.get("do_sample") and options.get("temperature", 1.0) > 0:
            raise InputError("a task asks for sampled answers", where="--tasks", hint="choose tasks with greedy ones")
        limit = int(options.get("max_gen_toks", options.get("max_new_tokens", MOST_ANSWER)))
        tokens = generate.text_tokens(lm, context) or [beginning(lm)]
        if lm.context_length is not None:
            limit = max(1, min(limit, lm.context_length - 1))
            tokens = tokens[-(lm.context_length - limit) :]
        prompts.append(tokens)
        limits.append(limit)
    answers = generate.answers(
        lm,
        prompts,
        max_tokens=limits,
        batch_size=batch_size,
        on_progress=lambda done, total: on_row("answers", done, total),
    )
    return [_before(each.text, options) for each, (_, options) in zip(answers, requests, strict=True)]


def _before(text: str, options: dict[str, Any]) -> str:
    until = options.get("until") or []
    stops = [until] if isinstance(until, str) else until
    return text[: min([len(text), *(text.index(stop) for stop in stops if stop and stop in text)])]
