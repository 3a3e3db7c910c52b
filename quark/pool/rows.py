"""The rows of a file or of a pool, with the exact columns and types of a scan.

Every value of a file is checked here. An error names file, row and column.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from quark.bounded_files import BYTES_AT_ONCE, arrow_frames, lines_of, parquet_frames, parse_json
from quark.errors import ConfigError, DataError
from quark.pool.export import SETTINGS_KEY, RowFormat
from quark.pool.sample_columns import FLOAT_COLUMNS, NUMBER_COLUMNS
from quark.pool.scan import COLUMNS, SCORE_PREFIX
from quark.types import FinishReason

if TYPE_CHECKING:
    from quark.pool.native import NativePool

_ROWS_AT_ONCE = 8192
_OWN = ["id", "prompt_id"]
"""Columns of a scan that the target pool assigns."""
TAKEN = {name: dtype for name, dtype in COLUMNS.items() if name not in _OWN}
"""Columns of a scan that the target pool stores."""
_NULLABLE = ("completion_text", *FLOAT_COLUMNS)
_LATER = tuple(column.name for column in NUMBER_COLUMNS if column.since > 1)
"""Columns that older files lack. Their values are null."""
_MEANT = {"finish_reason": (0, max(FinishReason)), "reward_token": (-1, 2**15 - 1)}
"""Valid ranges of columns whose type allows more."""
_RANGES = {
    pl.UInt8(): range(2**8),
    pl.UInt32(): range(2**32),
    pl.UInt64(): range(2**64),
    pl.Int16(): range(-(2**15), 2**15),
}


@dataclass(frozen=True, slots=True)
class Rows:
    """Consecutive rows of one source."""

    source: str
    """File or pool, for messages."""
    first: int
    """Number of the first row in the source, counted from 1."""
    frame: pl.DataFrame
    """``TAKEN``, then the score columns under their names in a scan."""

    def error(self, row: int, column: str, what: str) -> DataError:
        """An error for a value. ``row`` counts from 0 in the frame."""
        return DataError(f"{self.source}: row {self.first + row}, column {column}: {what}")


def first_true(mask: pl.Series) -> int | None:
    """The first row that is true."""
    rows = mask.arg_true()
    return None if rows.is_empty() else int(rows[0])


def rows_of_pool(pool: NativePool) -> Iterator[Rows]:
    """The samples of ``pool.snapshot``."""
    first = 1
    for frame in pool.scan().drop(_OWN).collect_batches(chunk_size=_ROWS_AT_ONCE):
        yield Rows(str(pool.path), first, frame)
        first += frame.height


def settings_of_file(file: Path) -> Mapping[str, Any]:
    """Settings of the pool that a Parquet file was exported from; empty if the file has none."""
    if RowFormat.of(file) is not RowFormat.PARQUET:
        return {}
    text = pl.read_parquet_metadata(file).get(SETTINGS_KEY, "{}")
    try:
        settings = parse_json(text)
    except ValueError as error:
        raise DataError(f"{file}: its settings of a pool are not JSON: {error}") from error
    if not isinstance(settings, dict):
        raise DataError(f"{file}: its settings of a pool are not a JSON object")
    return settings


def rows_of_file(file: Path) -> Iterator[Rows]:
    """The rows of a file from ``export_pool``, or of any file with the same columns.

    Raises:
        DataError: The file cannot be read, exceeds a limit of ``quark.bounded_files``, lacks a column, or holds an
            invalid value.
        ConfigError: Its suffix does not name a format that holds samples.
    """
    for rows in _typed_rows(file):
        for name, (least, most) in _MEANT.items():
            column = rows.frame[name]
            if (row := first_true(~column.is_between(least, most))) is not None:
                raise rows.error(row, name, f"{column[row]} is not in {least} .. {most}")
        yield rows


def _typed_rows(file: Path) -> Iterator[Rows]:
    row_format = RowFormat.of(file, with_tokens=True)
    if row_format is RowFormat.CSV:
        raise ConfigError(f"{file}: CSV does not hold tokens; import .parquet, .jsonl or .arrow")
    if row_format is RowFormat.JSONL:
        yield from _json_rows(file)
        return
    frames = parquet_frames(file) if row_format is RowFormat.PARQUET else arrow_frames(file)
    first = 1
    for frame in frames:
        if first == 1:
            _refuse_columns(str(file), frame.columns)
        if frame.height:
            yield _converted(Rows(str(file), first, frame.drop(_OWN, strict=False)))
        first += frame.height


def _refuse_columns(source: str, found: Iterable[str]) -> None:
    missing = [name for name in TAKEN if name not in (*found, *_LATER)]
    if missing:
        raise DataError(f"{source} has no column {', '.join(missing)}")
    scores: dict[str, str] = {}
    for name in found:
        if name not in COLUMNS:
            other = scores.setdefault(name.removeprefix(SCORE_PREFIX), name)
            if other != name:
                raise DataError(f"{source}: the columns {other} and {name} name the same score")


def _types(names: Iterable[str]) -> dict[str, pl.DataType]:
    """The columns to read and their types. All unknown names are scores."""
    scores = (name for name in names if name not in COLUMNS)
    return TAKEN | dict.fromkeys(scores, pl.Float32())


def _converted(rows: Rows) -> Rows:
    """Convert rows to the exact types of a scan. Raises DataError for a value that does not fit."""
    columns = []
    for name, dtype in _types(rows.frame.columns).items():
        given = (
            rows.frame[name]
            if name in rows.frame.columns
            else pl.repeat(None, rows.frame.height, dtype=dtype, eager=True).alias(name)
        )
        if not _is_alike(given.dtype, dtype):
            raise rows.error(0, name, f"it has the type {given.dtype}, not {dtype}")
        column = given.cast(dtype, strict=False)
        bad = column.is_null() & given.is_not_null()
        if isinstance(dtype, pl.List):
            bad |= column.list.eval(pl.element().is_null()).list.any().fill_null(False)
        if dtype.is_float():
            bad |= column.is_infinite() & given.cast(pl.Float64).is_finite()
            column = column.fill_nan(None)
        elif name not in _NULLABLE:
            bad |= column.is_null()
        if (row := first_true(bad)) is not None:
            raise rows.error(row, name, f"{shown(given[row])} is not {dtype}")
        columns.append(column)
    return Rows(rows.source, rows.first, pl.DataFrame(columns))


def _is_alike(given: pl.DataType, dtype: pl.DataType) -> bool:
    """Whether values of one type can be converted to the other."""
    if given == pl.Null:
        return True
    if isinstance(given, pl.List) and isinstance(dtype, pl.List):
        return given.inner == pl.Null or given.inner.is_integer()
    return (
        given == dtype
        or (given.is_integer() and dtype.is_numeric())
        or (given.is_float() and dtype.is_float())
    )


def _json_rows(file: Path) -> Iterator[Rows]:
    types: dict[str, pl.DataType] = {}
    values: dict[str, list[Any]] = {}
    first = 1
    num_bytes = 0
    for number, line in lines_of(file):
        row = _json_object(file, number, line)
        if not types:
            _refuse_columns(f"{file}: row 1", row)
            types = _types(row)
            values = {name: [] for name in types}
        for name in row:
            if name not in types and name not in _OWN:
                raise DataError(f"{file}: row {number}, column {name}: the first row has none")
        for name, dtype in types.items():
            try:
                values[name].append(_json_value(name, row.get(name), dtype))
            except (ValueError, OverflowError):  # a number that is too large
                what = f"{shown(row.get(name))} is not {dtype}"
                raise DataError(f"{file}: row {number}, column {name}: {what}") from None
        num_bytes += len(line)
        if number - first + 1 == _ROWS_AT_ONCE or num_bytes > BYTES_AT_ONCE:
            yield Rows(str(file), first, pl.DataFrame(values, schema=types))
            values = {name: [] for name in types}
            first = number + 1
            num_bytes = 0
    if values and values["key"]:
        yield Rows(str(file), first, pl.DataFrame(values, schema=types))


def _json_object(file: Path, number: int, line: bytes) -> dict[str, Any]:
    if not line.strip():
        raise DataError(f"{file}: row {number} is an empty line")
    try:
        row = parse_json(line, parse_float=_float)
    except ValueError as error:
        reason = f"is {error}"
        if isinstance(error.__cause__, UnicodeDecodeError):
            reason = f"is not JSON: {error}"
        elif isinstance(error.__cause__, ValueError) and "digits" in str(error):
            reason = "has a number that is too large"
        raise DataError(f"{file}: row {number} {reason}") from error
    if not isinstance(row, dict):
        raise DataError(f"{file}: row {number} is not a JSON object")
    return row


@dataclass(frozen=True, slots=True)
class _TooLarge:
    """A number that JSON can write and no float can hold."""

    text: str

    def __repr__(self) -> str:
        return self.text


def _float(text: str) -> float | _TooLarge:
    number = float(text)
    return number if math.isfinite(number) else _TooLarge(text)


def _json_value(name: str, value: object, dtype: pl.DataType) -> object:
    """Convert a JSON value to ``dtype``. Raises ValueError or OverflowError if it does not fit."""
    if value is None and (name in _NULLABLE or name not in TAKEN):
        return None
    if isinstance(dtype, pl.List) and isinstance(value, list):
        return [_whole(item, dtype.inner) for item in value]
    if dtype.is_float() and type(value) in (int, float):
        number = float(value)  # type: ignore[arg-type]
        struct.pack("<f", number)  # OverflowError if float32 cannot hold it
        return None if math.isnan(number) else number
    if dtype == pl.String and isinstance(value, str):
        value.encode()  # refuses a lone surrogate
        return value
    return _whole(value, dtype)


def _whole(value: object, dtype: Any) -> int:  # noqa: ANN401 - polars says a type or a class
    if type(value) is not int or value not in _RANGES.get(dtype, range(0)):
        raise ValueError
    return value


def shown(value: object) -> str:
    """A value for a message, not all of it if it is long."""
    text = repr(value.to_list() if isinstance(value, pl.Series) else value)
    return text if len(text) <= 80 else text[:79] + "…"
