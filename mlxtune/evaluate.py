"""Has a model read and answer every row, and scores it. Knows samples and a model, not data files.

What is written: the predictions, a row a line, and last the scores, which are there if and only if all is.
"""

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlxtune import generate
from mlxtune.data.render import Sample
from mlxtune.errors import DataError
from mlxtune.evaluation import choices, predictions, tally
from mlxtune.evaluation.labelset import LabelSet, label_of
from mlxtune.evaluation.predictions import Prediction
from mlxtune.metrics.exact_match import is_exact
from mlxtune.model import LanguageModel
from mlxtune.recipe import EvaluateRecipe
from mlxtune.report.score import Score
from mlxtune.rundir import refuse_existing, write_json

OnRow = Callable[[str, int, int], None]
__all__ = ["Evaluation", "Prediction", "check", "evaluate", "refuse_impossible", "write"]
check = tally.check


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """The scores over `n` rows, tables of labels (see `tally.tables`), what a row costs, and every prediction.

    `cost`: mean `prompt_tokens` and `answer_tokens` of a row, `seconds_per_row` to answer it (to read it where
    nothing is answered), `peak_memory_gb` of MLX in 10^9 bytes.
    """

    model: str
    adapter: str | None
    n: int
    seconds: float
    scores: list[Score]
    tables: dict[str, Any]
    cost: dict[str, float | None]
    predictions: list[Prediction]

    def to_dict(self) -> dict[str, Any]:
        """All but the predictions, which have a file of their own."""
        return {
            "model": self.model,
            "adapter": self.adapter,
            "n": self.n,
            "seconds": self.seconds,
            "scores": [score.to_dict() for score in self.scores],
            "tables": self.tables,
            "cost": self.cost,
        }


def evaluate(
    lm: LanguageModel,
    samples: Sequence[Sample],
    settings: EvaluateRecipe,
    *,
    label_set: LabelSet | None = None,
    groups: Mapping[str, str] | None = None,
    adapter_path: Path | None = None,
    on_row: OnRow = lambda phase, done, total: None,
) -> Evaluation:
    """Scores `lm` on all `samples`: teacher-forced loss, and greedy answers where the rows have answers.

    With a `label_set` its labels are scored by their probabilities too, and compared where `settings.label` is not
    set. `groups` names the group of a row by its place; intervals are then over groups.
    Raises as `refuse_impossible`, before anything is computed.
    """
    schema = check(settings)
    refuse_impossible(samples, settings, label_set)
    expected = _expected_labels(samples, settings, label_set)
    started = time.monotonic()
    gc.collect()  # what was used before and lies in cycles would count as this model's memory
    mx.reset_peak_memory()
    read = choices.measure(lm.net, samples, settings.batch_size, lambda done: on_row("loss", done, len(samples)))
    between = time.monotonic()
    asked = [row for row, sample in enumerate(samples) if sample.answer is not None]
    given = _answers(lm, samples, asked if tally.needs_answers(settings) else [], settings, on_row)
    answering = time.monotonic() - between
    scored = asked if label_set is not None and tally.needs_labels(settings) else []
    likeliest = _likeliest(lm, samples, scored, label_set, settings.batch_size, on_row)
    made = [
        _prediction(
            lm, sample, float(read.nats[row]), int(read.right[row]), given.get(row), expected.get(row),
            likeliest.get(row), settings.label, (groups or {}).get(sample.where),
        )
        for row, sample in enumerate(samples)
    ]  # fmt: skip
    labels = label_set.labels if label_set is not None else settings.labels
    scores, tables = tally.tally(tally.Rows(made, settings, labels, schema))
    return Evaluation(
        model=str(lm.path),
        adapter=str(adapter_path) if adapter_path is not None else None,
        n=len(samples),
        seconds=time.monotonic() - started,
        scores=scores,
        tables=tables,
        cost={
            "prompt_tokens": _mean([each.prompt_tokens for each in made]),
            "answer_tokens": _mean([each.answer_tokens for each in made]),
            "seconds_per_row": answering / len(given) if given else (between - started) / len(samples),
            "peak_memory_gb": mx.get_peak_memory() / 1e9,
        },
        predictions=made,
    )


def refuse_impossible(samples: Sequence[Sample], settings: EvaluateRecipe, label_set: LabelSet | None = None) -> None:
    """Refuses what no model could be scored by on these rows; needs none.

    Raises DataError if there are no rows, an expected answer lacks the label that `settings.label` asks for, or has
    one that is not among `settings.labels`, and RecipeError for a metric that these rows cannot tell.
    """
    if not samples:
        raise DataError("there are no rows to evaluate", hint="give a file with rows")
    expected = _expected_labels(samples, settings, label_set)
    blank = [
        Prediction(
            where=sample.where, prompt="", expected=sample.answer, answer="" if sample.answer is not None else None,
            loss=0.0, tokens=1, exact=None, right=False if row in expected else None, label_expected=expected.get(row),
            label_probability=0.0 if label_set is not None else None, answer_tokens=0, tokens_right=0,
        )
        for row, sample in enumerate(samples)
    ]  # fmt: skip
    tally.refuse_impossible(tally.Rows(blank, settings))


