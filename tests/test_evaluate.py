"""Evaluation: predictions against computations of their own, what is computed at all, and what is written when."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlxtune import evaluate as evaluation
from mlxtune import generate, likelihood, model
from mlxtune.data.files import Row
from mlxtune.data.formats import Completion, Example, Text
from mlxtune.data.render import Limit, Sample, render
from mlxtune.errors import DataError, OutputError, RecipeError, StorageError
from mlxtune.evaluate import among, evaluate
from mlxtune.evaluation import labelset, predictions
from mlxtune.evaluation.labelset import LabelSet
from mlxtune.model import LanguageModel
from mlxtune.recipe import DataRecipe, EvaluateRecipe
from mlxtune.tokenizer import inner

LABELS = ("card", "card_arrival", "refund_request")
QUESTIONS = [
    Completion(f"Where is my {thing}, number {number}?", LABELS[number % 3])
    for number, thing in enumerate(("card", "money", "parcel", "cat", "key"))
]


@pytest.fixture(scope="module")
def lm(tiny: Path) -> LanguageModel:
    return model.load(tiny)


def samples(lm: LanguageModel, examples: list[Any]) -> list[Sample]:
    rows = [(Row("t.jsonl", line, {}), example) for line, example in enumerate(examples, start=1)]
    return render(rows, inner(lm.tokenizer), lm.tokenizer.eos_token_ids, DataRecipe(), Limit(512)).samples


def label_set(lm: LanguageModel, examples: list[Any], **settings: Any) -> LabelSet | None:
    rows: list[tuple[Row, Example]] = [(Row("t.jsonl", 1, {}), example) for example in examples]
    recipe = EvaluateRecipe(**settings)
    return labelset.find(rows, recipe, inner(lm.tokenizer), lm.tokenizer.eos_token_ids, DataRecipe())


def test_every_row_is_read_and_answered(lm: LanguageModel) -> None:
    rows = samples(lm, QUESTIONS)
    heard: list[tuple[str, int, int]] = []
    done = evaluate(lm, rows, EvaluateRecipe(max_tokens=7), on_row=lambda *told: heard.append(told))
    nats = likelihood.measure(lm.net, rows)
    answers = generate.answers(lm, [row.tokens[: row.prompt_length] for row in rows], max_tokens=7)
    for made, row, each, answer in zip(done.predictions, rows, nats, answers, strict=True):
        assert made.loss == pytest.approx(each / row.trained_count, abs=1e-5)
        assert (made.tokens, made.where, made.expected) == (row.trained_count, row.where, row.answer)
        assert (made.answer, made.answer_tokens, made.prompt_tokens) == (answer.text, answer.tokens, row.prompt_length)
        assert (made.right, made.label, made.label_probability) == (None, None, None)
        assert made.prompt.endswith("<|im_start|>assistant\n")
    assert [score.metric for score in done.scores] == [
        "loss", "perplexity", "token_accuracy", "exact_match", "rouge_l", "chrf", "answer_length", "refusals",
    ]  # fmt: skip
    assert done.scores[0].value == pytest.approx(sum(nats) / sum(row.trained_count for row in rows), abs=1e-5)
    assert done.tables == {}
    assert heard[-1] == ("answers", 5, 5) and ("loss", 5, 5) in heard
    assert done.cost["prompt_tokens"] == np.mean([row.prompt_length for row in rows])
    assert done.cost["answer_tokens"] == np.mean([answer.tokens for answer in answers])
    assert done.cost["seconds_per_row"] > 0 and done.cost["peak_memory_gb"] > 0


def test_labels_have_the_probabilities_of_whole_rows(lm: LanguageModel) -> None:
    rows = samples(lm, QUESTIONS)
    labels = label_set(lm, QUESTIONS, labels=list(LABELS))
    assert labels is not None
    done = evaluate(lm, rows, EvaluateRecipe(max_tokens=3, labels=list(LABELS)), label_set=labels)
    for made, question in zip(done.predictions, QUESTIONS, strict=True):
        # the oracle: each label as the answer of a whole row, learned with the end of its turn
        each = likelihood.measure(lm.net, samples(lm, [Completion(question.prompt, label) for label in LABELS]))
        shares = np.exp(-np.array(each)) / np.exp(-np.array(each)).sum()
        assert made.label_scored == LABELS[int(shares.argmax())]
        assert made.label_probability == pytest.approx(shares.max(), abs=1e-4)
        assert made.label_expected == question.completion
        assert made.label == (made.answer or "").strip() and made.right == (made.label == made.label_expected)
    metrics = {score.metric: score.value for score in done.scores}
    likeliest = [made.label_scored == made.label_expected for made in done.predictions]
    assert metrics["label_accuracy"] == np.mean(likeliest)
    assert {"accuracy", "macro_f1", "outside_labels", "ece"} <= metrics.keys() and "chrf" not in metrics
    assert done.tables.keys() == {"classes", "confusion", "calibration", "coverage"}


def test_labels_that_cannot_be_scored_are_compared_all_the_same(lm: LanguageModel) -> None:
    done = evaluate(lm, samples(lm, QUESTIONS), EvaluateRecipe(max_tokens=3, labels=list(LABELS)))
    metrics = [score.metric for score in done.scores]
    assert metrics[-3:] == ["accuracy", "macro_f1", "outside_labels"]
    assert [made.label_expected for made in done.predictions] == [each.completion for each in QUESTIONS]


def test_a_label_that_begins_another_is_what_the_other_leaves(lm: LanguageModel) -> None:
    nats = -np.log(np.array([0.5, 0.4, 0.15, 0.2]))
    tokens = [(1,), (1, 2), (1, 2, 3), (4,)]
    left = np.array([0.5 - 0.4, 0.4 - 0.15, 0.15, 0.2])
    assert among(nats, tokens) == pytest.approx(left / left.sum())
    assert among(nats, [(1,), (2,), (3,), (4,)]) == pytest.approx(np.array([0.5, 0.4, 0.15, 0.2]) / 1.25)
    assert among(nats + 2000, tokens) == pytest.approx(left / left.sum())  # far below what a float holds
    # rounding may make the longer one the likelier
    assert among(np.array([0.5 + 1e-9, 0.5]), [(1,), (1, 2)]) == pytest.approx([0.0, 1.0])


def test_only_what_is_asked_for_is_computed(lm: LanguageModel) -> None:
    rows = samples(lm, QUESTIONS)
    labels = label_set(lm, QUESTIONS, labels=list(LABELS))
    phases: set[str] = set()
    settings = EvaluateRecipe(metrics=["token_accuracy"])
    done = evaluate(lm, rows, settings, label_set=labels, on_row=lambda phase, *_: phases.add(phase))
    assert [score.metric for score in done.scores] == ["loss", "perplexity", "token_accuracy"]
    assert phases == {"loss"} and {made.answer for made in done.predictions} == {None}
    settings = EvaluateRecipe(metrics=["label_accuracy"])
    done = evaluate(lm, rows, settings, label_set=labels, on_row=lambda phase, *_: phases.add(phase))
    assert phases == {"loss", "labels"} and done.scores[-1].metric == "label_accuracy"


def test_plain_texts_and_answers_in_one(lm: LanguageModel) -> None:
    done = evaluate(lm, samples(lm, [Text("A plain text."), QUESTIONS[0]]), EvaluateRecipe(max_tokens=3))
    first, second = done.predictions
    assert (first.answer, first.prompt_tokens, first.prompt) == (None, None, "") and second.answer is not None
    assert {score.metric: score.n for score in done.scores}["exact_match"] == 1


def test_rows_of_a_group(lm: LanguageModel) -> None:
    rows = samples(lm, QUESTIONS)
    done = evaluate(lm, rows, EvaluateRecipe(metrics=["loss"]), groups={rows[0].where: "a", rows[1].where: "a"})
    assert [made.group for made in done.predictions] == ["a", "a", None, None, None]


def test_what_cannot_be_evaluated(lm: LanguageModel) -> None:
    with pytest.raises(DataError, match="there are no rows to evaluate"):
        evaluate(lm, [], EvaluateRecipe())
    with pytest.raises(DataError, match="finds no label in its answer 'card_arrival'; change evaluate.label") as caught:
        evaluate(lm, samples(lm, QUESTIONS), EvaluateRecipe(label=r"^(card|refund_request)$"))
    assert caught.value.where == "t.jsonl:2"
    with pytest.raises(RecipeError, match="'nonsense' is no metric"):
        evaluate(lm, [], EvaluateRecipe(metrics=["nonsense"]))
    with pytest.raises(DataError, match="t.jsonl:2: its label 'card_arrival' is not among evaluate.labels"):
        evaluate(lm, samples(lm, QUESTIONS), EvaluateRecipe(labels=["card", "refund_request"]))


@pytest.mark.parametrize("metric", ["accuracy", "ece", "exact_match", "answer_length"])
def test_a_metric_that_these_rows_cannot_tell_is_refused_before_any_work(
    lm: LanguageModel, metric: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation.choices, "measure", lambda *given: pytest.fail("a model was asked"))
    rows = samples(lm, QUESTIONS if metric in ("accuracy", "ece") else [Text("A plain text.")])
    with pytest.raises(RecipeError, match=f"these rows cannot tell '{metric}'"):
        evaluate(lm, rows, EvaluateRecipe(metrics=[metric]))


def test_what_is_written(lm: LanguageModel, tmp_path: Path) -> None:
    done = evaluate(lm, samples(lm, QUESTIONS), EvaluateRecipe(max_tokens=3), adapter_path=Path("a"))
    path, lines = tmp_path / "eval" / "base.json", tmp_path / "eval" / "base.jsonl"
    evaluation.write(done, path, lines)
    assert predictions.read(lines) == done.predictions
    value = json.loads(path.read_text())
    assert value.keys() == {"model", "adapter", "n", "seconds", "scores", "tables", "cost"}
    assert value["scores"] == [asdict(score) for score in done.scores]
    assert (value["n"], value["adapter"], value["model"]) == (5, "a", str(lm.path))
    before = path.read_bytes()
    with pytest.raises(OutputError, match="exists already"):
        evaluation.write(done, path, lines)
    assert path.read_bytes() == before


def test_scores_are_written_last(lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = evaluate(lm, samples(lm, QUESTIONS[:1]), EvaluateRecipe(max_tokens=3))
    path, lines = tmp_path / "base.json", tmp_path / "base.jsonl"

    def fail(*_: Any) -> None:
        raise StorageError("the disk is full")

    with monkeypatch.context() as patched:
        patched.setattr(evaluation, "write_json", fail)
        with pytest.raises(StorageError):
            evaluation.write(done, path, lines)
    assert lines.exists() and not path.exists()
    evaluation.write(done, path, lines)  # what was left is replaced
    assert path.exists()
