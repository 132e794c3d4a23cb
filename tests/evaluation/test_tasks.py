"""Tasks of lm-evaluation-harness: what it asks for, against single rows; and its own counts, against mlx-lm's class."""

import json
import random
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxtune import generate, model
from mlxtune.errors import InputError
from mlxtune.evaluation import tasks
from mlxtune.model import LanguageModel

NOUNS = ("cat", "dog", "ball", "tree", "girl", "boy", "sun", "car", "house", "bird", "fish", "box", "cake", "toy")
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
{more}
metadata: {{version: 1.0}}
"""
# as the harness has arc_easy, but for its rows
ARC_EASY = """
output_type: multiple_choice
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_target: "{{choices.label.index(answerKey)}}"
doc_to_choice: "{{choices.text}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
WRITTEN = """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answerKey}}"
generation_kwargs: {until: ["."], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
ROLLED = """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
"""


@pytest.fixture(scope="module")
def story(stories: Path) -> LanguageModel:
    return model.load(stories)


def nats(lm: LanguageModel, tokens: list[int], start: int) -> float:
    """-log P of tokens[start:] behind the others, in float64."""
    logits = np.array(lm.net(mx.array([tokens]))[0], dtype=np.float64)
    rates = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return -float(sum(rates[place - 1, tokens[place]] for place in range(start, len(tokens))))


def test_continuations(story: LanguageModel) -> None:
    start = "Once upon a time, there was a little"
    first = generate.text_tokens(story, start)
    greedy = next(generate.stream(story, first, max_tokens=1)).token
    likely = story.tokenizer.convert_ids_to_tokens(greedy).replace("\u2581", " ")
    requests = [(start, likely), ("The cat", " sat"), (start, " cement"), ("The cat", " ran away")]
    found = tasks.loglikelihood(story, requests)
    for (context, continuation), (value, best) in zip(requests, found, strict=True):
        tokens, at = generate.text_tokens(story, context + continuation), len(generate.text_tokens(story, context))
        assert value == pytest.approx(-nats(story, tokens, at), abs=1e-4)
        assert best == (continuation == likely and context == start)


def test_whole_texts_are_read_behind_a_beginning(story: LanguageModel) -> None:
    texts = ["Once upon a time", "", "The cat sat on a mat. " * 90]
    found = tasks.loglikelihood_rolling(story, texts, batch_size=2)
    assert found[0] == pytest.approx(-nats(story, generate.text_tokens(story, texts[0]), 1), abs=1e-4)
    assert found[1] == 0
    tokens = [1, *story.tokenizer.encode(texts[2], add_special_tokens=False)]
    assert 512 < len(tokens) - 1 < 1024
    last = tokens[-513:]
    expected = nats(story, tokens[:513], 1) + nats(story, last, len(last) - (len(tokens) - 513))
    assert found[2] == pytest.approx(-expected, rel=1e-5)


@pytest.mark.parametrize("count", [1, 2, 5, 6, 7, 11, 23])
def test_windows_score_each_token_once(count: int) -> None:
    tokens = list(range(100, 100 + count))
    scored = []
    for sample in tasks.windows(tokens, 5):
        assert 2 <= len(sample.tokens) <= 6 and not sample.trained[0]
        scored += [token for token, trained in zip(sample.tokens, sample.trained, strict=True) if trained]
    assert scored == tokens[1:]
    assert [len(sample.tokens) for sample in tasks.windows(tokens, None)] == ([count] if count > 1 else [])


def test_answers_end_before_a_stop_text(story: LanguageModel) -> None:
    start = "Once upon a time, there was"
    (whole,) = generate.answers(story, [generate.text_tokens(story, start)], max_tokens=40)
    assert "." in whole.text
    options: dict[str, Any] = {"max_gen_toks": 40}
    requests = [(start, {**options, "until": ["\n\n", "."]}), (start, {**options, "until": "was"}), (start, options)]
    found = tasks.generate_until(story, requests)
    assert found == [whole.text.split(".")[0], whole.text.split("was")[0], whole.text]
    (short,) = tasks.generate_until(story, [("cat " * 600, {"max_gen_toks": 9, "until": []})])
    assert isinstance(short, str)  # the left of the context went
    (empty,) = tasks.generate_until(story, [("", {"max_gen_toks": 9})])
    assert empty == generate.answers(story, [[1]], max_tokens=9)[0].text
    with pytest.raises(InputError, match="a task asks for sampled answers"):
        tasks.generate_until(story, [("a", {"do_sample": True, "temperature": 0.7})])


def test_without_the_harness(story: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for call in (lambda: tasks.check(["arc_easy"]), lambda: tasks.measure(story, ["arc_easy"])):
        with pytest.raises(InputError, match=r"--tasks: needs lm-evaluation-harness; pip install 'mlxtune\[lm-eval\]'"):
            call()


def question(draw: random.Random) -> dict[str, Any]:
    nouns = draw.sample(NOUNS, 4)
    texts = [f"The {noun}" + draw.choice(["", f" and the {draw.choice(NOUNS)}"]) for noun in nouns]
    asked = f"The big {nouns[0]} went to play with the {draw.choice(NOUNS)}. What was it?"
    return {"question": asked, "choices": {"text": texts, "label": list("ABCD")}, "answerKey": draw.choice("ABCD")}


def asked(count: int) -> list[dict[str, Any]]:
    draw = random.Random(0)
    return [question(draw) for _ in range(count)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of tasks over 40 rows of its own: `local_arc`, `local_written` and `local_rolled`."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(each) + "\n" for each in asked(40)))
    for name, more in (("local_arc", ARC_EASY), ("local_written", WRITTEN), ("local_rolled", ROLLED)):
        (tmp_path / f"{name}.yaml").write_text(TASK.format(name=name, rows=rows, more=more))
    return tmp_path


@pytest.mark.interop
@pytest.mark.filterwarnings("ignore")
def test_a_task_of_choices_has_the_accuracy_of_mlx_lms_class(story: LanguageModel, folder: Path) -> None:
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager
    from mlx_lm.evaluate import MLXLM

    theirs = lm_eval.simple_evaluate(
        model=MLXLM(str(story.path), use_chat_template=False), tasks=["local_arc"],
        task_manager=TaskManager(include_path=str(folder)), bootstrap_iters=0,
    )["results"]["local_arc"]  # fmt: skip
    heard: list[tuple[str, int, int]] = []
    ours = tasks.measure(story, ["local_arc"], folder=folder, on_row=lambda *told: heard.append(told))
    assert {score.metric: score.value for score in ours} == {
        "local_arc.acc": theirs["acc,none"], "local_arc.acc_norm": theirs["acc_norm,none"],
    }  # fmt: skip
    assert all(score.n == 40 and score.ci_low < score.value < score.ci_high for score in ours)
    phase, done, total = heard[-1]
    assert phase == "choices" and done == total == len({question["question"] for question in asked(40)})
    assert tasks.measure(story, ["local_arc"], folder=folder, limit=7)[0].n == 7


@pytest.mark.interop
@pytest.mark.filterwarnings("ignore")
def test_tasks_of_answers_and_of_texts(story: LanguageModel, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lm_eval")
    found = {score.metric: score for score in tasks.measure(story, ["local_written", "local_rolled"], folder=folder)}
    assert found.keys() == {"local_written.exact_match", "local_rolled.word_perplexity", "local_rolled.bits_per_byte"}
    texts = [each["question"] for each in asked(40)]
    total = sum(tasks.loglikelihood_rolling(story, texts))
    bits = -total / (sum(len(text.encode()) for text in texts) * np.log(2))
    assert found["local_rolled.bits_per_byte"].value == pytest.approx(bits, rel=1e-6)
    assert found["local_rolled.bits_per_byte"].better == "lower"
    assert capfd.readouterr() == ("", "")
    with pytest.raises(InputError, match="'nonsense' is no task"):
        tasks.check(["local_arc", "nonsense"], folder)
