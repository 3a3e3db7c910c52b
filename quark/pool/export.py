"""Rows out of a pool and into one file: Parquet, JSON lines, Arrow IPC, CSV.

A file appears under its name when it is whole and synced, never before.
"""

from __future__ import annotations

import dataclasses
import json
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from quark.errors import ConfigError, DataError
from quark.pool.sql import condition, reason_of
from quark.printable import printable
from quark.publication import publishing

if TYPE_CHECKING:
    from quark.pool.native import NativePool

SETTINGS_KEY = "quark.pool"
"""Where a Parquet file keeps the settings of the pool that it was exported from, as JSON."""


class RowFormat(Enum):
    """What a file of rows is written as, by the endings of its name."""

    PARQUET = (".parquet",)
    JSONL = (".jsonl", ".ndjson")
    ARROW = (".arrow", ".ipc", ".feather")
    CSV = (".csv",)

    @classmethod
    def of(cls, path: Path, *, with_tokens: bool = False) -> RowFormat:
        """The format of a file called ``path``, which is to hold tokens or need not.

        Raises:
            ConfigError: No format has that ending; names those that would do.
        """
        for row_format in cls:
            if path.suffix.lower() in row_format.value:
                return row_format
        fitting = (row_format for row_format in cls if not with_tokens or row_format is not cls.CSV)
        known = ", ".join(row_format.value[0] for row_format in fitting)
        raise ConfigError(f"{path} does not say its format: let its name end in one of {known}")


def export_pool(
    pool: NativePool, path: Path, *, where: str | None = None, is_overwriting: bool = False
) -> int:
    """Write the samples of ``pool.snapshot`` to a file that ``import_file`` reads; returns how many.

    Memory does not grow with their number, but for 4 bytes per sample and score column.

    Args:
        pool: To read.
        path: The file.
        where: An SQL expression over the columns of a scan, within the bounds of ``quark.pool.sql``; samples for
            which it does not hold are left out.
        is_overwriting: Whether a file that is there is replaced.

    Raises:
        ConfigError: The file exists, its name does not say a format that holds every column, or ``where`` is no
            condition on columns that there are.
        DataError, FileNotFoundError, OSError: As ``write_rows``.
        PoolCorruptedError: Samples are damaged; no file appears.
    """
    RowFormat.of(path, with_tokens=True)
    rows = pool.scan()
    num_rows = len(pool) - pool.num_removed
    if where is not None:
        rows, num_rows = narrowed(rows, where)
    settings = json.dumps(dataclasses.asdict(pool.settings))
    write_rows(rows, path, is_overwriting=is_overwriting, metadata={SETTINGS_KEY: settings})
    return num_rows


def narrowed(rows: pl.LazyFrame, where: str) -> tuple[pl.LazyFrame, int]:
    """The rows for which a condition within the bounds of ``quark.pool.sql`` holds, and how many there are.

    Raises:
        ConfigError: It is no condition on columns that there are.
    """
    named = f"where = {printable(repr(where), limit=200)}"
    try:
        narrow = rows.filter(condition(where, rows.collect_schema().names()))
        num_rows: int = narrow.select(pl.len()).collect().item()
    except ValueError as error:
        raise ConfigError(f"{named} {error}") from error
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        raise ConfigError(
            f"{named} is no SQL condition on a pool's columns: {reason_of(error)}"
        ) from error
    return narrow, num_rows


def write_rows(
    rows: pl.LazyFrame,
    path: Path,
    *,
    is_overwriting: bool = False,
    metadata: dict[str, str] | None = None,
) -> None:
    """Compute ``rows`` and write them to ``path`` as they come, in the format that its name says.

    Args:
        rows: What to write. JSON lines hold NaN as null and no infinity; CSV says ``NaN``, ``inf`` and ``-inf``.
        path: The file.
        is_overwriting: Whether a file that is there is replaced.
        metadata: Kept in a Parquet file; the other formats have no place for it.

    Raises:
        ConfigError: The file exists, or its name does not say a format that holds these columns.
        DataError: An infinite number is to become JSON, which has none.
        FileNotFoundError: Its directory does not exist.
        OSError: The disk is full or fails; no file appears.
    """
    row_format = RowFormat.of(path)
    if row_format is RowFormat.CSV:
        nested = [name for name, dtype in rows.collect_schema().items() if dtype.is_nested()]
        if nested:
            raise ConfigError(
                f"CSV cannot hold lists ({', '.join(nested)}): select other columns, or write .parquet"
            )
    if row_format is RowFormat.JSONL:
        rows = _without_infinity(rows)
    if path.is_dir():
        raise ConfigError(f"{path} is a directory: name a file in it")
    if not is_overwriting and path.exists():
        raise ConfigError(f"{path} exists; --force replaces it")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no directory {path.parent}")
    # Opened here, not by name: after an error polars' own threads could make the file once more.
    with publishing(path) as file:
        try:
            match row_format:
                case RowFormat.PARQUET:
                    rows.sink_parquet(file, metadata=metadata)
                case RowFormat.JSONL:
                    rows.sink_ndjson(file)
                case RowFormat.ARROW:
                    rows.sink_ipc(file)
                case RowFormat.CSV:
                    rows.sink_csv(file)
        except (pl.exceptions.PolarsError, OSError):
            # Polars passes the reason on without its number, or not at all.
            if file.failure is None:
                raise
            raise file.failure from None


def _without_infinity(rows: pl.LazyFrame) -> pl.LazyFrame:
    """The same rows; DataError when one comes that holds an infinite number, which JSON lacks."""
    names = [name for name, dtype in rows.collect_schema().items() if _has_floats(dtype)]

    def checked(frame: pl.DataFrame) -> pl.DataFrame:
        for name in names:
            if _is_any_infinite(frame[name]):
                row = next(
                    row for row in range(frame.height) if _is_any_infinite(frame[name][[row]])
                )
                of_sample = f" of sample {frame['id'][row]}" if "id" in frame.columns else ""
                raise DataError(
                    f"{name}{of_sample} is infinite, which JSON cannot say: write .parquet or .arrow"
                )
        return frame

    return rows.map_batches(checked, streamable=True)


def _has_floats(dtype: Any) -> bool:  # noqa: ANN401 - polars says a type or a class
    if isinstance(dtype, pl.List | pl.Array):
        return _has_floats(dtype.inner)
    if isinstance(dtype, pl.Struct):
        return any(_has_floats(field.dtype) for field in dtype.fields)
    return bool(dtype.is_float())


def _is_any_infinite(values: pl.Series) -> bool:
    if isinstance(values.dtype, pl.List | pl.Array):
        return _is_any_infinite(values.explode())
    if isinstance(values.dtype, pl.Struct):
        return any(map(_is_any_infinite, values.struct.unnest().get_columns()))
    return values.dtype.is_float() and values.is_infinite().any()
