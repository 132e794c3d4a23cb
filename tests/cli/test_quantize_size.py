"""`mlxtune quantize` within a size, with a report, and as a sweep: what is written, said and refused."""

import json
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest

Invoke = Callable[..., tuple[int, str, str]]


def test_a_target_is_kept_and_its_costs_go_on(invoke: Invoke, tmp_path: Path) -> None:
    small = tmp_path / "small"
    code, _, error = invoke("quantize", "tiny", "--mlx-path", small, "--target-bpw", "4.5")
    assert code == 0
    assert "4.49 bits per weight of 4.50 asked for" in error
    assert "model.embed_tokens" in json.loads((small / "costs.json").read_text())
    arguments = ("--target-size", "0.7MB", "--costs", small / "costs.json", "--json")
    code, out, _ = invoke("quantize", "tiny", "--mlx-path", tmp_path / "smaller", *arguments)
    done = json.loads(out)
    assert code == 0
    assert 0.98 * 700_000 <= done["bytes_after"] <= 1.02 * 700_000
    assert len({layer["bits"] for layer in done["layers"]}) > 1


def test_the_report(invoke: Invoke, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Where is my parcel? It is on its way. " * 20)
    code, out, error = invoke("quantize", "tiny", "--mlx-path", str(tmp_path / "a"), "--report", "--text", str(text))
    assert code == 0
    path, headings, line = out.splitlines()
    assert path == str(tmp_path / "a")
    assert headings.split()[:3] == ["size", "bits/weight", "KL"]
    assert line.split()[0] == "a"
    assert "on" in error and "tokens of" in error
    arguments = ("--report", "--text", str(text), "--json")
    code, out, _ = invoke("quantize", "tiny", "--mlx-path", str(tmp_path / "b"), *arguments)
    assert json.loads(out)["lost"]["divergence"]["kl_mean"] > 0


def test_the_sweep_writes_a_picture_and_no_model(invoke: Invoke, tmp_path: Path) -> None:
    picture = tmp_path / "kl.svg"
    code, out, _ = invoke("quantize", "tiny", "--sweep", "8,2", "--plot", str(picture), "--json")
    assert code == 0
    assert [each["name"] for each in json.loads(out)] == ["8 bits", "2 bits"]
    assert ElementTree.fromstring(picture.read_text()).tag.endswith("svg")
    assert list(tmp_path.iterdir()) == [picture]


def test_a_sweep_by_a_method_that_looks_at_rows(
    invoke: Invoke, tmp_path: Path, write_rows: Callable[..., Path]
) -> None:
    found = {}
    data = ("--data", write_rows(tmp_path / "data.jsonl", 8))
    for method, given, said in (("search", (), False), ("gptq", (), True), ("awq", data, False)):
        arguments = ("--sweep", "3", "--q-method", method, *given, "--json")
        code, out, error = invoke("quantize", "tiny", *arguments)
        assert (code, "the model writes the rows" in error) == (0, said)
        found[method] = json.loads(out)[0]["divergence"]["kl_mean"]
    assert found["gptq"] < 0.9 * found["search"]
    assert found["awq"] not in (found["gptq"], found["search"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "Missing option '--mlx-path'"),
        (("--sweep", "2,x"), "'2,x' is no list of numbers such as 2,3,4"),
        (("--sweep", "7"), "no 7-bit format"),
        (("--sweep", "4", "--data", "tickets"), "--data has no effect; it is for --q-method imatrix, gptq, dwq, awq"),
        (("--sweep", "4", "--mlx-path", "out"), "--sweep writes no model"),
        (("--mlx-path", "out", "--plot", "a.svg"), "--plot has no effect without --sweep"),
        (("--mlx-path", "out", "--target-bpw", "4", "--target-size", "1MB"), "not both"),
        (("--mlx-path", "out", "--target-bpw", "4", "--q-bits", "4"), "--q-bits has no effect"),
        (("--mlx-path", "out", "--target-bpw", "4", "--q-mode", "mxfp4"), "a target takes --q-mode affine"),
        (("--mlx-path", "out", "--target-bpw", "4", "--set", "quantize.mode=mxfp4"), "a target takes --q-mode affine"),
        (("--mlx-path", "out", "--target-bpw", "4", "--set", "quantize.bits=3"), "--q-bits has no effect"),
        (("--sweep", "2,4", "--set", "quantize.bits=3"), "--q-bits has no effect"),
        (("--mlx-path", "out", "--target-size", "big"), "--target-size 'big' is no size such as 600MB or 2.5GB"),
        (("--mlx-path", "out", "--target-bpw", "2"), "even the fewest bits take"),
        (("--mlx-path", "out", "--costs", "c.json"), "--costs has no effect"),
        (("--mlx-path", "out", "--text", "a.txt"), "--text has no effect"),
        (("--mlx-path", "out", "--target-bpw", "4", "--costs", "missing.json"), "missing.json"),
    ],
)
def test_what_has_no_effect_is_refused(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, error = invoke("quantize", "tiny", *arguments)
    assert (code, out) == (2, "")
    assert said in error and "Traceback" not in error
    assert list(tmp_path.iterdir()) == []
