"""Reads the rows of JSON lines, CSV and Parquet files as plain records, within the bounds of ``quark.bounded_files``.

A row that cannot be read is a record with a problem, so that the rows after it are read.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quark.bounded_files import MAX_LINE_BYTES, lines_of, parquet_frames, parse_json
from quark.errors import ConfigError, DataError

JSON_LINES = (".jsonl", ".ndjson", ".json")
ENDINGS = (*JSON_LINES, ".csv", ".parquet")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Record:
    """One row of a file."""

    row: int
    """Its number, counted from 1; a CSV file's header is not a row."""
    values: Mapping[str, Any]
    """By column; empty where the row has a problem."""
    problem: str | None = None
    """Why the row cannot be read."""


def records_of(file: Path) -> Iterator[Record]:
    """The rows of a file, in the format that its name says.

    Raises:
        FileNotFoundError: There is no such file.
        ConfigError: Its name does not say a format.
        DataError: The file as a whole cannot be read, or exceeds a bound.
    """
    ending = file.suffix.lower()
    if ending not in ENDINGS:
        raise ConfigError(
            f"{file} does not say its format: let its name end in one of {', '.join(ENDINGS)}"
        )
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file}")
    match ending:
        case ".parquet":
            return _of_parquet(file)
        case ".csv":
            return csv_records(file)
        case _:
            return _of_json_lines(file)


def _of_parquet(file: Path) -> Iterator[Record]:
    rows = (row for frame in parquet_frames(file) for row in frame.iter_rows(named=True))
    for number, row in enumerate(rows, start=1):
        yield Record(number, row)


def _of_json_lines(file: Path) -> Iterator[Record]:
    for number, line in lines_of(file):
        if not line.strip():
            continue
        try:
            value = parse_json(line.removeprefix(_BYTE_ORDER_MARK) if number == 1 else line)
        except ValueError as error:
            yield Record(number, {}, f"it is {error}")
            continue
        if isinstance(value, dict):
            yield Record(number, value)
        else:
            yield Record(number, {}, "it is not a JSON object")


def csv_records(file: Path) -> Iterator[Record]:
    """The rows of a CSV file whose first line names the columns. All values are texts; an empty one is None.

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
        number = 0
        while (values := _next_row(reader, lines)) is not None:
            if not values:
                continue
            number += 1
            if len(values) != len(header):
                problem = f"it has {len(values)} values, and the header has {len(header)} columns"
                yield Record(number, {}, problem)
                continue
            pairs = zip(header, values, strict=True)
            yield Record(number, {name: value or None for name, value in pairs})
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


def first_columns(file: Path) -> tuple[str, ...]:
    """The columns of the first readable row; empty where there is none."""
    for record in records_of(file):
        if record.problem is None:
            return tuple(record.values)
    return ()
