"""`mlxtune evaluate`: the shape of its JSON and files, figures against plain mlx-lm, and what is refused."""

import json
import math
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
    assert value.keys() == {"model", "n", "scores"}
    assert (value["model"], value["n"]) == ("tiny", len(rows))
    assert all(score.keys() == SCORE for score in value["scores"])
    assert [(score["metric"], score["unit"], score["better"], score["n"]) for score in value["scores"]] == [
        ("loss", "nats per token", "lower", 5),
        ("perplexity", "", "lower", 5),
        ("exact_match", "share", "higher", 5),
    ]
    for score in value["scores"]:
        assert score["ci_low"] <= score["value"] <= score["ci_high"]
    loss, perplexity, _ = (score["value"] for score in value["scores"])
    assert loss == pytest.approx(plain_loss(tiny, adapter, rows)[0], rel=1e-5)
    assert perplexity == pytest.approx(math.exp(loss), rel=1e-9)
    base = json.loads(invoke("evaluate", "--data", data, "--json", *SHORT)[1])
    assert base["scores"][0]["value"] == pytest.approx(plain_loss(tiny, None, rows)[0], rel=1e-5)
    assert base["scores"][0]["value"] > loss


def test_the_table_and_the_file(invoke: Invoke, listing: Listing, trained: Path, tmp_path: Path) -> None:
    data, file = trained / "run" / "data" / "valid.jsonl", tmp_path / "new" / "scores.json"
    code, out, err = invoke("evaluate", "--data", data, "--out", file, "--set", r"evaluate.label=^(\w+)", *SHORT)
    assert (code, err) == (0, "")
    lines = [line.split() for line in out.splitlines()]
    assert lines[0] == ["score", "value", "95", "%", "interval", "rows"]
    assert [line[0] for line in lines[1:]] == ["loss", "perplexity", "exact", "accuracy"]
    assert list(listing(tmp_path)) == ["new", "new/scores.json"]
    value = json.loads(file.read_text())
    assert value.keys() == {"model", "adapter", "n", "seconds", "scores", "predictions"}
    assert (value["adapter"], value["n"], len(value["predictions"])) == (None, 5, 5)
    first = value["predictions"][0]
    assert first.keys() == {"where", "prompt", "expected", "answer", "loss", "tokens", "exact", "right"}
    row = json.loads(data.read_text().splitlines()[0])["messages"]
    assert (first["where"], first["expected"]) == (f"{data}:1", row[1]["content"])
    assert row[0]["content"] in first["prompt"]


def test_a_folder_means_its_test_file(invoke: Invoke, trained: Path) -> None:
    flags = ["--json", *SHORT]
    whole = json.loads(invoke("evaluate", "--data", trained / "run" / "data", *flags)[1])
    alone = json.loads(invoke("evaluate", "--data", trained / "run" / "data" / "test.jsonl", *flags)[1])
    assert whole == alone


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
