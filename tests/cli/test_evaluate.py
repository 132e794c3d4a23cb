"""`mlxtune evaluate`: the shape of its JSON and files, figures against plain mlx-lm, and what is refused."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlxtune import model

Invoke = Callable[..., tuple[int, str, str]]
Listing = Callable[[Path], dict[str, str]]
Broken = Callable[[str], Path]
WriteRows = Callable[..., Path]

SCORE = {"metric", "value", "unit", "ci_low", "ci_high", "n", "better"}
SHORT = ["--set", "evaluate.max_tokens=12"]


def plain_loss(model: Path, adapter: Path | None, rows: list[dict[str, Any]]) -> tuple[float, int]:
    """Nats per answer token over all rows and their count, by plain mlx-lm, one row at a time."""
    import mlx_lm

    net, tokenizer = mlx_lm.load(str(model), adapter_path=str(adapter) if adapter else None)
    nats, count = 0.0, 0
    for row in rows:
        asked = tokenizer.apply_chat_template(row["messages"][:-1], add_generation_prompt=True)
        # the answer and the token that ends its turn
        whole = [*asked, *tokenizer.encode(row["messages"][-1]["content"], add_special_tokens=False)]
        whole.append(tokenizer.eos_token_id)
        logits = net(mx.array([whole[:-1]]))[0].astype(mx.float32)
        rates = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        for place in range(len(asked) - 1, len(whole) - 1):
            nats -= rates[place, whole[place + 1]].item()
            count += 1
    return nats / count, count


def test_json(invoke: Invoke, trained: Path, tiny: Path) -> None:
    data, adapter = trained / "run" / "data" / "test.jsonl", trained / "run" / "adapter"
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    code, out, err = invoke("evaluate", "--model", "tiny", "--adapter-path", adapter, "--data", data, "--json", *SHORT)
    assert (code, err, out.count("\n")) == (0, "", 1)
    value = json.loads(out)
    assert value.keys() == {"model", "n", "scores", "tables", "cost"}
    assert (value["model"], value["n"]) == ("tiny", len(rows))
    assert all(score.keys() == SCORE for score in value["scores"])
    assert [(score["metric"], score["unit"], score["better"], score["n"]) for score in value["scores"]] == [
        ("loss", "nats per token", "lower", 5),
        ("perplexity", "", "lower", 5),
        ("token_accuracy", "share", "higher", 5),
        ("exact_match", "share", "higher", 5),
        ("rouge_l", "share", "higher", 5),
        ("chrf", "share", "higher", 5),
        ("answer_length", "tokens", "lower", 5),
        ("refusals", "share", "lower", 5),
    ]
    assert value["tables"] == {} and value["cost"]["answer_tokens"] <= 12
    for score in value["scores"]:
        assert score["ci_low"] <= score["value"] <= score["ci_high"]
    loss, perplexity = (score["value"] for score in value["scores"][:2])
    assert loss == pytest.approx(plain_loss(tiny, adapter, rows)[0], rel=1e-5)
    assert perplexity == pytest.approx(math.exp(loss), rel=1e-9)
    base = json.loads(invoke("evaluate", "--data", data, "--json", *SHORT)[1])
    assert base["scores"][0]["value"] == pytest.approx(plain_loss(tiny, None, rows)[0], rel=1e-5)
    assert base["scores"][0]["value"] > loss


LABELLED = ["--set", r"evaluate.label=^(\w+)", *SHORT]


def test_the_tables_and_the_files(invoke: Invoke, listing: Listing, trained: Path, tmp_path: Path) -> None:
    data, file = trained / "run" / "data" / "valid.jsonl", tmp_path / "new" / "scores.json"
    code, out, err = invoke("evaluate", "--data", data, "--out", file, *LABELLED)
    assert (code, err) == (0, "")
    first, second, third = out.split("\n\n")
    heading, *scores = first.splitlines()
    assert heading.split() == ["score", "value", "95", "%", "interval", "rows"]
    assert [re.split("  +", line)[0] for line in scores] == [
        "loss", "perplexity", "token accuracy", "exact match", "accuracy", "macro F1", "answers outside the labels",
        "accuracy by probabilities", "calibration error",
    ]  # fmt: skip
    lines = [line.split() for line in second.splitlines()]
    assert lines[0] == ["label", "precision", "recall", "F1", "rows", "mostly", "taken", "for"]
    assert [line[0] for line in lines[1:]] == ["it", "please", "your"]
    assert sum(int(line[4]) for line in lines[1:]) == 5
    assert third.startswith(("Where it is at least ", "At no level of confidence are 95 % of its labels right"))
    assert list(listing(tmp_path)) == ["new", "new/scores.json", "new/scores.jsonl"]
    value = json.loads(file.read_text())
    assert value.keys() == {"model", "adapter", "n", "seconds", "scores", "tables", "cost"}
    assert (value["adapter"], value["n"]) == (None, 5)
    assert value["tables"].keys() == {"classes", "confusion", "calibration", "coverage"}
    predictions = [json.loads(line) for line in file.with_suffix(".jsonl").read_text().splitlines()]
    assert len(predictions) == 5
    first_row = predictions[0]
    assert first_row.keys() == {
        "where", "prompt", "expected", "answer", "loss", "tokens", "exact", "right", "label", "label_expected",
        "label_scored", "label_probability", "prompt_tokens", "answer_tokens", "tokens_right", "group",
    }  # fmt: skip
    row = json.loads(data.read_text().splitlines()[0])["messages"]
    assert (first_row["where"], first_row["expected"]) == (f"{data}:1", row[1]["content"])
    assert row[0]["content"] in first_row["prompt"]


def test_metrics_labels_and_groups_by_flag(invoke: Invoke, write_rows: WriteRows, tmp_path: Path) -> None:
    rows = [
        {
            "messages": [{"role": "user", "content": f"{kind} {at}"}, {"role": "assistant", "content": kind}],
            "who": at % 2,
        }
        for at in range(4)
        for kind in ("card", "refund")
    ]
    data, file = write_rows(tmp_path / "d.jsonl", rows=rows), tmp_path / "s.json"
    flags = ["--metric", "label_accuracy", "--labels", "card", "--labels", "refund", "--group-by", "who"]
    code, out, _ = invoke("evaluate", "--data", data, *flags, "--json", "--out", file)
    assert code == 0
    assert [score["metric"] for score in json.loads(out)["scores"]] == ["loss", "perplexity", "label_accuracy"]
    groups = [json.loads(line)["group"] for line in file.with_suffix(".jsonl").read_text().splitlines()]
    assert groups == ["0", "0", "1", "1"] * 2


ASKED = {"question": "Where is it?", "choices": ["here", "there"], "answer": 1}


def test_questions(invoke: Invoke, write_rows: WriteRows, tmp_path: Path) -> None:
    file, out_file = write_rows(tmp_path / "q.jsonl", rows=[ASKED] * 3), tmp_path / "acc.json"
    code, out, err = invoke("evaluate", "--choices", file, "--json", "--out", out_file)
    value = json.loads(out)
    assert (code, err) == (0, "")
    assert [(score["metric"], score["n"]) for score in value["scores"]] == [("acc", 3), ("acc_norm", 3)]
    assert json.loads(out_file.read_text()) == {**value, "adapter": None}
    assert invoke("evaluate", "--choices", file)[1].splitlines()[1].split()[0] == "acc"


def test_a_folder_means_its_test_file(invoke: Invoke, trained: Path) -> None:
    flags = ["--json", *SHORT]
    whole = json.loads(invoke("evaluate", "--data", trained / "run" / "data", *flags)[1])
    alone = json.loads(invoke("evaluate", "--data", trained / "run" / "data" / "test.jsonl", *flags)[1])
    assert {**whole, "cost": None} == {**alone, "cost": None}


def test_rows_too_long(invoke: Invoke, write_rows: WriteRows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    long = {"messages": [{"role": "user", "content": "a " * 50}, {"role": "assistant", "content": "b"}]}
    data = write_rows(tmp_path / "d.jsonl", rows=[short, long])
    args = ["evaluate", "--data", data, "--max-seq-length", "40", *SHORT]
    code, out, err = invoke(*args)
    assert (code, out) == (2, "")
    tokens = err.removeprefix(f"error: {data}:2: has ").split()[0]
    assert int(tokens) > 40
    assert err == (
        f"error: {data}:2: has {tokens} tokens, more than train.max_seq_length 40 (1 such rows); "
        f"set max_seq_length to {tokens}, or data.too_long to drop or truncate\n"
    )
    code, out, err = invoke(*args, "--json", "--set", "data.too_long=drop")
    assert (code, json.loads(out)["n"]) == (0, 1)
    assert err == "warning: rows: 1 too long, left out\n"
    monkeypatch.setattr(model, "load", None)  # known without weights
    line = f"error: {data}: has no row to score: 2 too long, left out; raise --max-seq-length\n"
    args = ["evaluate", "--data", data, "--max-seq-length", "5", "--set", "data.too_long=drop"]
    assert invoke(*args) == (2, "", line)


@pytest.mark.parametrize(
    ("args", "line"),
    [
        ([], "data.path: is not set; "),
        (["--data", "absent.jsonl"], "absent.jsonl: no such file or folder; "),
        (["--data", "bad.jsonl"], "bad.jsonl:2: not valid JSON: "),
        (["--data", "empty.jsonl"], "empty.jsonl: has no rows; "),
        (["--data", "train_only"], "train_only: has no test file; give the file to score with --data FILE"),
        (["--data", "d.jsonl", "--out", "d.jsonl"], "d.jsonl: exists already; choose another --out or remove it"),
        (["--data", "d.jsonl", "--out", "d.json"], "d.jsonl: exists already; choose another --out or remove it"),
        (["--data", "d.jsonl", "--out", "e.jsonl"], "--out e.jsonl: is the file of the predictions; name it .json"),
        (["--data", "d.jsonl", "--metric", "f1"], "evaluate.metrics: 'f1' is no metric; known: loss, "),
        (["--data", "d.jsonl", "--group-by", "who"], "data.group_by: has no column `who`; "),
        (["--choices", "absent.jsonl"], "absent.jsonl: no such file or folder; "),
        (["--choices", "d.jsonl"], "d.jsonl:1: asks no `question`, `query` or `ctx` (and 2 more such rows); "),
        (["--choices", "d.jsonl", "--tasks", "arc_easy"], "--choices: cannot go with --tasks; "),
        (["--data", "d.jsonl", "--adapter-path", "absent"], "absent: is not an adapter folder; "),
        (["--data", "d.jsonl", "--adapter-path", "train_only"], "train_only: has no adapter_config.json; "),
        (["--data", "d.jsonl", "--model", "model"], "model: has no tokenizer; "),
        (["--data", "d.jsonl", "--config", "absent.yaml"], "absent.yaml: no such recipe; "),
        (["--data", "d.jsonl", "--set", "evaluate.label=x"], "command line: evaluate.label: has no group "),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("without_weights")
def test_wrong_input(
    invoke: Invoke,
    listing: Listing,
    broken: Broken,
    write_rows: WriteRows,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    args: list[str],
    line: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    broken("no tokenizer")
    write_rows(Path("d.jsonl"), 3)
    write_rows(Path("train_only/train.jsonl"), 3)
    Path("empty.jsonl").write_text("\n")
    Path("bad.jsonl").write_text(f"{Path('d.jsonl').read_text().splitlines()[0]}\n{{\n")
    before = listing(tmp_path)
    code, out, err = invoke("evaluate", *args)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"error: {line}")
    assert listing(tmp_path) == before


def test_an_adapter_that_does_not_fit(
    invoke: Invoke, listing: Listing, broken: Broken, trained: Path, tmp_path: Path
) -> None:
    model = broken("smaller")
    before = listing(tmp_path)
    adapter, data = trained / "run" / "adapter", trained / "data.jsonl"
    args = ["evaluate", "--model", model, "--adapter-path", adapter, "--data", data, "--out", tmp_path / "scores.json"]
    code, out, err = invoke(*args)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"error: {adapter}: ")
    assert listing(tmp_path) == before
