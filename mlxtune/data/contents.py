"""A file, or what is piped in -> its bytes, unpacked, and what they are: JSONL, JSON, CSV or Parquet. Knows no rows.

What a file decodes to is counted while it is unpacked: a gzip of 300 kB can hold gigabytes.
"""

import codecs
import functools
import gzip
import io
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from mlxtune.errors import DataError

KINDS = (".jsonl", ".json", ".csv", ".parquet")
SUFFIXES = (*KINDS, *(f"{kind}.gz" for kind in KINDS))
STDIN = Path("-")
CHUNK = 1 << 20
# a packed file may hold `SAFE` bytes, or `RATIO` times its own size up to `MOST`; texts pack to a third or a twentieth
SAFE, RATIO, MOST = 128 << 20, 64, 4 << 30

GZIP, PARQUET = b"\x1f\x8b", b"PAR1"
# how other things begin: (first bytes, what it is, what to do); of UTF-32 and UTF-16 the longer mark comes first
OTHERS = (
    (codecs.BOM_UTF32_LE, "is UTF-32, not UTF-8", "save the file as UTF-8"),
    (codecs.BOM_UTF32_BE, "is UTF-32, not UTF-8", "save the file as UTF-8"),
    (codecs.BOM_UTF16_LE, "is UTF-16, not UTF-8", "save the file as UTF-8"),
    (codecs.BOM_UTF16_BE, "is UTF-16, not UTF-8", "save the file as UTF-8"),
    (b"PK\x03\x04", "is a ZIP archive, as Excel files are", "unpack it, or save the sheet as CSV"),
    (b"BZh", "is compressed with bzip2", "unpack it, or compress it with gzip"),
    (b"\xfd7zXZ\x00", "is compressed with xz", "unpack it, or compress it with gzip"),
    (b"\x28\xb5\x2f\xfd", "is compressed with Zstandard", "unpack it, or compress it with gzip"),
    (b"%PDF", "is a PDF", "write its texts as JSONL, one row a line"),
    (b"version https://git-lfs", "is a pointer of Git LFS, not the data", "fetch the data with `git lfs pull`"),
)


@dataclass(frozen=True, slots=True)
class Contents:
    """The unpacked bytes of a file of the `kind` `.jsonl`, `.json`, `.csv` or `.parquet`.

    `name` stands for the file in messages; `limit` is how many bytes they may decode to where they are packed again.
    """

    name: str
    kind: str
    data: bytes
    limit: int


def limit_of(size: int) -> int:
    """How many bytes a compressed file of `size` bytes may decode to."""
    return min(MOST, max(SAFE, RATIO * size))


def read(path: Path) -> Contents:
    """The contents of a file, by its suffix; of stdin for `-`, by its first bytes. Raises DataError."""
    if path == STDIN:
        return _of_stdin()
    name = str(path)
    lower = path.name.lower()
    kind = Path(lower.removesuffix(".gz")).suffix
    if kind not in KINDS:
        shown = "".join(path.suffixes[-2:]) if lower.endswith(".gz") else path.suffix
        raise DataError(
            f"has the unknown suffix {shown!r}", where=name, hint=f"use {', '.join(KINDS)}, each also with .gz"
        )
    try:
        data = path.read_bytes()
    except OSError as error:
        raise unreadable(name, error) from None
    limit = limit_of(len(data))
    if lower.endswith(".gz"):
        if data and not data.startswith(GZIP):
            _refuse_others(name, data)
            raise DataError("is not compressed with gzip", where=name, hint="take the .gz off its name")
        data = unpack(name, data, limit)
    _check_kind(name, kind, data)
    return Contents(name, kind, data, limit)


def unreadable(where: str | Path, error: OSError) -> DataError:
    """The error for a file or folder that the system does not let us read."""
    return DataError(f"cannot be read: {error.strerror}", where=where, hint="check its name and that you may read it")


def _of_stdin() -> Contents:
    name = "stdin"
    if sys.stdin is None or sys.stdin.isatty():
        hint = "pipe rows in, as in `cat tickets.jsonl | mlxtune data check -`"
        raise DataError("nothing is piped in", where=name, hint=hint)
    data = _all_of(sys.stdin.buffer)
    limit = limit_of(len(data))
    if data.startswith(GZIP):
        data = unpack(name, data, limit)
    kind = _sniffed(data)
    _check_kind(name, kind, data)
    return Contents(name, kind, data, limit)


@functools.lru_cache(maxsize=1)
def _all_of(stream: BinaryIO) -> bytes:
    """Everything in a stream; kept, as a stream can be read only once and commands read their data several times."""
    found = io.BytesIO()
    while chunk := stream.read(CHUNK):
        if found.tell() + len(chunk) > MOST:
            raise DataError(f"is longer than {_gigabytes(MOST)}", where="stdin", hint="give a file, or fewer rows")
        found.write(chunk)
    return found.getvalue()


def unpack(name: str, data: bytes, limit: int) -> bytes:
    """What a gzip holds. Raises DataError where it is damaged or holds more than `limit` bytes."""
    found = io.BytesIO()
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as packed:
            while chunk := packed.read(CHUNK):
                if found.tell() + len(chunk) > limit:
                    raise too_large(name, limit)
                found.write(chunk)
    except EOFError:
        raise DataError("is a gzip that ends too early", where=name, hint="copy or download it again") from None
    except (OSError, zlib.error) as error:
        raise DataError(f"is a damaged gzip: {error}", where=name, hint="copy or download it again") from None
    return found.getvalue()


def too_large(name: str, limit: int) -> DataError:
    """The error for a compressed file that holds too much."""
    hint = "look at what it holds; if that is right, unpack it to JSONL or split it"
    return DataError(f"decodes to more than {_gigabytes(limit)}, far more than its size", where=name, hint=hint)


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB"


def _sniffed(data: bytes) -> str:
    """The kind of data without a name."""
    if data.startswith(PARQUET):
        return ".parquet"
    start = data[:CHUNK].removeprefix(codecs.BOM_UTF8).lstrip()[:1]
    return {b"{": ".jsonl", b"[": ".json"}.get(start, ".csv")


def _check_kind(name: str, kind: str, data: bytes) -> None:
    """Raises DataError for data that is something else than its name says."""
    if kind == ".parquet":
        if not data.startswith(PARQUET):
            _refuse_others(name, data)
            raise DataError("is no Parquet file", where=name, hint="name it after what it holds, or write it again")
        return
    if data.startswith(PARQUET):
        raise DataError(f"is a Parquet file, not {kind[1:].upper()}", where=name, hint="let its name end in .parquet")
    if data.startswith(GZIP):
        twice = name.lower().endswith(".gz")
        what = "is compressed twice" if twice else "is compressed with gzip, which its name does not say"
        raise DataError(what, where=name, hint="unpack it once" if twice else "let its name end in .gz")
    _refuse_others(name, data)
    if b"\x00" in data[:4]:
        raise DataError("holds NUL bytes: it is UTF-16, or no text", where=name, hint="save the file as UTF-8")


def _refuse_others(name: str, data: bytes) -> None:
    for start, what, hint in OTHERS:
        if data.startswith(start):
            raise DataError(what, where=name, hint=hint)
