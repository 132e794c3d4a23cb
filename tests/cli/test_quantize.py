"""`mlxtune quantize`: the same as `convert -q`, every number format and method, and the layers that stay."""

import json
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest

Invoke = Callable[..., tuple[int, str, str]]
Listing = Callable[[Path], dict[str, str]]
Logits = Callable[..., mx.array]
Far = Callable[[mx.array, mx.array], float]

TABLE = """\
layers                                weights         packed  bits per weight
model.embed_tokens                    196,608  affine 8 / 32            10.00
model.layers.*.self_attn.q_proj  x 3  110,592  affine 8 / 32            10.00
model.layers.*.self_attn.k_proj  x 3   36,864  affine 8 / 32            10.00
model.layers.*.self_attn.v_proj  x 3   36,864  affine 8 / 32            10.00
model.layers.*.self_attn.o_proj  x 3  110,592  affine 8 / 32            10.00
model.layers.*.mlp.gate_proj     x 3  294,912  affine 8 / 32            10.00
model.layers.*.mlp.down_proj     x 3  294,912  affine 8 / 32            10.00
model.layers.*.mlp.up_proj       x 3  294,912  affine 8 / 32            10.00
"""


def test_it_is_convert_with_q(invoke: Invoke, listing: Listing, tmp_path: Path) -> None:
    flags = ["--q-bits", "8", "--q-group-size", "32"]
    assert invoke("convert", "tiny", "--mlx-path", tmp_path / "a", "-q", *flags)[0] == 0
    code, printed, err = invoke("quantize", "tiny", "--mlx-path", tmp_path / "b", *flags)
    assert (code, printed) == (0, f"{tmp_path / 'b'}\n")
    assert err == TABLE + "1,377,600 parameters, 5.5 MB → 1.7 MB, 10.02 bits per weight, chosen by search\n"
    assert listing(tmp_path / "a") == listing(tmp_path / "b")


@pytest.mark.parametrize(
    ("flags", "packing"),
    [
        ([], (4, 64, "affine")),
        (["--q-bits", "3"], (3, 64, "affine")),
        (["--set", "quantize.bits=6"], (6, 64, "affine")),
        (["--q-mode", "mxfp4"], (4, 32, "mxfp4")),
        (["--q-mode", "nvfp4"], (4, 16, "nvfp4")),
        (["--q-mode", "mxfp8"], (8, 32, "mxfp8")),
    ],
)
def test_formats(
    invoke: Invoke,
    logits: Logits,
    plain_logits: Logits,
    far: Far,
    tmp_path: Path,
    flags: list[str],
    packing: tuple[int, int, str],
) -> None:
    assert invoke("quantize", "tiny", "--mlx-path", tmp_path / "q", *flags)[0] == 0
    bits, group_size, mode = packing
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    assert config["quantization"] == {"group_size": group_size, "bits": bits, "mode": mode}
    # mlx-lm multiplies packed weights, mlxtune expands them first: the same sums in another order
    assert far(logits(tmp_path / "q"), plain_logits(tmp_path / "q")) < 2e-4


def test_a_layer_that_stays_is_named(
    invoke: Invoke, logits: Logits, plain_logits: Logits, far: Far, tmp_path: Path
) -> None:
    """Rows of 192 weights make no groups of 128; the three layers with rows of 512 do."""
    code, printed, err = invoke("quantize", "tiny", "--mlx-path", tmp_path / "q", "--q-group-size", "128", "--json")
    value = json.loads(printed)
    assert (code, value["quantized_layers"], len(value["left_out"])) == (0, 3, 19)
    reason = "192 inputs are no multiple of 128"
    assert value["left_out"]["model.embed_tokens"] == reason
    assert err.splitlines() == [
        f"warning: model.embed_tokens stays in full precision: {reason}",
        *(
            f"warning: model.layers.*.{name}_proj (3 layers) stay in full precision: {reason}"
            for name in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up")
        ),
    ]
    by_name = {layer["name"]: layer for layer in value["layers"]}
    assert by_name["model.embed_tokens"] == {
        "name": "model.embed_tokens", "parameters": 196_608, "group_size": None, "bits": None, "mode": None,
        "bits_per_weight": 32, "left_out": reason,
    }  # fmt: skip
    assert by_name["model.layers.2.mlp.down_proj"]["bits_per_weight"] == 4.5
    assert far(logits(tmp_path / "q"), plain_logits(tmp_path / "q")) < 2e-4


