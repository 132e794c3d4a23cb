"""`mlxtune train`: exact files and output, a file or a folder, signals and going on, plain mlx-lm, what is refused."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlxtune import machine, recipe
from mlxtune.cli import display
from mlxtune.tokenizer import PLAIN_TEMPLATE

Invoke = Callable[..., tuple[int, str, str]]
Listing = Callable[[Path], dict[str, str]]
Broken = Callable[[str], Path]
WriteRows = Callable[..., Path]
Logits = Callable[..., mx.array]
Far = Callable[[mx.array, mx.array], float]

ADAPTER = ["adapter", "adapter/adapter_config.json", "adapter/adapters.safetensors", "adapter/training.json"]
DATA = ["data", "data/audit.json", "data/test.jsonl", "data/train.jsonl", "data/valid.jsonl"]
FILES = [".lock", *ADAPTER, *DATA, "log.jsonl", "loss.svg", "origin.json", "recipe.yaml"]
SHORT = ["--iters", "4", "--batch-size", "4", "--learning-rate", "1e-3"]


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_one_file_is_split(
    invoke: Invoke, listing: Listing, write_rows: WriteRows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = write_rows(Path("tickets.jsonl"), 40)
    code, out, err = invoke("train", "--model", "tiny", "--data", data, *SHORT)
    assert (code, out) == (0, "runs/tickets/adapter\n")
    stages = [line.split()[1] for line in err.splitlines() if line.startswith((" ✓", " ·"))]
    # the first validation row is answered each time
    assert len(re.findall(r"^   \d/4: validation loss [\d.]+  '", err, re.MULTILINE)) == 4
    assert stages == ["audit", "split", "convert", "quantize", "train"]
    assert " · quantize       skipped: the recipe has no quantize section\n" in err
    assert list(listing(tmp_path / "runs" / "tickets")) == FILES

    run = tmp_path / "runs" / "tickets"
    given = lines_of(data)
    parts = {name: lines_of(run / "data" / f"{name}.jsonl") for name in ("train", "valid", "test")}
    assert {name: len(rows) for name, rows in parts.items()} == {"train": 30, "valid": 5, "test": 5}
    assert sorted(map(json.dumps, given)) == sorted(json.dumps(row) for rows in parts.values() for row in rows)
    assert recipe.load(run / "recipe.yaml") == recipe.build(
        {"data": "tickets.jsonl", "train": {"iters": 4, "batch_size": 4, "learning_rate": 1e-3}}
    )
    assert [line["step"] for line in lines_of(run / "log.jsonl")] == [1, 2, 3, 4]
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert config["fine_tune_type"] == "lora"
    assert config["num_layers"] == 3
    assert (config["lora_parameters"]["rank"], config["lora_parameters"]["scale"]) == (16, 2.0)


def test_a_folder_keeps_its_splits(invoke: Invoke, listing: Listing, write_rows: WriteRows, tmp_path: Path) -> None:
    for number, name in enumerate(("train", "val", "test")):
        write_rows(tmp_path / "data" / f"{name}.jsonl", 8, seed=number)
    run = tmp_path / "run"
    code, out, err = invoke("train", "--model", "tiny", "--data", tmp_path / "data", "--out", run, *SHORT, "--json")
    assert code == 0
    assert " ✓ split          train 8 · valid 8 · test 8\n" in err
    for ours, theirs in (("train", "train"), ("valid", "val"), ("test", "test")):
        assert (run / "data" / f"{ours}.jsonl").read_bytes() == (tmp_path / "data" / f"{theirs}.jsonl").read_bytes()
    assert list(listing(run)) == FILES

    value = json.loads(out)
    assert out.count("\n") == 1
    assert value.keys() == {"training", "paths"}
    training = json.loads((run / "adapter" / "training.json").read_text())
    assert value["training"] == training
    assert (training["steps"], training["rows"], training["epochs"], training["resumed_at"]) == (4, 8, 2.0, None)
    assert value["paths"]["run"] == str(run)
    assert value["paths"]["adapter"] == str(run / "adapter")
    assert value["paths"]["fused"] is None


def test_a_folder_with_only_a_train_file(invoke: Invoke, write_rows: WriteRows, tmp_path: Path) -> None:
    write_rows(tmp_path / "data" / "train.jsonl", 40)
    flags = ["--set", "data.valid=0.2", "--set", "data.test=0", *SHORT]
    code, _, err = invoke("train", "--data", tmp_path / "data", "--out", tmp_path / "run", *flags)
    assert code == 0
    assert " ✓ split          train 31 · valid 9 · test 0\n" in err
    assert (tmp_path / "run" / "data" / "test.jsonl").read_bytes() == b""


def test_plain_mlx_lm_reads_the_adapter(
    trained: Path, tiny: Path, logits: Logits, plain_logits: Logits, far: Far
) -> None:
    adapter = trained / "run" / "adapter"
    assert far(logits(tiny, adapter), logits(tiny)) > 0.1
    assert far(plain_logits(tiny, adapter), logits(tiny, adapter)) < 1e-5


def test_a_quantized_base(
    invoke: Invoke, write_rows: WriteRows, tmp_path: Path, logits: Logits, plain_logits: Logits, far: Far
) -> None:
    data, run = write_rows(tmp_path / "d.jsonl", 30), tmp_path / "run"
    assert invoke("train", "--data", data, "--out", run, "--q-bits", "8", *SHORT)[0] == 0
    # mlx-lm multiplies packed weights, mlxtune expands them first: the same sums in another order
    assert far(plain_logits(run / "base", run / "adapter"), logits(run / "base", run / "adapter")) < 2e-4
    assert json.loads((run / "adapter" / "adapter_config.json").read_text())["model"] == str(run / "base")


def test_an_mlx_lm_file(invoke: Invoke, write_rows: WriteRows, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "d.jsonl", 30)
    config = tmp_path / "lora.yaml"
    config.write_text(
        f"model: tiny\ntrain: true\ndata: {data}\niters: 4\nbatch_size: 4\nlearning_rate: 1e-3\nnum_layers: 1\n"
        "lora_parameters: {rank: 4, alpha: 8, dropout: 0.0, keys: [self_attn.q_proj]}\n"
    )
    assert invoke("lora", "--train", "--config", config, "--out", tmp_path / "run")[0] == 0
    weights = mx.load(str(tmp_path / "run" / "adapter" / "adapters.safetensors"))
    assert {name: value.shape for name, value in weights.items()} == {
        "model.layers.2.self_attn.q_proj.lora_a": (192, 4),
        "model.layers.2.self_attn.q_proj.lora_b": (4, 192),
    }


def test_again_skips_and_another_recipe_is_refused(
    invoke: Invoke, listing: Listing, write_rows: WriteRows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, run = write_rows(tmp_path / "d.jsonl", 30), tmp_path / "run"
    args = ["train", "--data", data, "--out", run, *SHORT]
    first = invoke(*args)
    before = listing(tmp_path)
    code, out, err = invoke(*args)
    assert (code, out) == (0, first[1])
    assert err.splitlines() == [
        " · audit          skipped: done already",
        " · split          skipped: done already",
        " · convert        skipped: done already",
        " · quantize       skipped: the recipe has no quantize section",
        " · train          skipped: done already",
    ]
    differs = "holds a run of another recipe (seed: 0 there, 1 here)"
    line = f"error: {run}: {differs}; choose another --out, or remove the folder\n"
    assert invoke(*args, "--seed", "1") == (2, "", line)
    assert listing(tmp_path) == before
    rows = data.read_text()
    data.write_text(rows.replace("on its way", "under way"))
    line = f"error: {run}: holds a run of other data: {data} has changed since; "
    assert invoke(*args) == (2, "", f"{line}choose another --out, or remove the folder\n")
    data.write_text(rows)
    assert listing(tmp_path) == before


def interrupted_at(step: int, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sends the signal `number` to this process when update `step` is shown."""
    update = display.Progress.update

    def shown(self: display.Progress, done: int, detail: str = "") -> None:
        update(self, done, detail)
        if self.label == "train" and done == step:
            signal.raise_signal(number)

    monkeypatch.setattr(display.Progress, "update", shown)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_the_same_command_ends_the_same(
    invoke: Invoke,
    logits: Logits,
    far: Far,
    trained: Path,
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    code: int,
) -> None:
    data, run = trained / "data.jsonl", tmp_path / "run"
    args = ["train", "--model", "tiny", "--data", data, "--iters", "8", "--batch-size", "4", "--learning-rate", "5e-3"]
    with monkeypatch.context() as patch:
        interrupted_at(3, number, patch)
        stopped, out, err = invoke(*args, "--out", run)
    assert (stopped, out) == (code, "")
    checkpoint = run / "checkpoints" / "step-0000003"
    assert err.splitlines()[-1] == (
        f"error: stopped after update 3 of 8; {checkpoint} keeps it; run the same command to go on"
    )
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-0000003"]
    assert not (run / "adapter").exists()
    assert far(logits(tiny, checkpoint), logits(tiny)) > 0  # it is an adapter folder too

    assert invoke(*args, "--out", run)[:2] == (0, f"{run / 'adapter'}\n")
    whole = trained / "run"
    for name in ("adapters.safetensors", "adapter_config.json"):
        assert (run / "adapter" / name).read_bytes() == (whole / "adapter" / name).read_bytes()
    assert json.loads((run / "adapter" / "training.json").read_text())["resumed_at"] == 3
    same = ("step", "train_loss", "valid_loss", "learning_rate")
    logs = [[{name: line[name] for name in same} for line in lines_of(each / "log.jsonl")] for each in (run, whole)]
    assert logs[0] == logs[1]


