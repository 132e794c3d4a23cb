"""Parquet and Arrow -> plain rows, a small batch at a time. Knows columns and sizes, not what a row means.

A few hundred bytes of Parquet can decode to gigabytes: a run of equal values is one value and a count. So the sizes
that the file states are added up before anything is decoded, and texts stay indices into their dictionary until the
decoded size of their batch has been counted.
"""

import base64
import io
import math
from collections import Counter, defaultdict
from collections.abc import Iterator
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import Any

from mlxtune.data.contents import too_large
from mlxtune.data.footer import DELTA_BYTES, DELTA_LENGTH, DICTIONARY, Chunk, read_footer
from mlxtune.errors import DataError

BATCH = 1024  # rows
ROW_BYTES, VALUE_BYTES = 64, 8  # that a row and a value take at least

UNREADABLE = (ValueError, KeyError, OverflowError)  # no UTF-8, a map with a key twice, a date beyond Python's

Numbered = tuple[int, dict[str, Any]]


def read_batches(name: str, data: bytes, limit: int) -> Iterator[Any]:
    """The record batches of a Parquet file, texts as dictionaries. Raises DataError, also for more than `limit`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        footer = read_footer(data)
        stated = footer.rows * ROW_BYTES + sum(chunk.values * VALUE_BYTES + chunk.size for chunk in footer.chunks)
        if stated > limit:
            raise too_large(name, limit)
        dictionaries = _dictionaries(name, footer.chunks, limit)
        file = pq.ParquetFile(io.BytesIO(data), read_dictionary=dictionaries, pre_buffer=False)
        _check_names(name, file.schema_arrow.names)
        for group in range(file.num_row_groups):  # Arrow makes no batch of nested texts from two dictionaries
            yield from file.iter_batches(batch_size=BATCH, row_groups=[group], use_threads=False)
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise _damaged(name, error) from None


def _damaged(name: str, error: Exception) -> DataError:
    first = str(error).splitlines()[0] if str(error) else type(error).__name__
    return DataError(f"is a damaged Parquet file: {first}", where=name, hint="write or download it again")


def _dictionaries(name: str, chunks: tuple[Chunk, ...], limit: int) -> list[str]:
    """Which columns of texts are read as dictionaries: those whose values share bytes.

    Values can share bytes in two more ways, which Arrow only reads written out, a batch at a time: beginnings, in the
    encoding DELTA_BYTE_ARRAY, and values of a fixed length. Raises DataError where such a batch could be too large.
    """
    encodings: dict[str, set[int]] = defaultdict(set)
    for chunk in chunks:
        encodings[chunk.path] |= chunk.encodings if chunk.is_text else set()
    delta = {path for path, used in encodings.items() if used & {DELTA_LENGTH, DELTA_BYTES}}
    shared = {path for path, used in encodings.items() if used & {*DICTIONARY}}
    written_out = {path for path in delta if path in shared or DELTA_BYTES in encodings[path]}
    for chunk in chunks:
        largest = chunk.size if chunk.path in written_out else chunk.length
        if min(chunk.values, BATCH) * largest > limit:
            what = f"has the column `{chunk.path}` in an encoding whose size cannot be told beforehand"
            raise DataError(what, where=name, hint="write it again in plain or dictionary encoding")
    return sorted(shared - delta)


def _check_names(name: str, columns: list[str]) -> None:
    twice = [column for column, count in Counter(columns).items() if count > 1]
    if twice:
        raise DataError(f"has the column `{twice[0]}` twice", where=name, hint="rename one of them")


def rows_of(name: str, batches: Iterator[Any], limit: int) -> Iterator[Numbered | DataError]:
    """The rows of record batches with their numbers, from 1; an error for a row that cannot be read.

    Raises DataError when they take more than `limit` bytes.
    """
    import pyarrow as pa

    done, taken = 0, 0
    for batch in batches:
        try:
            taken += batch.num_rows * ROW_BYTES + sum(_size(column) for column in batch.columns)
        except (pa.ArrowException, ValueError) as error:  # indices beyond their dictionary
            raise _damaged(name, error) from None
        if taken > limit:
            raise too_large(name, limit)
        plain = {field.name: _is_plain(field.type) for field in batch.schema}
        for number, value in _values(batch, done):
            if value is None:
                what = "holds bytes that are not UTF-8, a key twice, or a date that is none"
                yield DataError(what, where=f"{name}:{number}", hint="correct or delete the row")
            else:
                yield number, {key: each if plain[key] else _plain(each) for key, each in value.items()}
        done += batch.num_rows


def _values(batch: Any, done: int) -> Iterator[tuple[int, dict[str, Any] | None]]:
    try:
        found: list[dict[str, Any] | None] = batch.to_pylist(maps_as_pydicts="strict")
    except UNREADABLE:  # somewhere in the batch: row by row
        found = [_value(batch.slice(place, 1)) for place in range(batch.num_rows)]
    yield from enumerate(found, start=done + 1)


def _value(row: Any) -> dict[str, Any] | None:
    try:
        value: dict[str, Any] = row.to_pylist(maps_as_pydicts="strict")[0]
    except UNREADABLE:
        return None
    return value


def _size(array: Any) -> int:
    """Bytes of an array's values, each written out."""
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = array.type
    if pa.types.is_dictionary(kind):
        values = array.dictionary
        if not _is_text(values.type) and not pa.types.is_binary(values.type):
            return len(array) * VALUE_BYTES
        lengths = pc.cast(pc.binary_length(values), pa.int64())
        return len(array) * VALUE_BYTES + int(pc.sum(lengths.take(array.indices)).as_py() or 0)
    if pa.types.is_struct(kind):
        return sum(_size(each) for each in array.flatten())
    if pa.types.is_map(kind):
        return _size(array.keys) + _size(array.items)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return len(array) * VALUE_BYTES + _size(array.flatten())
    return int(array.nbytes)


def _is_text(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _is_plain(kind: Any) -> bool:
    """Whether a type's values are those of JSON."""
    import pyarrow as pa

    types = pa.types
    if types.is_dictionary(kind):
        return _is_plain(kind.value_type)
    if types.is_list(kind) or types.is_large_list(kind):
        return _is_plain(kind.value_type)
    if types.is_struct(kind):
        return all(_is_plain(kind.field(place).type) for place in range(kind.num_fields))
    return bool(_is_text(kind) or types.is_boolean(kind) or types.is_integer(kind) or types.is_null(kind))


def _plain(value: Any) -> Any:
    """A value as JSON has it: dates in ISO format, bytes as text or else in base 64, NaN (pandas' gap) as null."""
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return base64.b64encode(value).decode()
    return str(value) if isinstance(value, Decimal | timedelta) else value
