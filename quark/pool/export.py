"""Writes rows of a pool to one file: Parquet, JSON lines, Arrow IPC or CSV.

The file appears under its name only when it is complete and synced.
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
"""Metadata key of a Parquet file for the settings of the exported pool, as JSON."""


class RowFormat(Enum):
    """The format of a file of rows, with the suffixes of its name."""

    PARQUET = (".parquet",)
    JSONL = (".jsonl", ".ndjson")
    ARROW = (".arrow", ".ipc", ".feather")
    CSV = (".csv",)

    @classmethod
    def of(cls, path: Path, *, with_tokens: bool = False) -> RowFormat:
        """The format of the file ``path``. With ``with_tokens``, the error names only formats that can hold tokens.

        Raises:
            ConfigError: No format has this suffix. Names the valid ones.
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
    """Write the samples of ``pool.snapshot`` to a file that ``import_file`` can read. Returns their number.

    Memory use does not grow with the number of samples, except for 4 bytes per sample and score column.

    Args:
        pool: The pool to read.
        path: The file.
        where: An SQL expression over the columns of a scan, within the limits of ``quark.pool.sql``. Samples for
            which it does not hold are left out.
        is_overwriting: Whether to replace an existing file.

    Raises:
        ConfigError: The file exists, its suffix does not name a format that holds every column, or ``where`` is not
            a condition on existing columns.
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
    """The rows for which a condition within the limits of ``quark.pool.sql`` holds, and their number.

    Raises:
        ConfigError: It is not a condition on existing columns.
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
    """Compute ``rows`` and stream them to ``path``, in the format of its suffix.

    Args:
        rows: The rows. JSON lines hold NaN as null and cannot hold infinity. CSV holds ``NaN``, ``inf`` and ``-inf``.
        path: The file.
        is_overwriting: Whether to replace an existing file.
        metadata: Stored in a Parquet file. The other formats cannot store it.

    Raises:
        ConfigError: The file exists, or its suffix does not name a format that holds these columns.
        DataError: The rows hold an infinite number, and the format is JSON.
        FileNotFoundError: The directory does not exist.
        OSError: The disk is full or fails. No file appears.
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
    # Opened here instead of by name, because threads of polars could create the file again after an error.
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
            # Polars drops the error number, or the whole reason.
            if file.failure is None:
                raise
            raise file.failure from None


def _without_infinity(rows: pl.LazyFrame) -> pl.LazyFrame:
    """The same rows. Raises DataError for an infinite number, which JSON cannot hold."""
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
