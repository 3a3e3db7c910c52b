"""How much memory the record batches of an Arrow IPC file take, without decoding them.

The sizes come from the headers of the batches and from the length in front of each compressed buffer, by which a
decoder allocates. Layout: https://arrow.apache.org/docs/format/Columnar.html, in tables of FlatBuffers.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from quark.parquet_sizes import RowGroup

_MAGIC = b"ARROW1"
_HEAD = len(_MAGIC) + 2
_CONTINUATION = b"\xff\xff\xff\xff"
_RECORD_BATCH = 3
"""The kind of message that holds rows."""
_TIMESTAMP = 10
_EXTENSION = b"ARROW:extension:name"
_MAX_DEPTH = 64
_MAX_FIELDS = 1 << 14
_MAX_NAMES = 1 << 24
"""Bytes of all names and notes of a schema. Tables may share them, so a small schema can spell out a large one."""
_BYTES_PER_VALUE = 8
"""A decoded value without a buffer of its own, such as a null, or of less than a byte."""


def record_batches_of(file: BinaryIO) -> list[RowGroup]:
    """The record batches of an open file.

    Raises:
        ValueError: It is not an Arrow IPC file, its parts do not fit together, or it has dictionary-encoded columns or
            extension types.
    """
    try:
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            end = len(data) - len(_MAGIC) - 4
            if end < _HEAD or data[: len(_MAGIC)] != _MAGIC or data[-len(_MAGIC) :] != _MAGIC:
                raise ValueError("it does not begin and end as an Arrow IPC file does")
            length = int.from_bytes(data[end : end + 4], "little", signed=True)
            if not 0 < length <= end - _HEAD:
                raise ValueError("its footer is longer than the file")
            footer = _Table.root(data, end - length, end)
            _check_schema(footer.table(1))
            _spelled_out(footer, 4)
            if footer.vector(2, 24):
                raise ValueError("it has dictionary-encoded columns, write them as plain values")
            return [_record_batch(data, at, end) for at in footer.vector(3, 24)]
    except struct.error as error:
        raise ValueError("its footer or a header is cut off") from error


def _check_schema(schema: _Table) -> None:
    """Refuse a schema that is too large once it is spelled out, and types that are not plain values.

    Raises:
        ValueError: Says what is wrong.
    """
    num_fields, num_bytes = 0, _spelled_out(schema, 2)
    pending = [(at, 1) for at in schema.tables(1)]
    while pending:
        field, depth = pending.pop()
        name = field.text(0)
        num_fields += 1
        num_bytes += len(name) + _spelled_out(field, 6)
        kind = field.number(2, "B")
        if kind == _TIMESTAMP and field.has(3):
            num_bytes += len(field.table(3).text(1))
        if num_fields > _MAX_FIELDS or num_bytes > _MAX_NAMES or depth > _MAX_DEPTH:
            raise ValueError(
                f"its schema has more than {_MAX_FIELDS:,} columns, {_MAX_NAMES:,} bytes of names, or {_MAX_DEPTH} levels"
            )
        shown = name[:80].decode(errors="replace")
        if field.has(4):
            raise ValueError(
                f"its column {shown!r} is dictionary-encoded, write it as plain values"
            )
        if any(note.text(0) == _EXTENSION for note in field.tables(6)):
            raise ValueError(
                f"its column {shown!r} has an extension type, write it as plain values"
            )
        pending += [(child, depth + 1) for child in field.tables(5)]


def _spelled_out(table: _Table, field: int) -> int:
    """Bytes of the notes in a field of a table."""
    num_bytes = 0
    for note in table.tables(field):
        num_bytes += len(note.text(0)) + len(note.text(1)) + _BYTES_PER_VALUE
        if num_bytes > _MAX_NAMES:
            raise ValueError(f"its notes have more than {_MAX_NAMES:,} bytes")
    return num_bytes


def _record_batch(data: mmap.mmap, block: int, end: int) -> RowGroup:
    """What the batch of a block of the footer decodes to."""
    at, header, body = struct.unpack_from("<qi4xq", data, block)
    if not (at >= _HEAD and header > 8 and body >= 0 and at + header + body <= end):
        raise ValueError("a record batch lies outside of the file")
    if data[at : at + 4] != _CONTINUATION:
        raise ValueError(
            "its batches are written as before Arrow 0.15, write them with a newer release"
        )
    if struct.unpack_from("<i", data, at + 4)[0] != header - 8:
        raise ValueError("the header of a record batch has another length than the footer says")
    message = _Table.root(data, at + 8, at + header)
    if message.number(1, "B") != _RECORD_BATCH or not message.has(2):
        raise ValueError("a record batch is something else")
    _spelled_out(message, 4)
    batch = message.table(2)
    num_rows = batch.number(0, "q")
    lengths = [struct.unpack_from("<q", data, node)[0] for node in batch.vector(1, 16)]
    if num_rows < 0 or any(length < 0 for length in lengths):
        raise ValueError("a number of rows is negative")
    num_bytes = _BYTES_PER_VALUE * (num_rows + sum(lengths))
    first = at + header
    for buffer in batch.vector(2, 16):
        offset, length = struct.unpack_from("<qq", data, buffer)
        if not (offset >= 0 and length >= 0 and offset + length <= body):
            raise ValueError("a buffer lies outside of its record batch")
        if length and batch.has(3):
            if length < 8:
                raise ValueError("a compressed buffer is cut off")
            decoded = struct.unpack_from("<q", data, first + offset)[0]
            if decoded < -1:
                raise ValueError("a size is negative")
            length = length - 8 if decoded == -1 else decoded
        num_bytes += length
    return RowGroup(num_rows, num_bytes)


@dataclass(frozen=True, slots=True)
class _Table:
    """A table of FlatBuffers; fields are numbered as in its schema."""

    data: mmap.mmap | bytes
    at: int
    end: int

    @classmethod
    def root(cls, data: mmap.mmap | bytes, begin: int, end: int) -> _Table:
        return cls(data, begin, end)._followed(begin)

    def has(self, field: int) -> bool:
        return self._place(field) is not None

    def number(self, field: int, kind: str) -> int:
        place = self._place(field)
        return 0 if place is None else int(self._unpacked(kind, place))

    def table(self, field: int) -> _Table:
        place = self._place(field)
        if place is None:
            raise ValueError("its footer or a header lacks a field")
        return self._followed(place)

    def tables(self, field: int) -> Iterator[_Table]:
        return (self._followed(place) for place in self.vector(field, 4))

    def vector(self, field: int, width: int) -> range:
        """Where the elements of a vector are; empty without one."""
        place = self._place(field)
        if place is None:
            return range(0)
        at = place + self._unpacked("I", place)
        count = self._unpacked("I", at)
        begin = at + 4
        if begin + count * width > self.end:
            raise ValueError("its footer or a header is cut off")
        return range(begin, begin + count * width, width)

    def text(self, field: int) -> bytes:
        at = self.vector(field, 1)
        return bytes(self.data[at.start : at.stop])

    def _place(self, field: int) -> int | None:
        vtable = self.at - self._unpacked("i", self.at)
        if 4 + 2 * field >= self._unpacked("H", vtable):
            return None
        offset = self._unpacked("H", vtable + 4 + 2 * field)
        return self.at + offset if offset else None

    def _followed(self, place: int) -> _Table:
        return _Table(self.data, place + self._unpacked("I", place), self.end)

    def _unpacked(self, kind: str, at: int) -> int:
        if not 0 <= at <= self.end - struct.calcsize(kind):
            raise ValueError("its footer or a header is cut off")
        return int(struct.unpack_from(f"<{kind}", self.data, at)[0])
