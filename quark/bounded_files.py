"""Files of rows from anywhere, read within bounds: JSON lines, Parquet and Arrow IPC.

A file that is small on disk cannot take all memory: lines, nesting and decoded sizes are checked before
anything is allocated for them. Messages say which bound it was.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from quark.arrow_sizes import record_batches_of
from quark.errors import DataError
from quark.parquet_sizes import RowGroup, row_groups_of

if TYPE_CHECKING:
    import polars as pl

MAX_LINE_BYTES = 1 << 24
"""Of one line, and of one row of Parquet or Arrow."""
MAX_DEPTH = 64
"""Levels of lists and objects in a JSON value."""
MAX_DECODED_BYTES = 1 << 30
"""What a file of any size may decode to."""
MAX_EXPANSION = 256
"""A larger file may decode to this many times its size."""
MAX_ROW_GROUP_BYTES = 1 << 32
"""Of one row group of Parquet or record batch of Arrow, decoded."""
ROWS_AT_ONCE = 8192
BYTES_AT_ONCE = 1 << 26
"""Texts that are held as rows at once."""


def lines_of(path: Path) -> Iterator[tuple[int, bytes]]:
    """Every line of a file with its number, counted from 1, and without its end.

    Raises:
        DataError: A line has more than ``MAX_LINE_BYTES``.
    """
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 2):
            number += 1
            line = line.removesuffix(b"\n").removesuffix(b"\r")
            if len(line) > MAX_LINE_BYTES:
                raise DataError(
                    f"{path}: line {number} has more than {MAX_LINE_BYTES:,} bytes, the most that a row may have"
                )
            yield number, line


def parse_json(
    text: str | bytes,
    *,
    parse_float: Callable[[str], Any] | None = None,
    object_pairs_hook: Callable[[list[tuple[str, Any]]], Any] | None = None,
) -> Any:  # noqa: ANN401 - as json.loads
    """``json.loads`` of a text of limited depth.

    Raises:
        ValueError: It is not JSON, not Unicode, or nested more than ``MAX_DEPTH`` levels deep; says which.
    """
    try:
        value = json.loads(text, parse_float=parse_float, object_pairs_hook=object_pairs_hook)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at character {error.pos + 1}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start + 1}") from error
    except ValueError as error:  # of Python, for an integer of thousands of digits
        raise ValueError("a number has too many digits") from error
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [
            inner
            for outer in level
            if isinstance(outer, list | dict)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return value
    raise ValueError(_TOO_DEEP)


_TOO_DEEP = f"nested more than {MAX_DEPTH} levels deep"


def parquet_frames(path: Path) -> Iterator[pl.DataFrame]:
    """The rows of a Parquet file in order, at most ``ROWS_AT_ONCE`` rows and ``BYTES_AT_ONCE`` of texts at a time.

    The file is opened once, and one row group or a few small ones are decoded at a time. A file without rows is one
    frame without rows.

    Raises:
        FileNotFoundError: There is no such file.
        DataError: It cannot be read, or takes more than one of the bounds.
    """
    import polars as pl

    yield from _frames(path, "Parquet", "row group", row_groups_of, pl.scan_parquet)


def arrow_frames(path: Path) -> Iterator[pl.DataFrame]:
    """The rows of an Arrow IPC file, as ``parquet_frames`` gives those of a Parquet file, one record batch or a few at a time.

    Raises:
        FileNotFoundError: There is no such file.
        DataError: It cannot be read, has dictionary-encoded columns or extension types, or takes more than one of the
            bounds.
    """
    import polars as pl

    yield from _frames(path, "Arrow IPC", "record batch", record_batches_of, pl.scan_ipc)


def _frames(
    path: Path,
    kind: str,
    unit: str,
    groups_of: Callable[[BinaryIO], list[RowGroup]],
    scan: Callable[..., pl.LazyFrame],
) -> Iterator[pl.DataFrame]:
    import polars as pl

    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size == 0:
            raise DataError(f"{path} is empty")
        try:
            groups = groups_of(file)
        except ValueError as error:
            raise DataError(f"{path} is not a readable {kind} file: {error}") from error
        refuse_expansion(path, size, sum(group.num_bytes for group in groups))
        first = 0
        for num_rows in _spans(path, groups, unit):
            file.seek(0)
            try:
                rows = scan(file, glob=False).slice(first, num_rows).collect()
            except (pl.exceptions.PolarsError, OSError) as error:
                raise DataError(f"{path} is not a readable {kind} file: {error}") from error
            except pl.exceptions.PanicException as error:
                raise DataError(f"{path} is not a readable {kind} file: it is damaged") from error
            yield from frames_within_bounds(path, rows, first + 1) if num_rows else (rows,)
            first += num_rows


def refuse_expansion(path: Path, size: int, num_decoded: int) -> None:
    """Raise DataError where a file of ``size`` bytes decodes to more than one of its size may."""
    most = max(MAX_DECODED_BYTES, MAX_EXPANSION * size)
    if num_decoded > most:
        raise DataError(
            f"{path} has {size:,} bytes and decodes to {num_decoded:,}; a file may decode to {MAX_DECODED_BYTES:,} "
            f"bytes, or to {MAX_EXPANSION} times its size. Write it with less compression and a plain encoding, or as JSON lines"
        )


def frames_within_bounds(path: Path, rows: pl.DataFrame, first: int) -> Iterator[pl.DataFrame]:
    """Slices of at most ``ROWS_AT_ONCE`` rows and ``BYTES_AT_ONCE``; the first row has the number ``first`` in the file.

    Raises:
        DataError: One row alone takes more than ``MAX_LINE_BYTES``.
    """
    import numpy as np
    import polars as pl

    for start in range(0, rows.height, ROWS_AT_ONCE):
        frame = rows[start : start + ROWS_AT_ONCE]
        sizes = frame.select(
            pl.sum_horizontal(
                pl.lit(0), *(_bytes_of(pl.col(name), dtype) for name, dtype in frame.schema.items())
            )
        ).to_series()
        if sizes.max() > MAX_LINE_BYTES:  # type: ignore[operator]
            row = first + start + int(sizes.arg_max() or 0)
            raise DataError(
                f"{path}: row {row} takes more than {MAX_LINE_BYTES:,} bytes, the most that a row may have"
            )
        ends = np.cumsum(sizes.to_numpy())
        begin = 0
        while begin < frame.height:
            before = ends[begin - 1] if begin else 0
            end = max(begin + 1, int(np.searchsorted(ends, before + BYTES_AT_ONCE, side="right")))
            yield frame[begin:end]
            begin = end


def _bytes_of(values: pl.Expr, dtype: pl.DataType) -> pl.Expr:
    """Bytes of each value as an Int64; 0 for a null."""
    import polars as pl

    if isinstance(dtype, pl.String):
        sizes = values.str.len_bytes()
    elif isinstance(dtype, pl.Binary):
        sizes = values.bin.size()
    elif isinstance(dtype, pl.List):
        inner = _bytes_of(pl.element(), dtype.inner)  # type: ignore[arg-type]
        sizes = values.list.eval(inner).list.sum()
    elif isinstance(dtype, pl.Array):
        return _bytes_of(values.arr.to_list(), pl.List(dtype.inner))
    elif isinstance(dtype, pl.Struct):
        sizes = pl.sum_horizontal(
            pl.lit(0),
            *(
                _bytes_of(values.struct.field(field.name), field.dtype)  # type: ignore[arg-type]
                for field in dtype.fields
            ),
        )
    else:
        return values.is_null().replace_strict({True: 0, False: 8}, return_dtype=pl.Int64)
    return sizes.cast(pl.Int64).fill_null(0)


def _spans(path: Path, groups: list[RowGroup], unit: str) -> Iterator[int]:
    """Rows of groups to decode together, few enough for ``BYTES_AT_ONCE`` where there are several."""
    num_rows = num_bytes = 0
    for number, group in enumerate(groups, start=1):
        if group.num_bytes > MAX_ROW_GROUP_BYTES:
            raise DataError(
                f"{path}: {unit} {number} decodes to {group.num_bytes:,} bytes; the most is "
                f"{MAX_ROW_GROUP_BYTES:,}. Write it with fewer rows in a {unit}"
            )
        if num_rows and num_bytes + group.num_bytes > BYTES_AT_ONCE:
            yield num_rows
            num_rows = num_bytes = 0
        num_rows += group.num_rows
        num_bytes += group.num_bytes
    if num_rows or not sum(group.num_rows for group in groups):
        yield num_rows