def test_ctrl_c_in_a_process_of_its_own(invoke: Invoke, trained: Path, tmp_path: Path) -> None:
    """As a user does it: SIGINT at some moment of the training, and the command again."""
    flags = ["--iters", "24", "--batch-size", "4", "--steps-per-report", "1", "--steps-per-eval", "12"]
    args = ["train", "--data", str(trained / "data.jsonl"), *flags, "--out"]
    run = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "mlxtune", *args, run], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    ends = time.monotonic() + 60
    while not (run / "log.jsonl").exists() and process.poll() is None and time.monotonic() < ends:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert err.splitlines()[-1].startswith("error: stopped after update ")
    assert len(list((run / "checkpoints").iterdir())) == 1
    assert not (run / "adapter").exists()

    assert invoke(*args, run)[0] == 0
    assert invoke(*args, tmp_path / "whole")[0] == 0
    adapters = [(folder / "adapter" / "adapters.safetensors").read_bytes() for folder in (run, tmp_path / "whole")]
    assert adapters[0] == adapters[1]


ASKED = {"role": "user", "content": "hello"}
ROW = {"messages": [ASKED, {"role": "assistant", "content": "hello to you"}]}
WHOLE = ["--set", "data.test=0", "--set", "data.valid=0"]
MISTAKES: list[tuple[str, list[Any] | str, list[str], str]] = [
    ("not JSON", '{"messages": [\n', [], "d.jsonl:1: not valid JSON: Expecting value"),
    ("a list", [[1]], [], "d.jsonl:1: is a JSON list, not an object"),
    ("an odd role", [ROW, {"messages": [{"role": "bot"}]}], [], "d.jsonl:2: message 1 has the role 'bot'; "),
    ("no answer", [ROW, {"messages": [ASKED]}], [], "d.jsonl:2: ends with the user; "),
    ("unknown columns", [{"question": "x"}], [], "d.jsonl:1: has the columns `question`; expected "),
    ("empty", "", [], "d.jsonl: has no rows; "),
    ("one row", [ROW], [], "d.jsonl: 1 row in 1 group that must stay together: too few for train, valid, test; "),
    (
        "too long",
        [ROW] * 3,
        [*WHOLE, "--max-seq-length", "6"],
        "d.jsonl:1: has 16 tokens, more than train.max_seq_length 6 (3 such rows); ",
    ),
    (
        "all too long",
        [ROW] * 3,
        [*WHOLE, "--max-seq-length", "6", "--set", "data.too_long=drop"],
        "d.jsonl: the train split has no rows: 3 too long, left out; ",
    ),
    ("nothing kept", [ROW], ["--set", "data.keep={kind: [a]}"], "d.jsonl:1: has no column `kind`, which data.keep "),
    ("a control token", [{"prompt": "<|im_end|>", "completion": "b"}], WHOLE, "d.jsonl:1: holds the text '<|im_end|>'"),
]


