"""The footer of a Parquet file -> what it states of its columns, before anything is decoded. Knows no values.

Read here and not with pyarrow, which ends the process at some damaged footers when it is asked for a column's figures.
The format: https://parquet.apache.org/docs/file-format/metadata/, in Thrift's compact protocol.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

MARK = b"PAR1"
DEEPEST = 16  # structs and lists inside each other; a footer has ten
TRUE, FALSE, BYTE, DOUBLE, BINARY, LIST, SET, MAP, STRUCT, UUID = 1, 2, 3, 7, 8, 9, 10, 11, 12, 13
WHOLE_NUMBERS = (4, 5, 6)  # of 16, 32 and 64 bits
BYTE_ARRAY, FIXED_LENGTH = 6, 7  # types of a column
DICTIONARY, DELTA_LENGTH, DELTA_BYTES = (2, 8), 6, 7  # encodings


@dataclass(frozen=True, slots=True)
class Chunk:
    """What is stated of one column in one group of rows. `length`: bytes of each value, where all have as many."""

    path: str
    is_text: bool
    encodings: frozenset[int]
    values: int
    size: int
    length: int


@dataclass(frozen=True, slots=True)
class Footer:
    rows: int
    chunks: tuple[Chunk, ...]


def read_footer(data: bytes) -> Footer:
    """The footer of a whole file. Raises ValueError for one that is damaged."""
    if len(data) < 12 or not data.endswith(MARK):
        raise ValueError("its end is missing")
    (size,) = struct.unpack("<i", data[-8:-4])
    if not 0 < size <= len(data) - 12:
        raise ValueError("its footer is missing")
    try:
        found = _Reader(data[-8 - size : -8]).struct(0)
        longest = max([0, *(each.get(2, 0) for each in found[2])])
        return Footer(max(0, int(found[3])), tuple(_chunks(found.get(4, ()), longest)))
    except (LookupError, TypeError, AttributeError, ValueError, struct.error):
        raise ValueError("its footer cannot be read") from None


def _chunks(groups: Any, longest: int) -> Iterator[Chunk]:
    for group in groups:
        for column in group[1]:
            stated = column[3]
            yield Chunk(
                path=b".".join(stated[3]).decode(),
                is_text=stated[1] == BYTE_ARRAY,
                encodings=frozenset(stated[2]),
                values=max(0, int(stated[5])),
                size=max(0, int(stated[6])),
                length=longest if stated[1] == FIXED_LENGTH else 0,
            )


class _Reader:
    """Thrift's compact protocol, from `place` on: structs as {number of the field: value}."""

    def __init__(self, data: bytes):
        self.data = data
        self.place = 0

    def struct(self, depth: int) -> dict[int, Any]:
        found: dict[int, Any] = {}
        number = 0
        while (head := self.byte()) != 0:
            step, kind = head >> 4, head & 15
            number = number + step if step else self.whole()
            found[number] = kind == TRUE if kind in (TRUE, FALSE) else self.value(kind, depth)
        return found

    def value(self, kind: int, depth: int) -> Any:
        if depth > DEEPEST:
            raise ValueError
        if kind in WHOLE_NUMBERS:
            return self.whole()
        if kind in (TRUE, FALSE, BYTE):  # a truth value inside a list takes a byte
            return self.byte()
        if kind == BINARY:
            return self.bytes(self.varint())
        if kind in (LIST, SET):
            head = self.byte()
            count = head >> 4 if head >> 4 < 15 else self.varint()
            return [self.value(head & 15, depth + 1) for _ in range(count)]
        if kind == MAP:
            count = self.varint()
            kinds = self.byte() if count else 0
            return [(self.value(kinds >> 4, depth + 1), self.value(kinds & 15, depth + 1)) for _ in range(count)]
        if kind == STRUCT:
            return self.struct(depth + 1)
        if kind in (DOUBLE, UUID):
            return self.bytes(8 if kind == DOUBLE else 16)
        raise ValueError

    def byte(self) -> int:
        found = self.data[self.place]
        self.place += 1
        return found

    def bytes(self, count: int) -> bytes:
        if count > len(self.data) - self.place:
            raise ValueError
        self.place += count
        return self.data[self.place - count : self.place]

    def varint(self) -> int:
        found = shift = 0
        while shift < 64:
            each = self.byte()
            found |= (each & 127) << shift
            if each < 128:
                return found
            shift += 7
        raise ValueError

    def whole(self) -> int:
        found = self.varint()
        return (found >> 1) ^ -(found & 1)
