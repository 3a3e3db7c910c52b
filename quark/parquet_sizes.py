"""How much memory the row groups of a Parquet file take, without decoding them.

The numbers come from the page headers, by which a decoder allocates, and not from the footer's sums, which
nothing checks. Layout: https://parquet.apache.org/docs/file-format/, in Thrift's compact protocol.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, TypeAlias

_MAGIC = b"PAR1"
_MAX_THRIFT_DEPTH = 16
_MAX_SCHEMA_DEPTH = 64
_DELTA_BYTE_ARRAY = 7
"""An encoding whose values share beginnings: each can be as long as the page."""
_FIXED_LENGTH = 7
"""The physical type of values of a stated length."""
_WIDTHS = {0: 1, 1: 4, 2: 8, 3: 12, 4: 4, 5: 8, 6: 16}
"""Physical type -> bytes of a decoded value; of a text or binary one those of the view that points to it."""


@dataclass(frozen=True, slots=True)
class RowGroup:
    """Rows that are decoded together."""

    num_rows: int
    num_bytes: int
    """What decoding takes at most: the pages, decompressed, and the values made of them."""


def row_groups_of(file: BinaryIO) -> list[RowGroup]:
    """The row groups of an open file.

    Raises:
        ValueError: It is not a Parquet file, or its parts do not fit together.
    """
    try:
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            end = len(data) - 8
            if end < 4 or data[:4] != _MAGIC or data[-4:] != _MAGIC:
                raise ValueError("it does not begin and end as a Parquet file does")
            length = int.from_bytes(data[end : end + 4], "little")
            if length > end - 4:
                raise ValueError("its footer is longer than the file")
            footer = _Thrift(data, end - length, end).struct()
            leaves = _leaves(footer[2])
            groups = [_row_group(data, group, leaves) for group in footer[4]]
            if footer[3] != sum(group.num_rows for group in groups):
                raise ValueError("its footer and its row groups count different rows")
            return groups
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError("its footer or a page header lacks a field") from error


_Struct: TypeAlias = dict[int, Any]


def _leaves(elements: list[_Struct]) -> list[_Struct]:
    """The elements of a schema that have values, from its tree in depth-first order."""
    leaves = []
    open_groups: list[int] = []
    for element in elements:
        if children := element.get(5):
            open_groups.append(_size(children))
        else:
            leaves.append(element)
            while open_groups and open_groups[-1] == 1:
                open_groups.pop()
            if open_groups:
                open_groups[-1] -= 1
        if len(open_groups) > _MAX_SCHEMA_DEPTH:
            raise ValueError(f"its columns are nested more than {_MAX_SCHEMA_DEPTH} levels deep")
    if open_groups:
        raise ValueError("its schema is cut off")
    return leaves


def _row_group(data: mmap.mmap, group: _Struct, leaves: list[_Struct]) -> RowGroup:
    num_rows = _size(group[3])
    num_bytes = 0
    for chunk, leaf in zip(group[1], leaves, strict=True):
        num_values, chunk_bytes = _chunk_sizes(data, chunk[3], leaf)
        if num_values != chunk[3][5] or num_values < num_rows:
            raise ValueError("a column has not as many values as its row group says")
        num_bytes += chunk_bytes
    return RowGroup(num_rows, num_bytes)


def _chunk_sizes(data: mmap.mmap, chunk: _Struct, leaf: _Struct) -> tuple[int, int]:
    """The number of values of one column of one row group, and what they take."""
    width = leaf[2] if chunk[1] == _FIXED_LENGTH else _WIDTHS[chunk[1]]
    # A list in a list has offsets of its own, perhaps one per value.
    width += 8 * max(0, len(chunk[3]) - 3)
    total_values = total = 0
    for page in _pages(data, chunk):
        decompressed = _size(page[2])
        header = page.get(5) or page.get(8)
        if header is None:  # a dictionary
            total += decompressed
            continue
        num_values = _size(header[1])
        encoding = header[2] if 5 in page else header[4]
        per_value = decompressed if encoding == _DELTA_BYTE_ARRAY else width
        total_values += num_values
        total += decompressed + num_values * per_value
    return total_values, total


def _pages(data: mmap.mmap, chunk: _Struct) -> Iterator[_Struct]:
    """The headers of a column's pages."""
    at = chunk.get(11) or chunk[9]
    end = at + _size(chunk[7])
    if not 0 < at <= end <= len(data):
        raise ValueError("a column lies outside of the file")
    while at < end:
        thrift = _Thrift(data, at, end)
        page = thrift.struct()
        yield page
        at = thrift.at + _size(page[3])


def _size(value: int) -> int:
    if value < 0:
        raise ValueError("a size is negative")
    return value


class _Thrift:
    """Reads Thrift's compact protocol: structs as {field number: value}."""

    def __init__(self, data: mmap.mmap, at: int, end: int) -> None:
        self._data = data
        self.at = at
        self._end = end

    def struct(self, depth: int = 0) -> _Struct:
        if depth > _MAX_THRIFT_DEPTH:
            raise ValueError("its footer is nested too deeply")
        fields: _Struct = {}
        number = 0
        while head := self._byte():
            number = number + (head >> 4) if head >> 4 else self._integer()
            kind = head & 15
            fields[number] = kind == 1 if kind in (1, 2) else self._value(kind, depth)
        return fields

    def _value(self, kind: int, depth: int) -> Any:  # noqa: ANN401 - the data says what it is
        match kind:
            case 1 | 2 | 3:
                return self._byte()
            case 4 | 5 | 6:
                return self._integer()
            case 7:
                return self._bytes(8)
            case 8:
                return self._bytes(self._varint())
            case 9 | 10:
                head = self._byte()
                count = head >> 4 if head >> 4 < 15 else self._varint()
                return [self._value(head & 15, depth + 1) for _ in range(count)]
            case 12:
                return self.struct(depth + 1)
            case _:
                raise ValueError(f"its footer holds a value of the unknown kind {kind}")

    def _byte(self) -> int:
        if self.at >= self._end:
            raise ValueError("its footer or a page header is cut off")
        self.at += 1
        return self._data[self.at - 1]

    def _bytes(self, count: int) -> bytes:
        if count > self._end - self.at:
            raise ValueError("its footer or a page header is cut off")
        self.at += count
        return self._data[self.at - count : self.at]

    def _varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7
            if shift > 63:
                raise ValueError("its footer or a page header holds a number of more than 64 bits")

    def _integer(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)