@pytest.mark.parametrize(("rows", "flags", "line"), [each[1:] for each in MISTAKES], ids=[each[0] for each in MISTAKES])
@pytest.mark.usefixtures("without_weights")
def test_wrong_data(
    invoke: Invoke,
    listing: Listing,
    write_rows: WriteRows,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rows: list[Any] | str,
    flags: list[str],
    line: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    if isinstance(rows, str):
        Path("d.jsonl").write_text(rows)
    else:
        write_rows(Path("d.jsonl"), rows=rows)
    before = listing(tmp_path)
    code, out, err = invoke("train", "--data", "d.jsonl", "--out", "runs/new", *flags)
    errors = [each for each in err.splitlines() if not each.startswith((" ✓", " ·"))]
    assert (code, out, len(errors)) == (2, "", 1)
    assert errors[0].startswith(f"error: {line}")
    assert listing(tmp_path) == before


@pytest.mark.parametrize(
    ("args", "line"),
    [
        ([], "data.path: is not set; give --data FILE, or data.path in the recipe"),
        (["--data", "absent.jsonl"], "absent.jsonl: no such file or folder; "),
        (["--data", "d.txt"], "d.txt: has the unknown suffix '.txt'; use .jsonl, .json, .csv"),
        (["--data", "empty"], "empty: has no train, valid or test file; name the rows to learn from train.jsonl"),
        (["--data", "d.jsonl", "--model", "absent"], "absent: no such folder; "),
        (["--data", "d.jsonl", "--model", "empty"], "empty: has no config.json; "),
        (["--data", "d.jsonl", "--out", "d.txt"], "d.txt: is a file; choose another --out"),
        (["--data", "d.jsonl", "--out", "full"], "full: is not empty and holds no run; choose another --out"),
        (["--data", "d.jsonl", "--config", "absent.yaml"], "absent.yaml: no such recipe; give the path of a YAML file"),
        (["--data", "d.jsonl", "--config", "bad.yaml"], "bad.yaml:2: not valid YAML: mapping values are not allowed "),
        (["--data", "d.jsonl", "--itres", "3"], "No such option '--itres'"),
        (["--data", "d.jsonl", "--iters", "x"], "Invalid value for '--iters': 'x' is not a valid integer"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("without_weights")
def test_wrong_usage(
    invoke: Invoke,
    listing: Listing,
    write_rows: WriteRows,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    args: list[str],
    line: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "full"):
        Path(name).mkdir()
    write_rows(Path("d.jsonl"), 30)
    for name in ("d.txt", "full/notes"):
        Path(name).write_text("{}")
    Path("bad.yaml").write_text("seed: 1\nmodel: a: b\n")
    before = listing(tmp_path)
    code, out, err = invoke("train", *args)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"error: {line}")
    assert listing(tmp_path) == before


@pytest.mark.parametrize(
    ("what", "flags", "code", "line"),
    [
        ("other architecture", [], 2, "model/config.json: has the unsupported architecture 'gadget'; "),
        ("missing shard", [], 2, "model: lacks the weights model-00002-of-00002.safetensors"),
        ("cut", [], 2, "model/model.safetensors: is no whole safetensors file"),
        ("own code", [], 4, "model: asks to run its own code"),
        ("nan", [], 2, "model: holds NaN or infinite values in model.norm.weight; "),
        ("nan", ["--q-bits", "8"], 2, "model: holds NaN or infinite values in model.norm.weight; "),
        ("smaller", ["--num-layers", "3"], 2, "lora.num_layers: is 3, but the model has 2 blocks; -1 means all"),
        ("smaller", ["--set", "lora.targets=wq"], 2, "lora.targets: 'wq' matches no layer; choose from all-linear, "),
    ],
)
def test_a_wrong_model(
    invoke: Invoke,
    listing: Listing,
    broken: Broken,
    write_rows: WriteRows,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    what: str,
    flags: list[str],
    code: int,
    line: str,
) -> None:
    """Nothing stays behind, not even what was made before the mistake could be seen: the folder is free again."""
    monkeypatch.chdir(tmp_path)
    broken(what)
    write_rows(Path("d.jsonl"), 30)
    Path("there").mkdir()
    before = listing(tmp_path)
    for folder in ("there", "runs/new"):
        got, out, err = invoke("train", "--model", "model", "--data", "d.jsonl", "--out", folder, *flags, *SHORT)
        errors = [each for each in err.splitlines() if not each.startswith((" ✓", " ·"))]
        assert (got, out, len(errors)) == (code, "", 1)
        assert errors[0].startswith(f"error: {line}")
        assert listing(tmp_path) == before


def test_a_model_without_a_template_gets_the_plain_one_for_good(
    invoke: Invoke, broken: Broken, write_rows: WriteRows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training, evaluation and the fused model's chat write a conversation the same way."""
    monkeypatch.chdir(tmp_path)
    broken("no template")
    write_rows(Path("d.jsonl"), 30)
    assert invoke("chat", "--model", "model")[0] == 2
    assert invoke("train", "--model", "model", "--data", "d.jsonl", "--out", "run", *SHORT)[0] == 0
    config = json.loads(Path("run/adapter/adapter_config.json").read_text())
    assert config["chat_template"] == PLAIN_TEMPLATE
    fuse = ["fuse", "--model", "model", "--adapter-path", "run/adapter", "--save-path", "fused", "--keep", 0]
    assert invoke(*fuse)[0] == 0
    assert json.loads(Path("fused/tokenizer_config.json").read_text())["chat_template"] == PLAIN_TEMPLATE
    scores = []
    for args in (["--model", "model", "--adapter-path", "run/adapter"], ["--model", "fused"]):
        code, out, _ = invoke("evaluate", *args, "--data", "run/data/test.jsonl", "--json")
        assert code == 0
        scores.append(json.loads(out)["scores"][0]["value"])
    assert scores[0] == pytest.approx(scores[1], rel=1e-4)
    code, out, _ = invoke("generate", "--model", "fused", "--prompt", "card", "--max-tokens", 3, "--json")
    assert code == 0


def test_gradient_checkpointing_saves_memory(tmp_path: Path) -> None:
    """In processes of their own: the order in which MLX walks a graph is set once."""
    fresh = {name: value for name, value in os.environ.items() if name != "MLX_BFS_MAX_WIDTH"}
    peaks = []
    for flag in ("--no-grad-checkpoint", "--grad-checkpoint"):
        command = [sys.executable, "-m", "mlxtune", "train", "--data", "tickets", "--out", str(tmp_path / flag)]
        settings = ["--iters", "3", "--batch-size", "32", "--steps-per-eval", "3", "--json", flag]
        done = subprocess.run([*command, *settings], env=fresh, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        peaks.append(json.loads(done.stdout)["training"]["peak_memory_gb"])
    assert peaks[1] < 0.9 * peaks[0]  # of three blocks, one is always there


def test_what_cannot_fit_is_refused_before_anything_is_loaded(
    invoke: Invoke,
    write_rows: WriteRows,
    listing: Listing,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    without_weights: None,
) -> None:
    data = write_rows(tmp_path / "d.jsonl", 30)
    before = listing(tmp_path)
    monkeypatch.setattr(machine, "usable_here", lambda: 12_000_000)
    code, out, err = invoke("train", "--data", data, "--out", tmp_path / "run", *SHORT)
    assert (code, out) == (2, "")
    line = err.splitlines()[-1]
    assert line.startswith("error: training takes about ")
    assert " of memory, and has 12.0 MB; what fits: `--batch-size 1 --grad-accumulation-steps 4` (" in line
    assert listing(tmp_path) == before


def test_a_batch_that_fits(invoke: Invoke, write_rows: WriteRows, tmp_path: Path) -> None:
    data, run = write_rows(tmp_path / "d.jsonl", 30), tmp_path / "run"
    args = ["train", "--data", data, "--out", run, "--iters", "2", "--batch-size", "auto"]
    code, _, err = invoke(*args)
    assert code == 0
    assert recipe.load(run / "recipe.yaml").train == recipe.TrainRecipe(iters=2, fit_batch=True)
    training = json.loads((run / "adapter" / "training.json").read_text())
    assert (training["batch_size"], training["grad_accumulation_steps"]) == (8, 1)
    assert " 2 updates of 1 x 8 rows, validation loss " in err
    assert invoke(*args)[0] == 0
