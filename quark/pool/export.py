"""Rows out of a pool and into one file: Parquet, JSON lines, Arrow IPC, CSV.

A file appears under its name when it is whole and synced, never before.
"""

from __future__ import annotations

import dataclasses
import json
import os
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl

from quark.errors import ConfigError, DataError

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
    def of(cls, path: Path) -> RowFormat:
        """The format of a file called ``path``. Raises ConfigError for an ending that none has."""
        for row_format in cls:
            if path.suffix.lower() in row_format.value:
                return row_format
        known = ", ".join(row_format.value[0] for row_format in cls)
        raise ConfigError(f"{path} does not say its format: let its name end in one of {known}")


def export_pool(
    pool: NativePool, path: Path, *, where: str | None = None, is_overwriting: bool = False
) -> int:
    """Write the samples of ``pool.snapshot`` to a file that ``import_file`` reads; returns how many.

    Memory does not grow with their number, but for 4 bytes per sample and score column.

    Args:
        pool: To read.
        path: The file.
        where: An SQL expression over the columns of a scan; samples for which it does not hold are left out.
        is_overwriting: Whether a file that is there is replaced.

    Raises:
        ConfigError: The file exists, its name does not say a format that holds every column, or ``where`` is no
            condition on columns that there are.
        DataError: An infinite number is to become JSON, which has none.
        PoolCorruptedError: Samples are damaged; no file appears.
    """
    rows = pool.scan()
    num_rows = len(pool) - pool.num_removed
    if where is not None:
        try:
            rows = rows.filter(pl.sql_expr(where))
            num_rows = rows.select(pl.len()).collect().item()
        except pl.exceptions.PolarsError as error:
            columns = ", ".join(pool.scan().collect_schema())
            raise ConfigError(
                f"where = {where!r} is no SQL condition on a pool's columns ({columns}): {error}"
            ) from error
    if RowFormat.of(path) is RowFormat.JSONL:
        _refuse_infinite(rows)
    settings = json.dumps(dataclasses.asdict(pool.settings))
    write_rows(rows, path, is_overwriting=is_overwriting, metadata={SETTINGS_KEY: settings})
    return num_rows


def write_rows(
    rows: pl.LazyFrame,
    path: Path,
    *,
    is_overwriting: bool = False,
    metadata: dict[str, str] | None = None,
) -> None:
    """Compute ``rows`` and write them to ``path`` as they come, in the format that its name says.

    Args:
        rows: What to write. JSON lines and CSV hold numbers that are not finite as nothing.
        path: The file.
        is_overwriting: Whether a file that is there is replaced.
        metadata: Kept in a Parquet file; the other formats have no place for it.

    Raises:
        ConfigError: The file exists, or its name does not say a format that holds these columns.
        FileNotFoundError: Its directory does not exist.
    """
    row_format = RowFormat.of(path)
    if row_format is RowFormat.CSV:
        nested = [name for name, dtype in rows.collect_schema().items() if dtype.is_nested()]
        if nested:
            raise ConfigError(
                f"CSV cannot hold lists ({', '.join(nested)}): select other columns, or write .parquet"
            )
    if path.is_dir():
        raise ConfigError(f"{path} is a directory: name a file in it")
    if not is_overwriting and path.exists():
        raise ConfigError(f"{path} exists; --force replaces it")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no directory {path.parent}")
    staged = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        # Opened here, not by name: after an error polars' own threads could make the file once more.
        with staged.open("wb") as file:
            match row_format:
                case RowFormat.PARQUET:
                    rows.sink_parquet(file, metadata=metadata)
                case RowFormat.JSONL:
                    rows.sink_ndjson(file)
                case RowFormat.ARROW:
                    rows.sink_ipc(file)
                case RowFormat.CSV:
                    rows.sink_csv(file)
            file.flush()
            os.fsync(file.fileno())
        staged.replace(path)
    finally:
        staged.unlink(missing_ok=True)
    _sync_directory(path.parent)


def _refuse_infinite(rows: pl.LazyFrame) -> None:
    floats = [name for name, dtype in rows.collect_schema().items() if dtype.is_float()]
    infinite = rows.filter(pl.any_horizontal(pl.col(floats).is_infinite()))
    found = infinite.select("id", *floats).head(1).collect()
    for sample in found.iter_rows(named=True):
        name = next(name for name in floats if sample[name] in (float("inf"), float("-inf")))
        raise DataError(
            f"{name} of sample {sample['id']} is infinite, which JSON cannot say: export to .parquet or .arrow"
        )


def _sync_directory(path: Path) -> None:
    directory = os.open(path, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