def _expected_labels(samples: Sequence[Sample], settings: EvaluateRecipe, label_set: LabelSet | None) -> dict[int, str]:
    """The label that each answered row expects, where labels are compared."""
    if settings.label is None and label_set is None and not settings.labels:
        return {}
    found: dict[int, str] = {}
    for row, sample in enumerate(samples):
        if sample.answer is None:
            continue
        label = label_of(sample.answer, settings.label)
        if label is None:
            raise DataError(
                f"the pattern {settings.label!r} finds no label in its answer {sample.answer[:60]!r}",
                where=sample.where,
                hint="change evaluate.label or that row",
            )
        if settings.labels and label not in settings.labels:
            raise DataError(
                f"its label {label[:60]!r} is not among evaluate.labels", where=sample.where, hint="name all labels"
            )
        found[row] = label
    return found


def _answers(
    lm: LanguageModel, samples: Sequence[Sample], asked: list[int], settings: EvaluateRecipe, on_row: OnRow
) -> dict[int, generate.Answer]:
    answers = generate.answers(
        lm,
        [samples[row].tokens[: samples[row].prompt_length] for row in asked],
        max_tokens=settings.max_tokens,
        batch_size=settings.batch_size,
        on_progress=lambda done, total: on_row("answers", done, total),
    )
    return dict(zip(asked, answers, strict=True))


def _likeliest(
    lm: LanguageModel,
    samples: Sequence[Sample],
    asked: list[int],
    label_set: LabelSet | None,
    batch_size: int,
    on_row: OnRow,
) -> dict[int, tuple[str, float]]:
    """The likeliest label of each row and its probability among those of the set."""
    if label_set is None or not asked:
        return {}
    nats = choices.nats(
        lm.net,
        [samples[row].tokens[: samples[row].prompt_length] for row in asked],
        [label_set.tokens] * len(asked),
        batch_size,
        lambda done: on_row("labels", done, len(asked)),
    )
    found = {}
    for row, each in zip(asked, nats, strict=True):
        shares = among(each, label_set.tokens)
        best = int(shares.argmax())
        found[row] = label_set.labels[best], float(shares[best])
    return found


def among(nats: npt.NDArray[np.float64], tokens: Sequence[Sequence[int]]) -> npt.NDArray[np.float64]:
    """Probabilities (C,) of choices among each other, which sum to 1, from their negative log-likelihoods (C,).

    A choice whose `tokens` begin another one's is what is left of its probability when the longer ones are gone:
    an answer that goes on to `card_arrival` is not the answer `card`.
    """
    shares = np.exp(nats.min() - nats)
    begun = {tuple(choice): place for place, choice in enumerate(tokens)}
    for place in sorted(range(len(tokens)), key=lambda place: -len(tokens[place])):  # the longest first
        starts = (begun.get(tuple(tokens[place][:length])) for length in range(len(tokens[place]) - 1, 0, -1))
        shorter = next((start for start in starts if start is not None), None)
        if shorter is not None:
            shares[shorter] -= np.exp(nats.min() - nats[place])
    shares = np.maximum(shares, 0.0)
    return shares / shares.sum()  # type: ignore[no-any-return]


def _prediction(
    lm: LanguageModel,
    sample: Sample,
    nats: float,
    right: int,
    answer: generate.Answer | None,
    expected_label: str | None,
    likeliest: tuple[str, float] | None,
    pattern: str | None,
    group: str | None,
) -> Prediction:
    text = answer.text if answer is not None else None
    label = label_of(text, pattern) if expected_label is not None else None
    return Prediction(
        where=sample.where,
        prompt=lm.tokenizer.decode(sample.tokens[: sample.prompt_length]),
        expected=sample.answer,
        answer=text,
        loss=nats / max(1, sample.trained_count),
        tokens=sample.trained_count,
        exact=is_exact(text, sample.answer) if text is not None and sample.answer is not None else None,
        right=label == expected_label if text is not None and expected_label is not None else None,
        label=label,
        label_expected=expected_label,
        label_scored=likeliest[0] if likeliest is not None else None,
        label_probability=likeliest[1] if likeliest is not None else None,
        prompt_tokens=sample.prompt_length if sample.answer is not None else None,
        answer_tokens=answer.tokens if answer is not None else None,
        tokens_right=right,
        group=group,
    )


def _mean(values: Sequence[int | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def write(evaluation: Evaluation, path: Path, lines: Path) -> None:
    """Writes the predictions to `lines` (JSONL), then the rest to `path` (JSON), which is there only if both are.

    `path` must not exist; `lines` that an interrupted evaluation left are replaced. Raises OutputError, StorageError.
    """
    refuse_existing(path, "file")
    predictions.write(lines, evaluation.predictions)
    write_json(path, evaluation.to_dict())
