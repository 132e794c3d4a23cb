"""Scores a model on every row: loss, perplexity, exact match, accuracy. Knows samples and a model, not data files."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlxtune import generate, likelihood
from mlxtune.data.labels import label_in
from mlxtune.data.render import Sample
from mlxtune.errors import DataError
from mlxtune.metrics.accuracy import accuracy
from mlxtune.metrics.exact_match import exact_match, is_exact
from mlxtune.metrics.loss import loss
from mlxtune.metrics.perplexity import perplexity
from mlxtune.model import LanguageModel
from mlxtune.recipe import EvaluateRecipe
from mlxtune.report.score import Score


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """One row: what was asked, expected and answered, and the loss in nats per supervised token of the expected.

    `exact`: the answer is the expected one; `right`: its label is, where labels are compared.
    """

    where: str
    prompt: str
    expected: str | None
    answer: str | None
    loss: float
    tokens: int
    exact: bool | None
    right: bool | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """The scores over `n` rows, with every prediction."""

    model: str
    adapter: str | None
    n: int
    seconds: float
    scores: list[Score]
    predictions: list[Prediction]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def evaluate(
    lm: LanguageModel,
    samples: Sequence[Sample],
    settings: EvaluateRecipe,
    *,
    adapter_path: Path | None = None,
    on_row: Callable[[str, int, int], None] = lambda phase, done, total: None,
) -> Evaluation:
    """Scores `lm` on all `samples`: teacher-forced loss, and greedy answers where the rows have answers.

    Raises DataError if there are no rows.
    """
    if not samples:
        raise DataError("there are no rows to evaluate", hint="give a file with rows")
    started = time.monotonic()
    nats = likelihood.measure(lm.net, samples, settings.batch_size, lambda done: on_row("loss", done, len(samples)))
    tokens = [sample.trained_count for sample in samples]
    scores = [loss(nats, tokens), perplexity(nats, tokens)]
    asked = [sample for sample in samples if sample.answer is not None]
    answers = generate.answers(
        lm,
        [sample.tokens[: sample.prompt_length] for sample in asked],
        max_tokens=settings.max_tokens,
        batch_size=settings.batch_size,
        on_progress=lambda done, total: on_row("answers", done, total),
    )
    answered = iter(answers)
    given = [next(answered) if sample.answer is not None else None for sample in samples]
    if asked:
        expected = [sample.answer or "" for sample in asked]
        scores.append(exact_match(answers, expected))
        if settings.label is not None:
            scores.append(accuracy(answers, expected, settings.label))
    predictions = [
        _prediction(lm, sample, row_nats, answer, settings.label)
        for sample, row_nats, answer in zip(samples, nats, given, strict=True)
    ]
    return Evaluation(
        model=str(lm.path),
        adapter=str(adapter_path) if adapter_path is not None else None,
        n=len(samples),
        seconds=time.monotonic() - started,
        scores=scores,
        predictions=predictions,
    )


def _prediction(
    lm: LanguageModel, sample: Sample, row_nats: float, answer: str | None, label: str | None
) -> Prediction:
    expected = sample.answer
    return Prediction(
        where=sample.where,
        prompt=lm.tokenizer.decode(sample.tokens[: sample.prompt_length]),
        expected=expected,
        answer=answer,
        loss=row_nats / max(1, sample.trained_count),
        tokens=sample.trained_count,
        exact=is_exact(answer, expected) if answer is not None and expected is not None else None,
        right=_is_right(answer, expected, label),
    )


def _is_right(answer: str | None, expected: str | None, label: str | None) -> bool | None:
    if answer is None or expected is None or label is None:
        return None
    return label_in(answer, label) == label_in(expected, label)
