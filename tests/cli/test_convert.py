"""`mlxtune convert`: exact files and output, what plain mlx-lm makes of them, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest

Invoke = Callable[..., tuple[int, str, str]]
Listing = Callable[[Path], dict[str, str]]
Broken = Callable[[str], Path]
Logits = Callable[..., mx.array]
Far = Callable[[mx.array, mx.array], float]

FILES = ["config.json", "model.safetensors", "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json"]


def test_convert(
    invoke: Invoke, listing: Listing, logits: Logits, plain_logits: Logits, far: Far, tiny: Path, tmp_path: Path
) -> None:
    out = tmp_path / "new" / "model"
    assert invoke("convert", "tiny", "--mlx-path", out) == (
        0,
        f"{out}\n",
        "1,377,600 parameters, 5.5 MB → 5.5 MB, 32.00 bits per weight\n",
    )
    assert list(listing(tmp_path / "new")) == ["model", *(f"model/{name}" for name in FILES)]
    before, after = mx.load(str(tiny / "model.safetensors")), mx.load(str(out / "model.safetensors"))
    assert before.keys() == after.keys()
    assert all(mx.array_equal(before[name], after[name]) for name in before)
    assert far(logits(out), logits(tiny)) == 0
    assert far(logits(out), plain_logits(out)) == 0


def test_convert_quantized(
    invoke: Invoke, listing: Listing, logits: Logits, plain_logits: Logits, far: Far, tmp_path: Path
) -> None:
    out = tmp_path / "q"
    code, printed, err = invoke("convert", "tiny", "--mlx-path", out, "-q", "--q-bits", "4", "--json")
    assert (code, err, printed.count("\n")) == (0, "", 1)
    assert json.loads(printed) == {
        "path": str(out),
        "parameters": 1_377_600,
        "dtype": "float32",
        "bits_per_weight": pytest.approx(5.02, abs=0.01),  # 4 and, for each 64 weights, two float32
        "bytes_before": 5_513_465,
        "bytes_after": (out / "model.safetensors").stat().st_size,
        "method": "search",
        "quantized_layers": 22,
        "left_out": {},
        "layers": json.loads(printed)["layers"],
    }
    assert len(json.loads(printed)["layers"]) == 22
    assert json.loads(printed)["layers"][0] == {
        "name": "model.embed_tokens",
        "parameters": 196_608,
        "group_size": 64,
        "bits": 4,
        "mode": "affine",
        "bits_per_weight": 5,
        "left_out": None,
    }
    assert list(listing(tmp_path)) == ["q", *(f"q/{name}" for name in FILES)]
    config = json.loads((out / "config.json").read_text())
    assert config["quantization"] == config["quantization_config"] == {"group_size": 64, "bits": 4, "mode": "affine"}
    # mlx-lm multiplies packed weights, mlxtune expands them first: the same sums in another order
    assert far(logits(out), plain_logits(out)) < 2e-4


def test_dtype(invoke: Invoke, logits: Logits, plain_logits: Logits, far: Far, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "half"
    assert invoke("convert", "tiny", "--mlx-path", out, "--dtype", "float16")[0] == 0
    before, after = mx.load(str(tiny / "model.safetensors")), mx.load(str(out / "model.safetensors"))
    assert all(mx.array_equal(before[name].astype(mx.float16), after[name]) for name in before)
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "float16"
    # mlxtune computes in float32 on a CPU, mlx-lm in float16 with its 11 bits
    assert far(logits(out), plain_logits(out)) < 0.05


SEE = "(`mlxtune convert --help`)"


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["nowhere"], "nowhere: no such folder; give a model folder, a hub id `owner/name`, or `tiny`"),
        (["tiny", "--q-bits", "4"], f"--q-bits has no effect without -q {SEE}"),
        (["tiny", "--q-group-size", "32"], f"--q-group-size has no effect without -q {SEE}"),
        (["tiny", "--q-mode", "mxfp4"], f"--q-mode has no effect without -q {SEE}"),
        (["tiny", "--q-method", "rtn"], f"--q-method has no effect without -q {SEE}"),
        (["tiny", "--data", "tickets"], f"--data has no effect; it is for --q-method imatrix, gptq, dwq, awq {SEE}"),
        (
            ["tiny", "-q", "--data", "tickets"],
            f"--data has no effect; it is for --q-method imatrix, gptq, dwq, awq {SEE}",
        ),
        (["tiny", "-q", "--q-bits", "7"], "command line: quantize.bits: no 7-bit format; use 2, 3, 4, 5, 6 or 8"),
        (["tiny", "-q", "--q-bits", "9"], "command line: quantize.bits: is 9; give at most 8"),
        (
            ["tiny", "-q", "--q-bits", "8", "--q-mode", "mxfp4"],
            "command line: quantize.mode: mxfp4 has 4 bits in groups of 32, not 8 in 32; leave bits and group_size out",
        ),
        (
            ["tiny", "-q", "--q-method", "search", "--q-mode", "mxfp8"],
            "command line: quantize.method: search does not go with mxfp8; use rtn, or leave it out",
        ),
        (
            ["tiny", "-q", "--q-method", "gptq", "--q-mode", "nvfp4"],
            "command line: quantize.method: gptq does not go with nvfp4; use search, rtn or imatrix, or leave it out",
        ),
        (
            ["tiny", "-q", "--q-method", "awq", "--q-mode", "mxfp4"],
            "command line: quantize.method: awq does not go with mxfp4; use search, rtn or imatrix, or leave it out",
        ),
        (["tiny", "--revision", "v1"], "tiny: revision 'v1' is given for a local folder; revisions belong to hub ids"),
        (
            ["tiny", "--dtype", "int8"],
            f"Invalid value for '--dtype': 'int8' is not one of 'float32', 'float16', 'bfloat16'. {SEE}",
        ),
    ],
)
@pytest.mark.usefixtures("without_weights")
def test_wrong_usage(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: list[str], line: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert invoke("convert", *args, "--mlx-path", "out/model") == (2, "", f"error: {line}\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("without_weights")
def test_it_writes_over_nothing(invoke: Invoke, listing: Listing, tmp_path: Path, broken: Broken) -> None:
    folder = broken("smaller")
    before = listing(tmp_path)
    line = f"error: {folder}: exists already; choose another --mlx-path or remove it\n"
    assert invoke("convert", "tiny", "--mlx-path", folder) == (2, "", line)
    inside = folder / "q"
    line = f"error: {inside}: lies inside the model it is made from; choose a folder outside it\n"
    assert invoke("convert", folder, "--mlx-path", inside) == (2, "", line)
    assert listing(tmp_path) == before


@pytest.mark.parametrize(
    ("what", "code", "line"),
    [
        (
            "other architecture",
            2,
            "model/config.json: has the unsupported architecture 'gadget'; mlx-lm has no such model; "
            "choose a Llama, Qwen, Mistral, Gemma, Phi or similar one",
        ),
        (
            "missing shard",
            2,
            "model: lacks the weights model-00002-of-00002.safetensors, which its index names; "
            "download the model again",
        ),
        ("no config", 2, "model: has no config.json; download the model again"),
        ("no tokenizer", 2, "model: has no tokenizer; copy tokenizer.json from the original model"),
        ("own code", 4, "model: asks to run its own code, model.py; mlxtune runs no code from model folders"),
        (
            "nan",
            2,
            "model: holds NaN or infinite values in model.norm.weight; download or train the model again",
        ),
    ],
)
def test_a_broken_model(
    invoke: Invoke,
    listing: Listing,
    tmp_path: Path,
    broken: Broken,
    monkeypatch: pytest.MonkeyPatch,
    what: str,
    code: int,
    line: str,
) -> None:
    broken(what)
    monkeypatch.chdir(tmp_path)
    before = listing(tmp_path)
    assert invoke("convert", "model", "--mlx-path", "out/m") == (code, "", f"error: {line}\n")
    assert invoke("quantize", "model", "--mlx-path", "out/m") == (code, "", f"error: {line}\n")
    assert listing(tmp_path) == before


def test_a_cut_file(invoke: Invoke, listing: Listing, tmp_path: Path, broken: Broken) -> None:
    folder = broken("cut")
    before = listing(tmp_path)
    code, out, err = invoke("convert", folder, "--mlx-path", tmp_path / "out")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"error: {folder}/model.safetensors: is no whole safetensors file: ")
    assert listing(tmp_path) == before
