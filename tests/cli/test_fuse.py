"""`mlxtune fuse`: exact files and output, the same logits as base and adapter in plain mlx-lm, and what is refused."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest

Invoke = Callable[..., tuple[int, str, str]]
Listing = Callable[[Path], dict[str, str]]
Broken = Callable[[str], Path]
WriteRows = Callable[..., Path]
Logits = Callable[..., mx.array]
Far = Callable[[mx.array, mx.array], float]

FILES = [
    "README.md", "config.json", "fuse.json", "model.safetensors", "model.safetensors.index.json", "tokenizer.json",
    "tokenizer_config.json",
]  # fmt: skip


def test_fuse(
    invoke: Invoke,
    listing: Listing,
    logits: Logits,
    plain_logits: Logits,
    far: Far,
    trained: Path,
    tiny: Path,
    tmp_path: Path,
) -> None:
    adapter, out = trained / "run" / "adapter", tmp_path / "fused"
    code, printed, err = invoke("fuse", "--model", "tiny", "--adapter-path", adapter, "--save-path", out)
    assert (code, printed) == (0, f"{out}\n")
    assert err == "21 layers fused, 5.5 MB, kept 100.0% of the gain on 5 rows\n"
    assert list(listing(tmp_path)) == ["fused", *(f"fused/{name}" for name in FILES)]
    both = plain_logits(tiny, adapter)
    assert far(both, logits(tiny)) > 0.1  # the adapter does something
    # W + scale·(A·B)ᵀ rounded once to float32, against two products added: a few last digits
    assert far(plain_logits(out), both) < 1e-4
    assert far(logits(out), plain_logits(out)) == 0
    figures = json.loads((out / "fuse.json").read_text())
    assert figures["fused_loss"] == pytest.approx(figures["adapter_loss"], rel=1e-5)
    assert figures["base_loss"] > figures["adapter_loss"]


def test_into_a_quantized_base(
    invoke: Invoke, logits: Logits, plain_logits: Logits, far: Far, unbound: Path, tmp_path: Path
) -> None:
    base, adapter = tmp_path / "base", unbound
    assert invoke("quantize", "tiny", "--mlx-path", base, "--q-bits", "4")[0] == 0
    args = ["fuse", "--model", base, "--adapter-path", adapter, "--json"]
    sizes = {}
    # a few updates are a small gain, of which four bits may keep less than the default asks for
    ways = (
        ("as base", ["--keep", "0", "--max-bpw", "1"], 4),
        ("eight", ["--q-bits", "8"], 8),
        ("whole", ["--dequantize"], None),
    )
    for name, flags, bits in ways:
        out = tmp_path / name
        code, printed, err = invoke(*args, "--save-path", out, *flags)
        assert (code, err, printed.count("\n")) == (0, "", 1), name
        value = json.loads(printed)
        written = json.loads((out / "fuse.json").read_text())
        assert {**value, **written} == value | {"adapters": {os.path.relpath(adapter, out): 1.0}}
        assert value.keys() - written.keys() == {"path"}
        assert (value["path"], value["layers"], value["bits"], value["rows"]) == (str(out), 21, bits, 5)
        if bits == 4:  # the default takes it exactly where it keeps 90 %, and else writes nothing
            taken = invoke(*args, "--save-path", tmp_path / "default", "--max-bpw", "1")[0] == 0
            assert taken == (value["kept"] >= 0.9) == (tmp_path / "default").exists()
        else:
            assert value["kept"] >= 0.9
        assert value["bytes"] == (out / "model.safetensors").stat().st_size
        sizes[name] = value["bytes"]
        # mlx-lm multiplies packed weights, mlxtune expands them first: the same sums in another order
        assert far(logits(out), plain_logits(out)) < 2e-4
    assert sizes["as base"] < sizes["eight"] < sizes["whole"]
    assert "quantization" not in json.loads((tmp_path / "whole" / "config.json").read_text())
    assert far(plain_logits(tmp_path / "whole"), plain_logits(base, adapter)) < 2e-4


def test_too_little_would_survive(
    invoke: Invoke, listing: Listing, write_rows: WriteRows, unbound: Path, tmp_path: Path
) -> None:
    """The limit is met exactly as it is asked for: here more than everything of the gain. The ways out are shown."""
    base, adapter = tmp_path / "base", unbound
    invoke("quantize", "tiny", "--mlx-path", base, "--q-bits", "2")
    before = listing(tmp_path)
    args = ["fuse", "--model", base, "--adapter-path", adapter, "--save-path", tmp_path / "fused", "--keep", "1"]
    code, out, err = invoke(*args, "--max-bpw", "1")
    *table, line = err.splitlines()
    assert (code, out) == (1, "")
    assert "of what the adapter learned, less than 100% (loss of base " in line
    assert line.endswith("; nothing was written; use --q-bits 8 or --dequantize or --accept-loss")
    flags = [each.split("  ")[1] for each in table]
    assert flags == ["--base ORIGINAL", *(f"--q-bits {bits}" for bits in (3, 4, 5, 6, 8)), "--dequantize"]
    assert table[-1].split() == ["--dequantize", "5.5", "MB", "32.00", "bits", "per", "weight"]
    assert listing(tmp_path) == before
    code, out, err = invoke(*args, "--max-bpw", "1", "--accept-loss")
    assert (code, out) == (0, f"{tmp_path / 'fused'}\n")
    assert json.loads((tmp_path / "fused" / "fuse.json").read_text())["kept"] < 1


def test_strengths(invoke: Invoke, listing: Listing, trained: Path, tmp_path: Path) -> None:
    adapter, out = trained / "run" / "adapter", tmp_path / "fused"
    text = tmp_path / "text.txt"
    text.write_text("The keeper of the lighthouse counts the ships that pass. " * 40)
    args = ["fuse", "--model", "tiny", "--adapter-path", adapter, "--sweep-scale", "--anchor", text]
    before = listing(tmp_path)
    code, printed, err = invoke(*args)
    heading, *rows = printed.splitlines()
    assert code == 0 and heading.split() == ["scale", "loss", "gain", "anchor", "loss", "forgotten", "gain"]
    assert [float(row.split()[0]) for row in rows] == [0, 0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 1, 1.1, 1.25, 1.5]
    (chosen,) = [row.split()[0] for row in rows if "←" in row]
    assert err == f"nats per token on 5 rows; best: --scale {chosen}\n"
    assert max(row.count("█") for row in rows) == 24
    assert listing(tmp_path) == before
    code, printed, err = invoke(*args, "--json", "--plot", tmp_path / "strengths.svg")
    value = json.loads(printed)
    drawn = (tmp_path / "strengths.svg").read_text()
    assert drawn.startswith("<svg ") and "strength of the adapter" in drawn and "forgotten" in drawn
    assert (code, err, value["rows"], f"{value['chosen']:g}") == (0, "", 5, chosen)
    code, printed, _ = invoke(*args, "--save-path", out, "--json")
    value = json.loads(printed)
    assert value["adapters"] == {str(adapter): value["sweep"]["chosen"]}
    assert value["adapter_loss"] == pytest.approx(
        next(each["loss"] for each in value["sweep"]["points"] if each["scale"] == value["sweep"]["chosen"]), rel=1e-4
    )


def test_several_adapters(
    invoke: Invoke, trained: Path, unbound: Path, plain_logits: Logits, far: Far, tiny: Path, tmp_path: Path
) -> None:
    """Twice the same one in two parts is that one."""
    one, out = trained / "run" / "adapter", tmp_path / "fused"
    args = ["fuse", "--model", "tiny", "--save-path", out]
    code, printed, err = invoke(*args, "--adapter-path", f"{one}=0.7", "--adapter-path", f"{unbound}=0.3")
    assert (code, printed) == (0, f"{out}\n")
    assert err == "21 layers fused, 5.5 MB, kept 100.0% of the gain on 5 rows\n"
    assert far(plain_logits(out), plain_logits(tiny, one)) < 1e-4


def test_without_rows_it_says_what_it_did_not_check(
    invoke: Invoke, write_rows: WriteRows, trained: Path, tmp_path: Path
) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(trained / "run" / "adapter", adapter)
    args = ["fuse", "--model", "tiny", "--adapter-path", adapter]
    code, _, err = invoke(*args, "--save-path", tmp_path / "a")
    assert code == 0
    assert err == (
        "warning: what was kept is not checked: the adapter has no run with validation rows; give --data FILE\n"
        "21 layers fused, 5.5 MB\n"
    )
    data = write_rows(tmp_path / "d.jsonl", 6)
    code, _, err = invoke(*args, "--save-path", tmp_path / "b", "--data", data)
    assert (code, err) == (0, "21 layers fused, 5.5 MB, kept 100.0% of the gain on 6 rows\n")


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["--save-path", "taken"], "taken: exists already; choose another --save-path or remove it"),
        (["--q-bits", "7"], "command line: fuse.bits: no 7-bit format; use 2, 3, 4, 5, 6 or 8"),
        (["--q-bits", "1"], "command line: fuse.bits: is 1; give at least 2"),
        (["--adapter-path", "absent=0.5"], "absent: is not an adapter folder; give the folder with adapters"),
        (["--adapter-path", "ADAPTER=9"], "--adapter-path ADAPTER: has the weight 9; give one from -4 to 4"),
        (["--anchor", "bad.jsonl"], "--anchor: is of use with --sweep-scale only; leave it out"),
        (["--plot", "bad.svg"], "--plot: is of use with --sweep-scale only; leave it out"),
        (["--sweep-scale", "--plot", "taken"], "taken: exists already; choose another --plot or remove it"),
        (["--train-data", "bad.jsonl"], "--train-data: is of use where layers are packed only; leave it out"),
        (["--max-bpw", "5"], "fuse.max_bpw: has no effect where no layer is packed; leave it out"),
        (["--base", "tiny"], "--base: is of use for a quantized base only; leave it out"),
        (["--sweep-scale", "--scale", "1"], "--scale: is what --sweep-scale chooses; give one of them"),
        (["--q-bits", "8", "--dequantize"], "command line: fuse: bits and dequantize exclude each other; "),
        (["--keep", "2"], "Invalid value for '--keep': 2.0 is not in the range 0<=x<=1. (`mlxtune fuse --help`)"),
        (["--adapter-path", "absent"], "absent: is not an adapter folder; give the folder with adapters.safetensors"),
        (["--adapter-path", "taken"], "taken: has no adapter_config.json; give the folder that `mlxtune train` wrote"),
        (["--model", "absent"], "absent: no such folder; give a model folder, a hub id `owner/name`, or `tiny`"),
        (["--model", "ADAPTER"], "ADAPTER: has no config.json; give the folder of the base model, not of the adapter"),
        (["--data", "bad.jsonl"], "bad.jsonl:1: has the columns `x`; "),
        (["--data", "absent.jsonl"], "absent.jsonl: "),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("without_weights")
def test_wrong_input(
    invoke: Invoke,
    listing: Listing,
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    args: list[str],
    line: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("taken").mkdir()
    Path("bad.jsonl").write_text('{"x": 1}\n')
    adapter = str(trained / "run" / "adapter")
    before = listing(tmp_path)
    given = {"--model": "tiny", "--adapter-path": adapter, "--save-path": "new/fused"}
    given = {name: value for name, value in given.items() if name not in args}
    code, out, err = invoke("fuse", *sum(given.items(), ()), *(arg.replace("ADAPTER", adapter) for arg in args))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"error: {line.replace('ADAPTER', adapter)}")
    assert listing(tmp_path) == before


def test_no_folder_to_write(invoke: Invoke, trained: Path) -> None:
    code, out, err = invoke("fuse", "--model", "tiny", "--adapter-path", trained / "run" / "adapter")
    assert (code, out, err) == (2, "", "error: --save-path: names no folder to write; give one, or --sweep-scale\n")


def test_an_adapter_that_does_not_fit(
    invoke: Invoke, listing: Listing, broken: Broken, trained: Path, tmp_path: Path
) -> None:
    model, adapter = broken("smaller"), trained / "run" / "adapter"
    before = listing(tmp_path)
    args = ["fuse", "--model", model, "--adapter-path", adapter, "--save-path", tmp_path / "new" / "fused"]
    code, out, err = invoke(*args)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"error: {adapter}: ")
    assert listing(tmp_path) == before


def test_inside_its_own_input(invoke: Invoke, listing: Listing, broken: Broken, trained: Path, tmp_path: Path) -> None:
    model, adapter = broken("smaller"), trained / "run" / "adapter"
    before = listing(tmp_path)
    out = model / "fused"
    line = f"error: {out}: lies inside its own input; choose a folder outside it\n"
    assert invoke("merge", "--model", model, "--adapter-path", adapter, "--save-path", out) == (2, "", line)
    assert listing(tmp_path) == before


def test_another_base_is_refused(invoke: Invoke, listing: Listing, trained: Path, tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", trained / "run" / "adapter"
    invoke("quantize", "tiny", "--mlx-path", base, "--q-bits", "8")
    before = listing(tmp_path)
    code, out, err = invoke("fuse", "--model", base, "--adapter-path", adapter, "--save-path", tmp_path / "fused")
    assert (code, out) == (2, "")
    assert err == (
        f"error: {adapter}: was trained on another base than {base}; give that base; or, to use it all the same, "
        "remove base_fingerprint from its adapter_config.json\n"
    )
    assert listing(tmp_path) == before
