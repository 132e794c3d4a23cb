"""Model folders, checked before MLX reads them: the config, the index, the weights' headers. Reads no weights.

Knows the layout that the hub's models have and which of their files belong together; knows no networks.
"""

import contextlib
import hashlib
import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlxtune import architecture, claims, headers
from mlxtune.errors import ModelError, TrustError
from mlxtune.headers import Tensor
from mlxtune.rundir import read_json

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
GENERATION, MODELOPT = "generation_config.json", "hf_quant_config.json"
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
SETTINGS_BYTES = 64 * 2**20  # of a config or an index
SAMPLES, SAMPLE_BYTES = 64, 65_536
AGAIN = "download the model again"


def check(path: Path) -> dict[str, Any]:
    """The config of a model folder whose files are all there and well-formed. Reads headers, no weights.

    Raises ModelError for what is missing or wrong, TrustError for a model that asks to run its own code.
    """
    config = _config(path)
    architecture.arguments(config, path / CONFIG)  # said before what is wrong with the weights
    found = tensors(path)
    architecture.check(config, len(found), path / CONFIG)
    claims.check(config, found, path)
    if not any((path / name).is_file() for name in TOKENIZERS):
        raise ModelError("has no tokenizer", where=path, hint="copy tokenizer.json from the original model")
    return config


def tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a model, from the headers of its files: each in one of them, and where the index says.

    Raises ModelError for malformed files, and for tensors that are missing, elsewhere or not in the index.
    """
    files = weight_files(path)
    index = _index(path)
    found: dict[str, Tensor] = {}
    homes: dict[str, str] = {}
    for file in files:
        read = headers.read(file)
        if not read:
            raise ModelError("holds no tensors", where=file, hint=AGAIN)
        for name, tensor in read.items():
            if index is not None and index.get(name) != file.name:
                place = f"its index places in {index[name]!r}" if name in index else "its index does not name"
                raise ModelError(f"holds {ascii(name)}, which {place}", where=file, hint=AGAIN)
            if name in homes:
                raise ModelError(f"holds {ascii(name)}, as {homes[name]} does", where=file, hint=AGAIN)
            homes[name], found[name] = file.name, tensor
    for name, home in (index or {}).items():
        if name not in found:
            raise ModelError(f"lacks {ascii(name)}, which the index places there", where=path / home, hint=AGAIN)
    return found


def weight_files(path: Path) -> list[Path]:
    """The weight files of a folder, each present: those that its index names, or all where it has none.

    Raises ModelError.
    """
    index = _index(path)
    if index is not None:
        for name in sorted(set(index.values())):
            if not _is_file(path / name):
                shown = name if len(name) <= 80 else f"{name[:80]}…"
                raise ModelError(f"lacks the weights {shown}, which its index names", where=path, hint=AGAIN)
        return [path / name for name in sorted(set(index.values()))]
    files = sorted(file for file in path.glob("model*.safetensors") if file.is_file() or file.is_symlink())
    for file in files:
        if not _is_file(file):
            raise ModelError("is a link to nothing", where=file, hint=AGAIN)
        _check_siblings(file)
    if files:
        return files
    if any(path.glob("*.bin")) or any(path.glob("*.pt*")):
        raise ModelError(
            "has pickled weights only, which can run code when read",
            where=path,
            hint="use a revision with .safetensors files",
        )
    raise ModelError("has no weights (model*.safetensors)", where=path, hint=AGAIN)


def stale(path: Path) -> list[Path]:
    """Weight files beside those that the index names, left by another download or version. They are not read.

    mlx-lm would read them. Of a malformed folder, none: `check` says what is wrong with it.
    """
    try:
        named = set(weight_files(path))
    except ModelError:
        return []
    return sorted(file for file in path.glob("model*.safetensors") if file not in named)


def fingerprint(path: Path) -> str:
    """A sha256 that tells a model's weights from others, quickly: of every file's length, and of 64 places in it.

    A safetensors file begins with the names, types and places of its tensors, and that beginning is among them.
    """
    digest = hashlib.sha256()
    for file in weight_files(path):
        length = file.stat().st_size
        digest.update(length.to_bytes(8, "little"))
        with file.open("rb") as opened:
            for place in range(0, length, max(SAMPLE_BYTES, length // SAMPLES)):
                opened.seek(place)
                digest.update(opened.read(SAMPLE_BYTES))
    return digest.hexdigest()


@contextlib.contextmanager
def only_what_is_named(path: Path, config: dict[str, Any]) -> Iterator[Path]:
    """A folder for mlx-lm's `load_model` with links to the weight files of `path`, and `config` as its config.

    It reads every file that is called model*.safetensors, named by the index or not, and none that is called
    otherwise. MLX keeps what it has opened, so the weights can be read when the folder has gone.
    """
    with tempfile.TemporaryDirectory(prefix="mlxtune-") as made:
        folder = Path(made)
        for number, file in enumerate(weight_files(path)):
            (folder / f"model-{number:05d}.safetensors").symlink_to(file.resolve())
        if _is_file(path / GENERATION):
            (folder / GENERATION).symlink_to((path / GENERATION).resolve())
        (folder / CONFIG).write_text(json.dumps(config), encoding="utf-8")
        yield folder


def _config(path: Path) -> dict[str, Any]:
    """The config, without what it says of the network's sizes having been looked at."""
    if not path.is_dir():
        raise ModelError("is not a model folder", where=path, hint="give a folder with config.json and weights")
    file = path / CONFIG
    if not _is_file(file):
        hint = (
            "give the folder of the base model, not of the adapter" if _is_file(path / "adapter_config.json") else AGAIN
        )
        raise ModelError("has no config.json", where=path, hint=hint)
    config = _settings(file)
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ModelError("names no model_type", where=file, hint=AGAIN)
    if config.get("model_file"):
        raise TrustError(
            f"asks to run its own code, {config['model_file']}",
            where=path,
            hint="mlxtune runs no code from model folders",
        )
    if _is_file(path / MODELOPT) and claims.source_claim(config) is None and "quantization" not in config:
        config["quantization_config"] = _settings(path / MODELOPT)  # as mlx-lm does
    return config


