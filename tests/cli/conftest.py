"""What the tests of commands share: commands run in this process, folders compared, small data, broken models."""

import hashlib
import json
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlxtune import adapter, model
from mlxtune.cli import main

# fmt: off
WORDS = [
    "card", "parcel", "invoice", "voucher", "laptop", "refund", "basket", "kettle", "address", "window",
    "courier", "battery", "garden", "receipt", "charger", "blanket", "printer", "discount", "warranty", "jacket",
    "mirror", "ticket", "speaker", "cable", "bottle", "pillow", "ladder", "camera", "wallet", "bicycle",
]
# fmt: on
ANSWERS = ("it is on its way", "please send a photo", "your money is back")


@pytest.fixture
def invoke(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., tuple[int, str, str]]]:
    """Runs a command line in this process; returns exit code, stdout and stderr."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}

    def call(*args: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main([str(arg) for arg in args])
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), out, err

    yield call
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def listing() -> Callable[[Path], dict[str, str]]:
    """Every path below a folder with the sha256 of its content; a folder has the text `folder`."""

    def of(folder: Path) -> dict[str, str]:
        return {
            str(path.relative_to(folder)): "folder" if path.is_dir() else hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*"))
        }

    return of


def questions(count: int, seed: int) -> list[dict[str, Any]]:
    """Rows of different questions with one of three answers."""
    draw = random.Random(seed)
    return [
        {
            "messages": [
                {"role": "user", "content": " ".join(draw.sample(WORDS, 5))},
                {"role": "assistant", "content": ANSWERS[number % len(ANSWERS)]},
            ]
        }
        for number in range(count)
    ]


@pytest.fixture(scope="session")
def write_rows() -> Callable[..., Path]:
    """Writes a file of `count` chat rows, or of the `rows` given, and returns its path."""

    def write(path: Path, count: int = 30, *, seed: int = 0, rows: list[Any] | None = None) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(row) for row in (questions(count, seed) if rows is None else rows)]
        path.write_text("".join(f"{line}\n" for line in lines))
        return path

    return write


Logits = Callable[..., mx.array]
TOKENS = mx.array([[1, 40, 300, 7, 900, 12, 2]])


@pytest.fixture
def logits() -> Logits:
    """The logits (1, T, V) of a model folder, with an adapter where one is given, as mlxtune computes them."""

    def of(folder: Path, adapter_path: Path | None = None) -> mx.array:
        lm = model.load(folder)
        if adapter_path is not None:
            adapter.load(lm, adapter_path)
        return lm.net(TOKENS)

    return of


@pytest.fixture
def plain_logits() -> Logits:
    """As `logits`, by plain mlx-lm with no code of mlxtune."""
    import mlx_lm

    def of(folder: Path, adapter_path: Path | None = None) -> mx.array:
        net, _ = mlx_lm.load(str(folder), adapter_path=str(adapter_path) if adapter_path is not None else None)
        return net(TOKENS)

    return of


@pytest.fixture
def far() -> Callable[[mx.array, mx.array], float]:
    """The largest difference of two arrays."""
    return lambda a, b: mx.abs(a.astype(mx.float32) - b.astype(mx.float32)).max().item()


@pytest.fixture
def without_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever loads weights in this test fails it."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the weights were loaded")

    monkeypatch.setattr(model, "load", refuse)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, write_rows: Callable[..., Path]) -> Path:
    """A folder with `data.jsonl` and `run/`, what `mlxtune train` left of it. Nobody changes it."""
    folder = tmp_path_factory.mktemp("trained")
    data = write_rows(folder / "data.jsonl", 40)
    train = ["train", "--model", "tiny", "--data", data, "--iters", "8", "--batch-size", "4", "--learning-rate", "5e-3"]
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as caught:
        main([*map(str, train), "--out", str(folder / "run")])
    signal.signal(signal.SIGTERM, before)
    assert not caught.value.code
    return folder


@pytest.fixture(scope="session")
def unbound(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The adapter of `trained`, in a run of its own, as one that does not say which base it belongs to."""
    run = tmp_path_factory.mktemp("unbound") / "run"
    shutil.copytree(trained / "run", run)
    _change(run / "adapter" / "adapter_config.json", base_fingerprint=None)
    return run / "adapter"


def _no_template(folder: Path) -> None:
    _change(folder / "tokenizer_config.json", chat_template=None)


def _other_architecture(folder: Path) -> None:
    _change(folder / "config.json", model_type="gadget")


def _nan(folder: Path) -> None:
    weights = dict(mx.load(str(folder / "model.safetensors")))
    weights["model.norm.weight"] = mx.full(weights["model.norm.weight"].shape, float("nan"))
    mx.save_safetensors(str(folder / "model.safetensors"), weights)


def _missing_shard(folder: Path) -> None:
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _cut(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:100_000])


def _no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def _own_code(folder: Path) -> None:
    _change(folder / "config.json", model_file="model.py")


def _smaller(folder: Path) -> None:
    """Not broken: two of the embedded model's three blocks, which no adapter of all three fits."""
    _change(folder / "config.json", num_hidden_layers=2)
    weights = mx.load(str(folder / "model.safetensors"))
    kept = {name: value for name, value in weights.items() if "layers.2" not in name}
    mx.save_safetensors(str(folder / "model.safetensors"), kept)


def _change(file: Path, **changes: Any) -> None:
    value = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: each for key, each in value.items() if each is not None}))


BREAKS: dict[str, Callable[[Path], None]] = {
    "no template": _no_template,
    "other architecture": _other_architecture,
    "nan": _nan,
    "missing shard": _missing_shard,
    "cut": _cut,
    "no config": _no_config,
    "no tokenizer": _no_tokenizer,
    "own code": _own_code,
    "smaller": _smaller,
}


@pytest.fixture
def broken(tiny: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Makes a copy of the embedded model, `model/` in the test's folder, with one thing wrong (see `BREAKS`)."""

    def make(what: str) -> Path:
        folder = tmp_path / "model"
        shutil.copytree(tiny, folder)
        BREAKS[what](folder)
        return folder

    return make
