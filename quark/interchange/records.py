"""Reads the rows of JSON lines, CSV and Parquet files as plain records, within the bounds of ``quark.bounded_files``.

A row that cannot be read is a record with a problem, so that the rows after it are read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quark.bounded_files import lines_of, parquet_frames, parse_json
from quark.csv_files import csv_rows
from quark.errors import ConfigError

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
            return _of_csv(file)
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


def _of_csv(file: Path) -> Iterator[Record]:
    for number, row in enumerate(csv_rows(file), start=1):
        yield Record(number, {}, row) if isinstance(row, str) else Record(number, row)


def first_columns(file: Path) -> tuple[str, ...]:
    """The columns of the first readable row; empty where there is none."""
    for record in records_of(file):
        if record.problem is None:
            return tuple(record.values)
    return ()