def _index(path: Path) -> dict[str, str] | None:
    """Tensor -> file of the folder, or None where there is no index."""
    file = path / INDEX
    if not _is_file(file):
        return None
    value = _settings(file)
    names = value.get("weight_map") if isinstance(value, dict) else None
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise ModelError("has no weight_map", where=file, hint=AGAIN)
    for name in sorted(set(names.values())):
        if Path(name).name != name or "\0" in name:
            raise ModelError(f"names {_short(name)}, which is no file of its folder", where=file)
        if not name.endswith(".safetensors") or not name.isprintable():
            raise ModelError(f"names {_short(name)}, which is no .safetensors file", where=file, hint=AGAIN)
    return names


def _settings(file: Path) -> Any:
    """The value of a config or an index, in which no name may be repeated: readers differ in which one counts."""
    if file.stat().st_size > SETTINGS_BYTES:
        raise ModelError(f"has {file.stat().st_size} bytes, too many for settings", where=file, hint=AGAIN)
    value = read_json(file)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            names = [name for name, _ in pairs]
            repeated = next(name for name in made if names.count(name) > 1)
            raise ModelError(f"names {_short(repeated)} twice", where=file, hint=AGAIN)
        return made

    json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=unique)
    return value


def _check_siblings(file: Path) -> None:
    """Refuses `model-00001-of-00003.safetensors` without the other two."""
    parts = re.fullmatch(r"(model-)(\d{5})(-of-)(\d{5})(\.safetensors)", file.name)
    for number in range(1, int(parts[4]) + 1) if parts else ():
        assert parts is not None
        sibling = file.with_name(f"{parts[1]}{number:05d}{parts[3]}{parts[4]}{parts[5]}")
        if not _is_file(sibling):
            raise ModelError(f"lacks the weights {sibling.name}", where=file.parent, hint=AGAIN)


def _is_file(file: Path) -> bool:
    """Whether there is a regular file: no folder, and no pipe, which would never end."""
    try:
        return file.is_file()
    except OSError:  # a name that is too long, a folder that may not be looked into
        return False


def _short(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:80]}…"
