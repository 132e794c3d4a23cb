"""The scores and tables of an evaluation, from its predictions alone. Knows which metric suits which answers.

To add a metric: a line in `METRICS`. A metric that the predictions cannot tell is not possible for them.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mlxtune.data.labels import MOST_ANSWERS
from mlxtune.errors import InputError, RecipeError
from mlxtune.evaluation.predictions import Prediction, groups_of
from mlxtune.metrics.answer_length import answer_length, answer_length_median
from mlxtune.metrics.calibration import calibration, ece
from mlxtune.metrics.chrf import chrf
from mlxtune.metrics.confusion import confusion
from mlxtune.metrics.coverage import coverage
from mlxtune.metrics.exact_match import exact_match, exact_match_normalized
from mlxtune.metrics.f1 import macro_f1, per_class
from mlxtune.metrics.intervals import mean_share
from mlxtune.metrics.json_schema import conformer, json_schema
from mlxtune.metrics.json_valid import json_valid
from mlxtune.metrics.label_accuracy import label_accuracy, outside_labels
from mlxtune.metrics.loss import loss
from mlxtune.metrics.pattern import compiled, pattern
from mlxtune.metrics.perplexity import perplexity
from mlxtune.metrics.refusals import refusals
from mlxtune.metrics.rouge_l import rouge_l
from mlxtune.metrics.token_accuracy import token_accuracy
from mlxtune.recipe import EvaluateRecipe
from mlxtune.report.score import Score

AUTO = "auto"
ALWAYS = ("loss", "perplexity")  # what reports and comparisons stand on


@dataclass(frozen=True)
class Rows:
    """Predictions with what they are scored by: settings, the set of labels, the JSON schema's value."""

    all: Sequence[Prediction]
    settings: EvaluateRecipe
    labels: Sequence[str] = ()
    schema: object = None

    @cached_property
    def learned(self) -> list[Prediction]:
        return [each for each in self.all if each.loss is not None]

    @cached_property
    def answered(self) -> list[Prediction]:
        return [each for each in self.all if each.answer is not None]

    @cached_property
    def labelled(self) -> list[Prediction]:
        """Rows whose labels are compared."""
        return [each for each in self.answered if each.right is not None]

    @cached_property
    def scored(self) -> list[Prediction]:
        """Rows that expect a label and whose labels' probabilities are known."""
        known = (each for each in self.all if each.label_expected is not None)
        return [each for each in known if each.label_probability is not None]

    @cached_property
    def known_labels(self) -> list[str]:
        """The set of labels: those given and those expected, sorted."""
        expected = {each.label_expected for each in self.all if each.label_expected is not None}
        return sorted(expected.union(self.labels))

    @cached_property
    def texts(self) -> tuple[list[str], list[str]]:
        """Answers and expected answers, (N,) each."""
        return [each.answer or "" for each in self.answered], [each.expected or "" for each in self.answered]

    @cached_property
    def given_labels(self) -> tuple[list[str | None], list[str]]:
        """The labels of answers and those expected, (N,) each."""
        return [each.label for each in self.labelled], [each.label_expected or "" for each in self.labelled]

    @cached_property
    def confidence(self) -> tuple[list[float], list[bool]]:
        """The probability of each row's likeliest label, and whether it is the expected one, (N,) each."""
        return (
            [each.label_probability or 0.0 for each in self.scored],
            [each.label_scored == each.label_expected for each in self.scored],
        )

    @cached_property
    def few_labels(self) -> bool:
        """Whether labels are classes: at least two, and not a different one in nearly every row."""
        return bool(self.labelled or self.scored) and 2 <= len(self.known_labels) <= MOST_ANSWERS

    @cached_property
    def structured(self) -> bool:
        """Whether all expected answers are JSON objects or lists."""
        return bool(self.answered) and all(map(_is_structure, self.texts[1]))


def _is_structure(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict | list)
    except (ValueError, RecursionError):
        return False


