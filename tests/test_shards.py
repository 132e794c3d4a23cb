"""The writer: what other readers find in its files, places, shards, order, and what it holds in memory."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from safetensors import safe_open
from safetensors.numpy import load_file

from mlxtune import headers, model, shards
from mlxtune.shards import Job, Piece, Tensor

KINDS = [
    mx.bool_, mx.uint8, mx.int8, mx.uint16, mx.int16, mx.float16, mx.bfloat16, mx.uint32, mx.int32, mx.float32,
    mx.uint64, mx.int64, mx.complex64,
]  # fmt: skip


def arrays() -> dict[str, mx.array]:
    """One array of each type, of odd sizes, and shapes at the edge."""
    made = {f"a.{number}": (mx.arange(3 * number + 1) - 2).astype(kind) for number, kind in enumerate(KINDS)}
    made |= {"scalar": mx.array(1.5), "empty": mx.zeros((0, 3)), "ünïcode": mx.ones((2, 2), dtype=mx.bfloat16)}
    return made | {"turned": mx.arange(12).reshape(3, 4).T, "part": mx.arange(20.0).reshape(4, 5)[1:3, 1:4]}


def written(folder: Path, made: dict[str, mx.array]) -> Path:
    folder.mkdir()
    shards.write(folder, iter([shards.of_array(name, array) for name, array in made.items()]))
    return folder / "model.safetensors"


def test_others_read_what_was_written(tmp_path: Path) -> None:
    file = written(tmp_path / "a", arrays())
    read = mx.load(str(file))
    assert read.keys() == arrays().keys()
    for name, array in arrays().items():
        assert (read[name].dtype, read[name].shape) == (array.dtype, array.shape), name
        assert mx.array_equal(read[name], array).item(), name
    plain = {name: array for name, array in arrays().items() if array.dtype not in (mx.bfloat16, mx.complex64)}
    theirs = load_file(written(tmp_path / "b", plain))
    assert theirs.keys() == plain.keys()
    assert all(np.array_equal(theirs[name], np.array(array)) for name, array in plain.items())
    with safe_open(str(file), framework="numpy") as opened:
        assert opened.metadata() == {"format": "mlx"}
        assert set(opened.keys()) == arrays().keys()
    assert headers.read(file).keys() == arrays().keys()


def test_each_tensor_begins_at_a_multiple_of_its_width(tmp_path: Path) -> None:
    """Else torch, which looks at the bytes as they lie, cannot read it."""
    for name, tensor in headers.read(written(tmp_path / "a", arrays())).items():
        assert tensor.start % arrays()[name].dtype.size == 0, name


def test_the_same_bytes_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = written(tmp_path / "a", arrays()).read_bytes()
    monkeypatch.setattr(shards, "WRITE_BYTES", 3)  # as if the system took no more at once
    assert written(tmp_path / "b", arrays()).read_bytes() == first
    monkeypatch.setattr(shards.machine, "own_cores", lambda: 1)
    assert written(tmp_path / "c", dict(reversed(arrays().items()))).read_bytes() == first


def test_shards_and_their_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 100)
    sizes = {"a": 60, "b": 40, "c": 1, "d": 250, "e": 100, "f": 0}
    (tmp_path / "m").mkdir()
    pieces = [shards.of_array(name, mx.full((size,), 7, dtype=mx.uint8)) for name, size in sizes.items()]
    assert shards.write(tmp_path / "m", pieces) == 451
    names = [f"model-{number:05d}-of-00004.safetensors" for number in range(1, 5)]
    files = {"a": names[0], "b": names[0], "c": names[1], "d": names[2], "e": names[3], "f": names[3]}
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    assert index == {"metadata": {"total_size": 451}, "weight_map": files}
    assert sorted(each.name for each in (tmp_path / "m").iterdir()) == sorted([*names, "model.safetensors.index.json"])
    for name, size in sizes.items():
        assert np.array_equal(load_file(tmp_path / "m" / files[name])[name], np.full(size, 7))


def sliced(name: str, array: mx.array, rows: int, delay: float = 0.0) -> Piece:
    """The piece of a matrix, some rows a job; the first jobs take the longest."""

    def jobs() -> Iterator[Job]:
        for start in range(0, len(array), rows):

            def job(start: int = start) -> list[mx.array]:
                time.sleep(delay / (start + 1))
                return [array[start : start + rows] * 1, array[start : start + rows, :1] * 2]

            yield job

    shape = tuple(array.shape)
    return Piece((Tensor(name, array.dtype, shape), Tensor(f"{name}.double", array.dtype, (shape[0], 1))), jobs)


def test_jobs_that_end_in_any_order_are_written_in_theirs(tmp_path: Path) -> None:
    made = {name: mx.random.normal((17, 5)) for name in "abc"}
    mx.eval(made)
    seen: list[tuple[int, int]] = []
    pieces = [sliced(name, array, 3, delay=0.02) for name, array in made.items()]
    total = shards.write(tmp_path, pieces, lambda done, total: seen.append((done, total)))
    read = load_file(tmp_path / "model.safetensors")
    for name, array in made.items():
        np.testing.assert_array_equal(read[name], np.array(array))
        np.testing.assert_array_equal(read[f"{name}.double"], 2 * np.array(array)[:, :1])
    assert total == 3 * 17 * 6 * 4
    assert [done for done, _ in seen] == sorted({done for done, _ in seen}) and seen[-1] == (total, total)


@pytest.mark.parametrize(("rows", "problem"), [(3, "smaller"), (5, "larger")])
def test_a_piece_that_is_not_as_planned(tmp_path: Path, rows: int, problem: str) -> None:
    piece = Piece((Tensor("a", mx.float32, (4, 2)),), lambda: [lambda: [mx.zeros((rows, 2))]])
    with pytest.raises(ValueError, match=f"{problem} than planned"):
        shards.write(tmp_path, [piece])


def test_what_a_job_raises_ends_it(tmp_path: Path) -> None:
    started: list[int] = []

    def jobs() -> Iterator[Job]:
        for number in range(100):

            def job(number: int = number) -> list[mx.array]:
                started.append(number)
                if number == 3:
                    raise KeyError("three")
                return [mx.zeros((1, 2))]

            yield job

    before = mx.set_cache_limit(123_456_789)
    try:
        with pytest.raises(KeyError, match="three"):
            shards.write(tmp_path, [Piece((Tensor("a", mx.float32, (100, 2)),), jobs)])
        assert mx.set_cache_limit(before) == 123_456_789
    finally:
        mx.set_cache_limit(before)
    assert len(started) < 20


def test_no_more_than_one_lazy_tensor_is_held(tmp_path: Path) -> None:
    """40 tensors of 4 MB, read and computed: plain MLX holds the results of all, 160 MB."""
    source = {f"w.{number}": mx.random.normal((1024, 1024)) for number in range(40)}
    mx.save_safetensors(str(tmp_path / "source.safetensors"), source)
    expected = {name: (mx.sum(array * 2).item()) for name, array in source.items()}
    del source
    lazy = mx.load(str(tmp_path / "source.safetensors"))
    pieces = [shards.of_array(name, lazy.pop(name) * 2) for name in list(lazy)]
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    (tmp_path / "m").mkdir()
    shards.write(tmp_path / "m", iter([pieces.pop(0) for _ in range(40)]))
    assert mx.get_peak_memory() - before < 3 * 4 * 2**20 + 2**20
    read = mx.load(str(tmp_path / "m" / "model.safetensors"))
    assert all(mx.sum(read[name]).item() == total for name, total in expected.items())


def test_a_network_is_written_as_it_is(tiny: Path, tmp_path: Path) -> None:
    net = model.load(tiny, stored=True).net
    assert shards.write(tmp_path, shards.of_network(net)) == 4 * 1_377_600
    read = mx.load(str(tmp_path / "model.safetensors"))
    weights = dict(tree_flatten(net.parameters()))
    assert read.keys() == weights.keys()
    assert all(mx.array_equal(read[name], weight).item() for name, weight in weights.items())


def test_the_rest_of_a_folder(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    for name in ("tokenizer.json", "chat_template.jinja", "modeling_gadget.py", "notes.txt", "config.json"):
        (source / name).write_text(f"this is {name}")
    config: dict[str, Any] = {"z": 1, "a": {"limits": [0.0, float("inf")], "none": None}, "nan": float("nan")}
    shards.describe(out, config, source)
    assert sorted(each.name for each in out.iterdir()) == ["chat_template.jinja", "config.json", "tokenizer.json"]
    assert (out / "tokenizer.json").read_text() == "this is tokenizer.json"
    read = json.loads((out / "config.json").read_text())
    assert list(read) == ["a", "nan", "z"]
    # transformers' spelling of what JSON lacks, which mlx-lm reads
    assert read["a"] == {"limits": [0.0, {"__float__": "Infinity"}], "none": None}
    assert read["nan"] == {"__float__": "NaN"}
