"""`mlxtune dequantize`: dense weights of the same values, exact output, and what is refused."""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest

from mlxtune.cli import convert

Invoke = Callable[..., tuple[int, str, str]]
Listing = Callable[[Path], dict[str, str]]
Logits = Callable[..., mx.array]
Far = Callable[[mx.array, mx.array], float]

FILES = ["config.json", "model.safetensors", "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json"]


def test_dense_again(
    invoke: Invoke, listing: Listing, logits: Logits, plain_logits: Logits, far: Far, tmp_path: Path
) -> None:
    assert invoke("quantize", "tiny", "--mlx-path", tmp_path / "q")[0] == 0
    out = tmp_path / "out"
    assert invoke("dequantize", tmp_path / "q", "--mlx-path", out) == (
        0,
        f"{out}\n",
        "1,377,600 parameters, 873.0 kB → 5.5 MB, 32.00 bits per weight\n",
    )
    assert list(listing(out)) == FILES
    assert not {"quantization", "quantization_config"} & json.loads((out / "config.json").read_text()).keys()
    # mlxtune expands packed weights itself: the same values, and the same sums
    assert far(logits(out), logits(tmp_path / "q")) == 0
    assert far(plain_logits(out), plain_logits(tmp_path / "q")) < 2e-4


def test_json(invoke: Invoke, tmp_path: Path) -> None:
    assert invoke("quantize", "tiny", "--mlx-path", tmp_path / "q", "--q-mode", "mxfp4")[0] == 0
    args = ["dequantize", tmp_path / "q", "--mlx-path", tmp_path / "out", "--dtype", "bfloat16", "--json"]
    code, printed, err = invoke(*args)
    assert (code, err) == (0, "")
    assert json.loads(printed) == {
        "path": str(tmp_path / "out"),
        "parameters": 1_377_600,
        "dtype": "bfloat16",
        "bits_per_weight": 16,
        "bytes_before": (tmp_path / "q" / "model.safetensors").stat().st_size,
        "bytes_after": (tmp_path / "out" / "model.safetensors").stat().st_size,
        "method": None,
        "quantized_layers": 0,
        "left_out": {},
        "layers": [],
    }


def test_what_is_refused(invoke: Invoke, listing: Listing, tmp_path: Path, tiny: Path) -> None:
    line = f"error: {tiny}: is not quantized; `mlxtune convert` copies and casts it\n"
    assert invoke("dequantize", "tiny", "--mlx-path", tmp_path / "out") == (2, "", line)
    assert listing(tmp_path) == {}
    assert invoke("quantize", "tiny", "--mlx-path", tmp_path / "q")[0] == 0
    before = listing(tmp_path)
    line = f"error: {tmp_path / 'q'}: exists already; choose another --mlx-path or remove it\n"
    assert invoke("dequantize", "tiny", "--mlx-path", tmp_path / "q") == (2, "", line)
    inside = tmp_path / "q" / "out"
    line = f"error: {inside}: lies inside the model it is made from; choose a folder outside it\n"
    assert invoke("dequantize", tmp_path / "q", "--mlx-path", inside) == (2, "", line)
    line = "error: Missing option '--mlx-path'. (`mlxtune dequantize --help`)\n"
    assert invoke("dequantize", "tiny") == (2, "", line)
    assert listing(tmp_path) == before


def test_progress_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Bytes, how fast, and the time that is left; the line is gone in the end."""
    clock = [10.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with convert.writing("dequantize") as on_bytes:
        clock[0] = 12.0
        on_bytes(0, 40_000_000)
        clock[0] = 14.0
        on_bytes(10_000_000, 40_000_000)
        on_bytes(10_500_000, 40_000_000)  # too soon to be drawn
        clock[0] = 20.0
        on_bytes(40_000_000, 40_000_000)
    out, err = capsys.readouterr()
    lines = [line.split("  ")[-2:] for line in err.split("\r\x1b[2K")[1:-1]]
    assert out == "" and err.endswith("\r\x1b[2K")
    assert lines == [["2.5 MB/s", "12 s left"], ["4.0 MB/s", "10 s"]]
