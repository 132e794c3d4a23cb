"""What makes a model folder malformed: functions that change a copy of a good one, and `refused` after them."""

import json
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlxtune.cli import main

Spoil = Callable[[Path], Any]


def set_json(name: str, **values: Any) -> Spoil:
    """Changes values of a JSON file; None takes a key away."""

    def spoil(folder: Path) -> None:
        file = folder / name
        changed = (json.loads(file.read_text()) if file.exists() else {}) | values
        file.write_text(json.dumps({key: value for key, value in changed.items() if value is not None}))

    return spoil


def edit(name: str, change: Callable[[Any], Any]) -> Spoil:
    """Lets `change` work on the value of a JSON file."""

    def spoil(folder: Path) -> None:
        value = json.loads((folder / name).read_text())
        change(value)
        (folder / name).write_text(json.dumps(value))

    return spoil


def both(*spoils: Spoil) -> Spoil:
    return lambda folder: [spoil(folder) for spoil in spoils]


def whole_index(**changes: Any) -> Spoil:
    """An index of all tensors of model.safetensors, but for these changes; None takes a tensor away."""

    def spoil(folder: Path) -> None:
        names = dict.fromkeys(mx.load(str(folder / "model.safetensors")), "model.safetensors") | changes
        index(**{name: home for name, home in names.items() if home is not None})(folder)

    return spoil


def in_header(change: Callable[[dict[str, Any]], Any]) -> Spoil:
    """Lets `change` work on the header of model.safetensors; its bytes stay."""

    def spoil(folder: Path) -> None:
        file = folder / "model.safetensors"
        content = file.read_bytes()
        end = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:end])
        change(header)
        made = json.dumps(header).encode()
        file.write_bytes(len(made).to_bytes(8, "little") + made + content[end:])

    return spoil


def index(**weight_map: Any) -> Spoil:
    return set_json("model.safetensors.index.json", weight_map=weight_map)


def set_tensor(name: str, value: mx.array | None) -> Spoil:
    def spoil(folder: Path) -> None:
        file = folder / "model.safetensors"
        weights = mx.load(str(file)) | {name: value}
        mx.save_safetensors(str(file), {key: each for key, each in weights.items() if each is not None})

    return spoil


def write(name: str, content: bytes) -> Spoil:
    return lambda folder: (folder / name).write_bytes(content)


def remove(*names: str) -> Spoil:
    return lambda folder: [(folder / name).unlink() for name in names]


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def dangle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("blobs/gone")


def add_token(content: str, *, special: bool) -> Spoil:
    def spoil(folder: Path) -> None:
        file = folder / "tokenizer.json"
        value = json.loads(file.read_text())
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": special}
        value["added_tokens"].append({"id": 1024, "content": content, **flags})
        file.write_text(json.dumps(value))

    return spoil


def with_code(folder: Path) -> None:
    set_json("tokenizer_config.json", tokenizer_class="Own", auto_map={"AutoTokenizer": ["own.Own", None]})(folder)
    code = f"from pathlib import Path\nPath({str(folder / 'RAN')!r}).touch()\nclass Own: pass\n"
    (folder / "own.py").write_text(code)


def refused(source: Path, spoil: Spoil, line: str, scratch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Spoils a copy of a folder, and sees `convert` refuse it in that line, with exit code 2 and nothing left behind.

    What stands for ~ in the line are the words of a library.
    """
    folder = Path(shutil.copytree(source, scratch / "model"))
    spoil(folder)
    before = sorted(scratch.rglob("*"))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    capsys.readouterr()
    try:
        with pytest.raises(SystemExit) as caught:
            main(["convert", str(folder), "--mlx-path", str(scratch / "out")])
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    out, err = capsys.readouterr()
    found = err.replace(str(folder), "DIR")
    assert re.fullmatch("error: " + re.escape(line).replace("\\~", ".+") + "\n", found), found
    assert (caught.value.code, out) == (2, "")
    assert len(found) < 400
    assert sorted(scratch.rglob("*")) == before