@dataclass(frozen=True, slots=True)
class _Metric:
    """A metric: its score, whether the rows can tell it, and whether it suits them where none is named."""

    score: Callable[[Rows], Score]
    possible: Callable[[Rows], bool]
    suits: Callable[[Rows], bool] = lambda rows: True
    of_answers: bool = True


def _sums(rows: Rows) -> tuple[list[float], list[int]]:
    """Nats and supervised tokens of each row."""
    return [(each.loss or 0.0) * each.tokens for each in rows.learned], [each.tokens for each in rows.learned]


def _right(rows: Rows) -> Score:
    return mean_share("accuracy", [bool(each.right) for each in rows.labelled], groups=groups_of(rows.labelled))


def _free(rows: Rows) -> bool:
    return bool(rows.answered) and not rows.labelled and not rows.scored and not rows.structured


def _lengths(rows: Rows) -> list[int]:
    return [each.answer_tokens for each in rows.answered if each.answer_tokens is not None]


def _has_answers(rows: Rows) -> bool:
    return bool(rows.answered)


def _never(_: Rows) -> bool:
    return False


METRICS: dict[str, _Metric] = {
    "loss": _Metric(
        lambda rows: loss(*_sums(rows), groups=groups_of(rows.learned)), lambda rows: bool(rows.learned),
        of_answers=False,
    ),
    "perplexity": _Metric(
        lambda rows: perplexity(*_sums(rows), groups=groups_of(rows.learned)), lambda rows: bool(rows.learned),
        of_answers=False,
    ),
    "token_accuracy": _Metric(
        lambda rows: token_accuracy(
            [each.tokens_right or 0 for each in rows.learned], _sums(rows)[1], groups=groups_of(rows.learned)
        ),
        lambda rows: bool(rows.learned) and all(each.tokens_right is not None for each in rows.learned),
        of_answers=False,
    ),
    "exact_match": _Metric(lambda rows: exact_match(*rows.texts, groups=groups_of(rows.answered)), _has_answers),
    "exact_match_normalized": _Metric(
        lambda rows: exact_match_normalized(*rows.texts, groups=groups_of(rows.answered)), _has_answers, _never
    ),
    "accuracy": _Metric(_right, lambda rows: bool(rows.labelled)),
    "macro_f1": _Metric(
        lambda rows: macro_f1(*rows.given_labels, groups=groups_of(rows.labelled)),
        lambda rows: bool(rows.labelled), lambda rows: rows.few_labels,
    ),
    "outside_labels": _Metric(
        lambda rows: outside_labels(rows.given_labels[0], rows.known_labels, groups=groups_of(rows.labelled)),
        lambda rows: bool(rows.labelled), lambda rows: rows.few_labels,
    ),
    "label_accuracy": _Metric(
        lambda rows: label_accuracy(
            [each.label_scored for each in rows.scored], [each.label_expected or "" for each in rows.scored],
            groups=groups_of(rows.scored),
        ),
        lambda rows: bool(rows.scored), of_answers=False,
    ),
    "ece": _Metric(
        lambda rows: ece(*rows.confidence, groups=groups_of(rows.scored)), lambda rows: bool(rows.scored),
        of_answers=False,
    ),
    "rouge_l": _Metric(lambda rows: rouge_l(*rows.texts, groups=groups_of(rows.answered)), _has_answers, _free),
    "chrf": _Metric(lambda rows: chrf(*rows.texts, groups=groups_of(rows.answered)), _has_answers, _free),
    "json_valid": _Metric(
        lambda rows: json_valid(rows.texts[0], groups=groups_of(rows.answered)), _has_answers,
        lambda rows: rows.structured or rows.settings.schema is not None,
    ),
    "json_schema": _Metric(
        lambda rows: json_schema(rows.texts[0], rows.schema, groups=groups_of(rows.answered)),
        lambda rows: bool(rows.answered) and rows.settings.schema is not None,
    ),
    "pattern": _Metric(
        lambda rows: pattern(rows.texts[0], rows.settings.pattern or "", groups=groups_of(rows.answered)),
        lambda rows: bool(rows.answered) and rows.settings.pattern is not None,
    ),
    "answer_length": _Metric(
        lambda rows: answer_length(_lengths(rows), groups=groups_of(rows.answered)),
        lambda rows: bool(rows.answered) and len(_lengths(rows)) == len(rows.answered), _free,
    ),
    "answer_length_median": _Metric(
        lambda rows: answer_length_median(_lengths(rows)),
        lambda rows: bool(rows.answered) and len(_lengths(rows)) == len(rows.answered), _never,
    ),
    "refusals": _Metric(
        lambda rows: refusals(rows.texts[0], groups=groups_of(rows.answered)), _has_answers, _free
    ),
}  # fmt: skip
OF_LABELS = ("label_accuracy", "ece")  # those that need the probabilities of labels


