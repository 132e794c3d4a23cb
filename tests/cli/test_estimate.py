"""`mlxtune estimate`: whole output, nothing loaded or written, what fits where it does not, errors."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from mlxtune import machine

Invoke = Callable[..., tuple[int, str, str]]
Listing = Callable[[Path], dict[str, str]]
WriteRows = Callable[..., Path]

SIZE = r"[\d.]+ [kMG]?B"


@pytest.fixture
def memory_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Gives the machine so many usable bytes."""
    return lambda usable: monkeypatch.setattr(machine, "usable_here", lambda: usable)


@pytest.mark.usefixtures("without_weights")
def test_without_data(
    invoke: Invoke, listing: Listing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory_of: Callable[[int], None]
) -> None:
    monkeypatch.chdir(tmp_path)
    memory_of(8 * 10**9)
    code, out, err = invoke("estimate", "--max-seq-length", "256", "--grad-accumulation-steps", "2")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "  update       16 rows of up to 256 tokens, in 2 batches of 8"
    assert [line.split()[0] for line in lines[2:7]] == ["weights", "adapter", "activations", "logits", "training"]
    assert lines[2].split()[1:] == ["5.5", "MB"]
    assert re.fullmatch(rf"It fits: about {SIZE} of the 8\.0 GB that training may use here\.", lines[-1])
    assert listing(tmp_path) == {}


def test_with_data(invoke: Invoke, write_rows: WriteRows, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "d.jsonl", 40)
    code, out, err = invoke("estimate", "--data", data, "--batch-size", "4", "--epochs", "2")
    assert (code, err) == (0, "")
    assert re.search(r"^  to learn +30 samples, [\d,]+ of [\d,]+ tokens; 16 updates, 2\.0 epochs$", out, re.MULTILINE)
    code, out, _ = invoke("estimate", "--data", data, "--batch-size", "4", "--epochs", "2", "--json")
    value = json.loads(out)
    assert code == 0
    assert value.keys() == {
        "peak", "usable_bytes", "verdict", "batch_size", "grad_accumulation_steps", "longest", "counts", "changes",
    }  # fmt: skip
    assert (value["verdict"], value["changes"], value["batch_size"]) == ("fits", [], 4)
    assert value["counts"]["supervised_tokens"] < value["counts"]["tokens"]
    parts = value["peak"]
    assert parts["training"] == sum(parts[name] for name in ("weights", "adapter", "activations", "logits"))


def test_what_does_not_fit_is_told_what_does(invoke: Invoke, memory_of: Callable[[int], None]) -> None:
    memory_of(35_000_000)
    code, out, err = invoke("estimate", "--max-seq-length", "256")
    assert (code, err) == (0, "")
    said, heading, *proposals = out.split("\n\n")[-1].splitlines()
    assert re.fullmatch(rf"It does not fit: about {SIZE} of the 35\.0 MB that training may use here\.", said)
    assert heading == "What fits, fastest first:"
    for line in proposals:
        code, out, _ = invoke("estimate", "--max-seq-length", "256", *line.split("B  ")[1].split(), "--json")
        assert (code, json.loads(out)["verdict"]) == (0, "fits")
    memory_of(10**6)
    assert invoke("estimate")[1].endswith("No setting makes it fit: choose a smaller model.\n")


def test_auto_says_what_it_chooses(invoke: Invoke, memory_of: Callable[[int], None]) -> None:
    memory_of(35_000_000)
    code, out, _ = invoke("estimate", "--max-seq-length", "256", "--batch-size", "auto")
    assert code == 0
    assert re.match(r"  update       8 rows of up to 256 tokens, in [48] batches of [12]\n", out)
    assert "\nIt fits: " in out


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["--model", "nowhere"], "nowhere: no such folder; give a model folder, a hub id `owner/name`, or `tiny`"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl: no such file or folder"),
        (["--set", "lora.targets=[gate]"], "lora.targets: 'gate' matches no layer; choose from "),
        (["--batch-size", "many"], "Invalid value for '--batch-size': 'many' is not a valid integer."),
    ],
)
def test_mistakes(invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: list[str], line: str) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = invoke("estimate", *args)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {line}")
    assert err.count("\n") == 1