@pytest.mark.parametrize("method", ["rtn", "imatrix", "gptq", "dwq", "awq"])
def test_methods(invoke: Invoke, tmp_path: Path, write_rows: Callable[..., Path], method: str) -> None:
    data = write_rows(tmp_path / "data.jsonl", 12)
    flags = [] if method == "rtn" else ["--data", data]
    assert invoke("quantize", "tiny", "--mlx-path", tmp_path / "q", "--q-method", method, *flags)[0] == 0
    assert invoke("quantize", "tiny", "--mlx-path", tmp_path / "default")[0] == 0
    name = "model.layers.0.mlp.up_proj.weight"
    searched, other = (mx.load(str(tmp_path / each / "model.safetensors"))[name] for each in ("default", "q"))
    assert mx.mean(searched == other).item() < 0.9


def test_without_rows_the_model_writes_its_own(invoke: Invoke, tmp_path: Path) -> None:
    lost = {}
    for method in ("search", "gptq", "dwq"):
        flags = ["--q-bits", "3", "--q-method", method, "--report", "--json"]
        code, out, error = invoke("quantize", "tiny", "--mlx-path", tmp_path / method, *flags)
        assert code == 0
        assert ("the model writes the rows" in error) == (method != "search")
        lost[method] = json.loads(out)["lost"]["divergence"]["kl_mean"]
    assert lost["dwq"] < lost["gptq"] < 0.9 * lost["search"]


@pytest.mark.parametrize(
    ("mode", "method", "same"),
    [
        ("mxfp4", None, "search"),
        ("nvfp4", None, "search"),
        ("mxfp8", None, "rtn"),
        ("mxfp4", "rtn", "rtn"),
        ("nvfp4", "imatrix", "imatrix"),
    ],
)
def test_the_method_that_is_told_is_the_one_that_was_used(
    invoke: Invoke, tmp_path: Path, tiny: Path, mode: str, method: str | None, same: str
) -> None:
    flags = ["--q-mode", mode, "--json", *(["--q-method", method] if method else [])]
    code, out, _ = invoke("quantize", "tiny", "--mlx-path", tmp_path / "q", *flags)
    assert (code, json.loads(out)["method"]) == (0, same)
    name = "model.layers.1.mlp.down_proj.weight"
    bits, group_size = {"mxfp4": (4, 32), "nvfp4": (4, 16), "mxfp8": (8, 32)}[mode]
    rounded, *_ = mx.quantize(mx.load(str(tiny / "model.safetensors"))[name], group_size, bits, mode)
    stored = mx.load(str(tmp_path / "q" / "model.safetensors"))[name]
    assert (mx.mean(stored == rounded).item() == 1) == (same == "rtn")


def test_not_twice(invoke: Invoke, listing: Listing, logits: Logits, far: Far, tmp_path: Path) -> None:
    q, other = tmp_path / "q", tmp_path / "other"
    invoke("quantize", "tiny", "--mlx-path", q)
    before = listing(tmp_path)
    line = f"error: {q}: is quantized already; start from the original model\n"
    assert invoke("quantize", q, "--mlx-path", other) == (2, "", line)
    assert invoke("convert", q, "--mlx-path", other, "--dtype", "float16") == (2, "", line)
    assert listing(tmp_path) == before
    assert invoke("convert", q, "--mlx-path", other)[0] == 0
    assert json.loads((other / "config.json").read_text())["quantization"]["bits"] == 4
    assert far(logits(other), logits(q)) == 0


@pytest.mark.usefixtures("without_weights")
def test_wrong_usage(invoke: Invoke, listing: Listing, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    taken = tmp_path / "taken"
    line = f"error: {taken}: exists already; choose another --mlx-path or remove it\n"
    assert invoke("quantize", "tiny", "--mlx-path", taken) == (2, "", line)
    line = "error: Missing option '--mlx-path'. (`mlxtune quantize --help`)\n"
    assert invoke("quantize", "tiny") == (2, "", line)
    assert listing(tmp_path) == {"taken": "folder"}
