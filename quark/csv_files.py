"""Reads CSV files from anywhere within the bounds of ``quark.bounded_files``."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from quark.bounded_files import MAX_LINE_BYTES, lines_of
from quark.errors import DataError

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def csv_rows(file: Path) -> Iterator[dict[str, str | None] | str]:
    """The rows of a CSV file whose first line names the columns, or why a row has no such values.

    All values are texts; an empty one is None.

    Raises:
        DataError: It has no header, a column twice, a quote that does not end, or a row beyond the bounds.
    """
    lines = _Lines(file)
    limit = csv.field_size_limit(2 * MAX_LINE_BYTES)  # the lines of a row are counted below
    try:
        reader = csv.reader(lines, strict=True)
        header = _next_row(reader, lines)
        if not header:
            raise DataError(f"{file}: the first line does not name the columns")
        if len(set(header)) != len(header):
            raise DataError(f"{file}: its header names a column twice")
        while (values := _next_row(reader, lines)) is not None:
            if not values:
                continue
            if len(values) != len(header):
                yield f"it has {len(values)} values, and the header has {len(header)} columns"
                continue
            pairs = zip(header, values, strict=True)
            yield {name: value or None for name, value in pairs}
    finally:
        csv.field_size_limit(limit)


def _next_row(reader: Any, lines: _Lines) -> list[str] | None:  # noqa: ANN401 - csv has no public type
    lines.num_bytes = 0
    try:
        row: list[str] | None = next(reader, None)
    except csv.Error as error:
        raise DataError(f"{lines.file}: line {lines.number} is not CSV: {error}") from error
    return row


class _Lines(Iterator[str]):
    """The lines of a file for the CSV reader, which joins those of a quoted text."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._lines = lines_of(file)
        self.number = 0
        self.num_bytes = 0
        """Of the lines that the reader took for one row."""

    def __next__(self) -> str:
        self.number, line = next(self._lines)
        self.num_bytes += len(line) + 1
        if self.num_bytes > MAX_LINE_BYTES:
            raise DataError(
                f"{self.file}: the row that ends in line {self.number} has more than {MAX_LINE_BYTES:,} bytes, the "
                "most that a row may have"
            )
        try:
            text = (line.removeprefix(_BYTE_ORDER_MARK) if self.number == 1 else line).decode()
        except UnicodeDecodeError as error:
            raise DataError(
                f"{self.file}: line {self.number} is not UTF-8 at byte {error.start + 1}"
            ) from error
        return text + "\n"
