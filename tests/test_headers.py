"""Headers of safetensors files: what is wrong is named in a line, and nothing is accepted that the library refuses."""

import json
import random
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from mlxtune import headers
from mlxtune.claims import UNREADABLE
from mlxtune.errors import ModelError
from mlxtune.headers import Malformed, Tensor

MUTANTS = 24_000


def blob(header: Any, data: int = 0) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + bytes(data)


def parsed(content: bytes) -> dict[str, Tensor]:
    size = headers.header_size(content[:8], len(content))
    return headers.parse(content[8 : 8 + size], len(content))


def one(**changes: Any) -> dict[str, Any]:
    return {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes}


def two(start: int, end: int) -> dict[str, Any]:
    return one() | {"b": {"dtype": "F32", "shape": [1], "data_offsets": [start, end]}}


def raw(text: bytes) -> bytes:
    return blob(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}' + text + b"}", 8)


NUMBER = "its header has the number"
REFUSED: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "it has 0 bytes"),
    "half a length": (b"\x01\x00", "it has 2 bytes"),
    "a length of 64 bits": (b"\xff" * 64, "its header would have 18446744073709551615 bytes"),
    "a length above the cap": (
        (headers.LARGEST + 1).to_bytes(8, "little") + b"{}",
        f"its header would have {headers.LARGEST + 1} bytes",
    ),
    "a header behind the end": (
        (9).to_bytes(8, "little") + b"{}",
        "its header of 9 bytes ends behind the file's 10",
    ),
    "an empty header": (blob(b""), "its header is no JSON object"),
    "a list": (blob([]), "its header is no JSON object"),
    "a space in front": (blob(b" {}"), "its header is no JSON object"),
    "a byte order mark": (blob(b"\xef\xbb\xbf{}"), "its header is no JSON object"),
    "no JSON": (blob(b"{garbage}"), "its header is not valid JSON: Expecting property name enclosed in double quotes"),
    "something behind it": (blob(b"{}\0"), "its header is not valid JSON: Extra data"),
    "not UTF-8": (blob(b'{"\xff":1}'), "its header is not UTF-8"),
    "nested deeply": (blob(b'{"a":' + b"[" * 100_000), "its header is nested too deeply"),
    "a repeated tensor": (raw(b',"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'), "its header names 'a' twice"),
    "a repeated field": (
        blob(b'{"a":{"dtype":"F32","shape":[1],"shape":[2],"data_offsets":[0,8]}}', 8),
        "its header names 'shape' twice",
    ),
    "half a character": (
        blob(b'{"\\ud800":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', 8),
        "its header has the text '\\ud800', which is no Unicode",
    ),
    "half a character in the metadata": (
        raw(b',"__metadata__":{"a":"\\udc00"}'),
        "its header has the text '\\udc00', which is no Unicode",
    ),
    "metadata of numbers": (raw(b',"__metadata__":{"a":1}'), "its metadata are no texts"),
    "metadata in a list": (raw(b',"__metadata__":[]'), "its metadata are no texts"),
    "a tensor that is a list": (blob({"a": [1]}), "the tensor 'a' has not just dtype, shape and data_offsets"),
    "a field too many": (blob(one(more=1), 8), "the tensor 'a' has not just dtype, shape and data_offsets"),
    "a field missing": (
        blob({"a": {"dtype": "F32", "shape": [2]}}, 8),
        "the tensor 'a' has not just dtype, shape and data_offsets",
    ),
    "an unknown dtype": (blob(one(dtype="F33"), 8), "the tensor 'a' has the unknown dtype 'F33'"),
    "a dtype in a list": (blob(one(dtype=["F32"]), 8), "the tensor 'a' has the unknown dtype ['F32']"),
    "a negative axis": (blob(one(shape=[-2, -1]), 8), f"{NUMBER} '-2'"),
    "minus zero": (raw(b',"b":{"dtype":"F32","shape":[-0],"data_offsets":[8,8]}'), f"{NUMBER} '-0'"),
    "half an axis": (blob(one(shape=[2.0]), 8), f"{NUMBER} '2.0'"),
    "NaN": (blob(one(shape=[float("nan")]), 8), f"{NUMBER} 'NaN'"),
    "a number of 30 digits": (blob(one(shape=[10**29]), 8), f"{NUMBER} '1{'0' * 29}'"),
    "an axis of 33 bits": (
        blob(one() | {"b": {"dtype": "F32", "shape": [0, 2**31], "data_offsets": [8, 8]}}, 8),
        "the tensor 'b' has the shape [0, 2147483648]",
    ),
    "a product of 80 bits behind a zero": (
        blob(one() | {"b": {"dtype": "F32", "shape": [2**30, 2**30, 0], "data_offsets": [8, 8]}}, 8),
        "the tensor 'b' has the shape [1073741824, 1073741824, 0]",
    ),
    "too many axes": (blob(one(shape=[1] * 17), 4), f"the tensor 'a' has the shape {[1] * 17}"),
    "an axis that is true": (blob(one(shape=[True, 2]), 8), "the tensor 'a' has the shape [True, 2]"),
    "a shape that is a number": (blob(one(shape=2), 8), "the tensor 'a' has the shape 2"),
    "three offsets": (blob(one(data_offsets=[0, 4, 8]), 8), "the tensor 'a' has the data_offsets [0, 4, 8]"),
    "offsets turned around": (blob(one(data_offsets=[8, 0]), 8), "the tensor 'a' has the data_offsets [8, 0]"),
    "a size that does not match": (
        blob(one(shape=[3]), 8),
        "the tensor 'a' has 8 bytes, but 'F32' of shape [3]",
    ),
    "half a byte": (
        blob(one(dtype="F4", shape=[3], data_offsets=[0, 1]), 1),
        "the tensor 'a' has 1 bytes, but 'F4' of shape [3]",
    ),
    "an overlap": (blob(two(4, 8), 8), "the tensor 'b' overlaps with another"),
    "the same place": (blob(one() | {"b": one()["a"]}, 8), "the tensor 'b' overlaps with another"),
    "a hole": (blob(two(12, 16), 16), "the tensor 'b' lies behind a hole"),
    "a hole in front": (blob(one(data_offsets=[8, 16]), 16), "the tensor 'a' lies behind a hole"),
    "a tail": (blob(one(), 9), "its tensors end at byte 77, the file at 78"),
    "a cut tail": (blob(one(), 7), "its tensors end at byte 77, the file at 76"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_malformed_headers_are_refused_in_a_line(name: str, tmp_path: Path) -> None:
    content, line = REFUSED[name]
    with pytest.raises(Malformed) as caught:
        parsed(content)
    assert str(caught.value) == line
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(ModelError) as shown:
        headers.read(file)
    assert str(shown.value) == f"{file}: is no whole safetensors file: {line}; download the model again"


def test_what_the_library_writes_is_read(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    kinds = ["float32", "float16", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "float64"]
    arrays = {f"{kind} 🙂": rng.integers(0, 9, (2, 0, 3)[: n % 4]).astype(kind) for n, kind in enumerate(kinds)}
    arrays["bool"] = np.array([True, False])
    file = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(arrays, file, metadata={"format": "mlx", "é": "\n"})
    found, content = headers.read(file), file.read_bytes()
    assert found.keys() == arrays.keys()
    for name, tensor in found.items():
        assert tensor.shape == arrays[name].shape
        assert content[tensor.start : tensor.end] == arrays[name].tobytes()


def test_what_mlx_writes_is_read(tmp_path: Path) -> None:
    arrays = {"half": mx.ones((3, 5), mx.bfloat16), "scalar": mx.array(1.0), "none": mx.zeros((0,))}
    mx.save_safetensors(str(tmp_path / "a.safetensors"), arrays)
    found = headers.read(tmp_path / "a.safetensors")
    assert {name: (each.dtype, each.shape) for name, each in found.items()} == {
        "half": ("BF16", (3, 5)),
        "scalar": ("F32", ()),
        "none": ("F32", (0,)),
    }


def test_dtypes_have_the_sizes_of_the_library() -> None:
    for dtype, bits in headers.DTYPES.items():
        content = blob({"a": {"dtype": dtype, "shape": [8], "data_offsets": [0, bits]}}, bits)
        assert [name for name, _ in safetensors.deserialize(content)] == list(parsed(content))
        with pytest.raises(safetensors.SafetensorError):
            safetensors.deserialize(blob({"a": {"dtype": dtype, "shape": [16], "data_offsets": [0, bits]}}, bits))


def test_a_file_that_cannot_be_read_is_an_error_in_a_line(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is no whole safetensors file: Is a directory; download"):
        headers.read(tmp_path)


PIECES = [
    b"{", b"}", b"[", b"]", b",", b":", b'"', b"0", b"-", b"1", b"8", b".", b"e", b" ", b"\\", b"\0", b"\xff", b"null",
    b"-0", b"1e1", b"NaN", b"4294967296", b"9223372036854775807", b"18446744073709551616", b'"a"', b'"b"', b'"F32"',
    b'"F4"', b'"BOOL"', b'"C64"', b'"__metadata__":{},', b'"shape":[0],', b'"dtype"', b'"data_offsets"', b"\\ud800",
    b"\xe2\x80\xae", b"\xed\xa0\x80", b"[0,8]", b"[8,8]", b"[0]", b"[2,0]", b"[1,2]", b"true", b"{}", b"[]",
]  # fmt: skip
SEEDS = [
    blob(one(), 8),
    blob(two(8, 12), 12),
    blob({"__metadata__": {"format": "mlx"}} | two(8, 12), 12),
    blob(one(dtype="F4", shape=[2, 8]) | {"b": {"dtype": "U8", "shape": [0], "data_offsets": [8, 8]}}, 8),
    blob({}),
]


def mutant(rng: random.Random) -> bytes:
    """A header with a few changes in it; in most its length is put right again, so that the changes are read."""
    content = bytearray(rng.choice(SEEDS))
    size = int.from_bytes(content[:8], "little")
    header, data = content[8 : 8 + size], content[8 + size :]
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        place, span = rng.randrange(len(header) + 1), rng.choice([0, 0, 1, 1, 2, 5])
        match rng.randrange(7):
            case 0 if header:
                header[min(place, len(header) - 1)] ^= 1 << rng.randrange(8)
            case 1:
                header[place : place + span] = rng.choice(PIECES)
            case 2:
                other = rng.randrange(len(header) + 1)
                header[place:place] = header[other : other + rng.choice([1, 4, 20, 60])]
            case 3:
                del header[place : place + rng.choice([1, 2, 10])]
            case 4:
                data = data[:-1] if rng.random() < 0.5 and data else data + b"\0" * rng.choice([1, 4])
            case _:  # often still a header
                place = max(header.find(rng.choice([b",", b":", b"}", b"a", b"b"]), place), 0)
                header[place:place] = rng.choice([b" ", b"\n", b"a", b"\xc3\xa9", b"\\n", b"\\ud83d\\ude42"])
    length = len(header) if rng.random() < 0.95 else rng.choice([0, 1, len(header) + 1, 2**32, 2**64 - 1])
    return length.to_bytes(8, "little") + bytes(header) + bytes(data)


def test_nothing_is_accepted_that_the_library_refuses() -> None:
    """On seeded mutants of headers; the library's answer is the oracle, for the tensors too."""
    rng = random.Random(6)
    accepted = refused = 0
    for _ in range(MUTANTS):
        content = mutant(rng)
        try:
            found = parsed(content)
        except Malformed as error:
            assert "\n" not in str(error)
            assert str(error).isprintable()
            refused += 1
            continue
        accepted += 1
        theirs = {name: (each["dtype"], each["shape"], each["data"]) for name, each in safetensors.deserialize(content)}
        ours = {name: (each.dtype, list(each.shape), content[each.start : each.end]) for name, each in found.items()}
        assert ours == theirs
    assert accepted > MUTANTS // 20
    assert refused > MUTANTS // 2


def test_mlx_reads_what_is_accepted(tmp_path: Path) -> None:
    """The same tensors, but for types that it does not know; those are refused by name before they reach it."""
    rng, file, read = random.Random(7), tmp_path / "a.safetensors", 0
    for _ in range(MUTANTS // 4):
        content = mutant(rng)
        try:
            found = parsed(content)
        except Malformed:
            continue
        if any(each.dtype in UNREADABLE for each in found.values()):
            continue
        file.write_bytes(content)
        arrays = mx.load(str(file))
        mx.eval(arrays)
        assert {name: each.shape for name, each in arrays.items()} == {name: each.shape for name, each in found.items()}
        read += 1
    assert read > MUTANTS // 100