def check(settings: EvaluateRecipe) -> object:
    """Refuses what no evaluation could do; returns the value of the JSON schema, where one is named.

    Raises RecipeError for an unknown metric or one that lacks its setting, InputError for a schema or an expression
    that is none.
    """
    for name in settings.metrics:
        if name != AUTO and name not in METRICS:
            raise RecipeError(f"{name!r} is no metric", where="evaluate.metrics", hint=f"known: {', '.join(METRICS)}")
        for needed in ("schema", "pattern"):
            if name in (needed, f"json_{needed}") and getattr(settings, needed) is None:
                raise RecipeError(f"{name!r} needs evaluate.{needed}", where="evaluate.metrics")
    if not all(label.strip() for label in settings.labels):
        raise RecipeError("a label is empty", where="evaluate.labels")
    if settings.pattern is not None:
        compiled(settings.pattern)
    return None if settings.schema is None else _schema(Path(settings.schema).expanduser())


def _schema(path: Path) -> object:
    from mlxtune.rundir import read_json

    value = read_json(path)
    try:
        conformer(value)
    except InputError as error:
        raise InputError(error.what, where=path, hint=error.hint) from None
    return value


def needs_answers(settings: EvaluateRecipe) -> bool:
    """Whether a metric that is asked for is of written answers."""
    return AUTO in settings.metrics or any(METRICS[name].of_answers for name in settings.metrics)


def needs_labels(settings: EvaluateRecipe) -> bool:
    """Whether a metric that is asked for is of the probabilities of labels."""
    return AUTO in settings.metrics or any(name in OF_LABELS for name in settings.metrics)


def refuse_impossible(rows: Rows) -> None:
    """Raises RecipeError for a metric that is asked for and that these rows cannot tell, whatever is answered."""
    missing = [name for name in rows.settings.metrics if name != AUTO and not METRICS[name].possible(rows)]
    if missing:
        hint = "set evaluate.label or evaluate.labels" if missing[0] in (*OF_LABELS, *LABEL_TABLES) else None
        raise RecipeError(f"these rows cannot tell {missing[0]!r}", where="evaluate.metrics", hint=hint)


def tally(rows: Rows) -> tuple[list[Score], dict[str, Any]]:
    """The scores that the settings ask for, or that suit the rows, and the tables of labels.

    Raises RecipeError as `refuse_impossible`.
    """
    refuse_impossible(rows)
    auto = AUTO in rows.settings.metrics
    wanted = {*ALWAYS, *rows.settings.metrics}
    scores = [
        each.score(rows)
        for name, each in METRICS.items()
        if each.possible(rows) and (name in wanted or (auto and each.suits(rows)))
    ]
    return scores, tables(rows)


LABEL_TABLES = ("accuracy", "macro_f1", "outside_labels")


def tables(rows: Rows) -> dict[str, Any]:
    """The per-class table and the confusion matrix of answers' labels; reliability and coverage of scored ones."""
    found: dict[str, Any] = {}
    if rows.labelled and rows.few_labels:
        found["classes"] = [asdict(each) for each in per_class(*rows.given_labels)]
        found["confusion"] = asdict(confusion(*rows.given_labels, rows.known_labels))
    if rows.scored:
        found["calibration"] = asdict(calibration(*rows.confidence))
        found["coverage"] = asdict(coverage(*rows.confidence, rows.settings.target_precision))
    return found
