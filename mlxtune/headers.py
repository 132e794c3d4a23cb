"""Headers of safetensors files, read strictly: the name, type, shape and place of every tensor. Reads no weights.

Whatever is accepted here, the safetensors library accepts too. MLX's own reader believes a header: it takes holes,
negative lengths and lengths of 33 bits. Knows nothing of models.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxtune.errors import ModelError

LENGTH_BYTES = 8
LARGEST = 32 * 2**20  # bytes of a header; those of the largest shards that are published take a tenth of it
LONGEST = 2**31 - 1  # of an axis: MLX counts in 32 bits
MOST_AXES = 16
METADATA = "__metadata__"
FIELDS = {"dtype", "shape", "data_offsets"}
# bits of an element
DTYPES = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64,
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensor:
    """A tensor of a file: `dtype` as the format names it, and its bytes, counted from the file's first one."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class Malformed(ValueError):
    """What is wrong with a header, in a line."""


def read(file: Path, hint: str = "download the model again") -> dict[str, Tensor]:
    """The tensors of a safetensors file, in the order of their bytes. Raises ModelError for a malformed file."""
    try:
        length = file.stat().st_size
        with file.open("rb") as opened:
            size = header_size(opened.read(LENGTH_BYTES), length)
            return parse(opened.read(size), length)
    except (Malformed, OSError) as error:
        reason = error.strerror or error if isinstance(error, OSError) else error
        raise ModelError(f"is no whole safetensors file: {reason}", where=file, hint=hint) from None


def header_size(first: bytes, length: int) -> int:
    """Bytes of the header of a file of `length` bytes that begins with `first`. Raises Malformed."""
    if len(first) < LENGTH_BYTES:
        raise Malformed(f"it has {len(first)} bytes")
    size = int.from_bytes(first[:LENGTH_BYTES], "little")
    if size > LARGEST:
        raise Malformed(f"its header would have {size} bytes")
    if size > length - LENGTH_BYTES:
        raise Malformed(f"its header of {size} bytes ends behind the file's {length}")
    return size


def parse(header: bytes, length: int) -> dict[str, Tensor]:
    """The tensors that `header` describes in a file of `length` bytes, in the order of their bytes. Raises Malformed.

    The rules: https://github.com/huggingface/safetensors#format. Tensors lie one behind the other, without overlap or
    hole, from the header's end to the file's.
    """
    first = LENGTH_BYTES + len(header)
    tensors = {name: _tensor(name, value, first) for name, value in _entries(header).items() if _is_tensor(name, value)}
    place = first
    ordered = dict(sorted(tensors.items(), key=lambda each: (each[1].start, each[1].end)))
    for name, tensor in ordered.items():
        if tensor.start != place:
            trouble = "overlaps with another" if tensor.start < place else "lies behind a hole"
            raise Malformed(f"the tensor {_short(name)} {trouble}")
        place = tensor.end
    if place != length:
        raise Malformed(f"its tensors end at byte {place}, the file at {length}")
    return ordered


def _entries(header: bytes) -> dict[str, Any]:
    if header[:1] != b"{":
        raise Malformed("its header is no JSON object")
    try:
        value = json.loads(
            header.decode("utf-8"),
            object_pairs_hook=_without_repeats,
            parse_int=_natural,
            parse_float=_refused,
            parse_constant=_refused,
        )
    except Malformed:
        raise
    except UnicodeDecodeError:
        raise Malformed("its header is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise Malformed(f"its header is not valid JSON: {error.msg}") from None
    except RecursionError:
        raise Malformed("its header is nested too deeply") from None
    if not isinstance(value, dict):
        raise Malformed("its header is no JSON object")
    return value


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in value if names.count(name) > 1)
        raise Malformed(f"its header names {_short(repeated)} twice")
    for name in value:
        _check_text(name)
    return value


def _natural(text: str) -> int:
    if text[0] == "-" or len(text) > 20:
        raise Malformed(f"its header has the number {_short(text)}")
    return int(text)


def _refused(text: str) -> None:
    raise Malformed(f"its header has the number {_short(text)}")


def _is_tensor(name: str, value: Any) -> bool:
    if name != METADATA:
        return True
    if value is None:  # as MLX writes it
        return False
    if not isinstance(value, dict) or not all(isinstance(each, str) for each in value.values()):
        raise Malformed("its metadata are no texts")
    for each in value.values():
        _check_text(each)
    return False


def _check_text(text: str) -> None:
    """JSON can escape halves of characters, which are no text."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise Malformed(f"its header has the text {_short(text)}, which is no Unicode") from None


def _tensor(name: str, value: Any, first: int) -> Tensor:
    """A tensor whose fields agree; `first` is the place of the first tensor's first byte."""
    if not isinstance(value, dict) or value.keys() != FIELDS:
        raise Malformed(f"the tensor {_short(name)} has not just dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise Malformed(f"the tensor {_short(name)} has the unknown dtype {_short(dtype)}")
    if not _are_numbers(shape) or len(shape) > MOST_AXES or any(axis > LONGEST for axis in shape):
        raise Malformed(f"the tensor {_short(name)} has the shape {_short(shape)}")
    if not _are_numbers(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise Malformed(f"the tensor {_short(name)} has the data_offsets {_short(offsets)}")
    bits = DTYPES[dtype]
    for axis in shape:
        bits *= axis
        if bits >= 2**63:  # before an axis of length 0 hides it
            raise Malformed(f"the tensor {_short(name)} has the shape {_short(shape)}")
    start, end = offsets
    if bits != 8 * (end - start):
        raise Malformed(
            f"the tensor {_short(name)} has {end - start} bytes, but {_short(dtype)} of shape {_short(shape)}"
        )
    return Tensor(dtype=dtype, shape=tuple(shape), start=first + start, end=first + end)


def _are_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(each) is int for each in value)


def _short(value: Any) -> str:
    """A value of the file in an error's line: escaped, and not longer than a line."""
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:80]}…"
