"""Columns of plain values from whatever a user has at hand: lists, arrays, frames, data sets.

Frames of pandas and polars and ``datasets.Dataset`` are recognized by what they offer, so none of their packages is
imported here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from quark.errors import DataError

Columns = dict[str, list[Any]]


def columns_of(data: object, *, text_column: str) -> Columns:
    """``data`` as columns of equal lengths.

    Args:
        data: a polars or pandas frame or series, a ``datasets.Dataset`` or ``DatasetDict``, a mapping of columns, a
            list of texts, or a list of rows.
        text_column: the name of the column that a list of texts, or a series, is.

    Raises:
        DataError: it is something else, or its columns differ in length.
    """
    columns = _columns(data, text_column)
    lengths = {name: len(values) for name, values in columns.items()}
    if len(set(lengths.values())) > 1:
        said = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise DataError(f"the columns differ in length: {said}")
    return columns


def json_lines(columns: Columns) -> str:
    """One JSON object a line.

    Raises:
        DataError: a value is nothing that JSON has; names row and column.
    """
    lines = []
    for number in range(len(next(iter(columns.values()), ()))):
        row = {name: values[number] for name, values in columns.items()}
        try:
            lines.append(json.dumps(row, ensure_ascii=True, allow_nan=False, sort_keys=True) + "\n")
        except (TypeError, ValueError) as err:
            name = next((key for key, value in row.items() if not _is_json(value)), "")
            raise DataError(f"row {number}, column {name}: {err}: leave the column out") from err
    return "".join(lines)


def _columns(data: Any, text_column: str) -> Columns:  # noqa: ANN401 - whatever a user has
    if isinstance(data, str | bytes):
        raise DataError("one text is given where a list of them is needed")
    if hasattr(data, "get_column_index"):  # a frame of polars
        return _plain_columns(data.to_dict(as_series=False))
    if hasattr(data, "iterrows"):  # a frame of pandas
        return _plain_columns(data.to_dict("list"))
    if isinstance(data, Mapping):
        parts = list(data.values())
        if parts and all(hasattr(part, "column_names") for part in parts):  # a DatasetDict
            return _of_splits(data, text_column)
        return _plain_columns(data)
    if hasattr(data, "column_names") and hasattr(data, "to_dict"):  # a data set
        return _plain_columns(data.to_dict())
    if not isinstance(data, Iterable):
        raise DataError(f"{type(data).__name__} is no list, frame or data set")
    items = [plain(item) for item in (data.to_list() if hasattr(data, "to_list") else data)]
    if all(isinstance(item, str) for item in items):
        return {text_column: items}
    return _of_rows(items)


def _of_splits(splits: Mapping[Any, Any], text_column: str) -> Columns:
    rows = []
    for split, part in splits.items():
        columns = _columns(part, text_column)
        names = [name for name in columns if name != "split"]
        cells = zip(*(columns[name] for name in names), strict=True)
        rows += [{**dict(zip(names, row, strict=True)), "split": str(split)} for row in cells]
    return _of_rows(rows)


def _of_rows(rows: list[Any]) -> Columns:
    names: dict[str, None] = {}
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise DataError(f"row {number} is {type(row).__name__}, not a text or a row of columns")
        names |= dict.fromkeys(map(str, row))
    return {name: [row.get(name) for row in rows] for name in names}


def _plain_columns(columns: Mapping[Any, Any]) -> Columns:
    return {
        str(name): [plain(value) for value in _list(name, column)]
        for name, column in columns.items()
    }


def _list(name: object, column: Any) -> Iterable[Any]:  # noqa: ANN401 - a column of any kind
    if isinstance(column, str | bytes) or not isinstance(column, Iterable):
        raise DataError(f"the column {name} is {type(column).__name__}, not a list of values")
    return column.tolist() if isinstance(column, np.ndarray) else column


def plain(value: Any) -> Any:  # noqa: ANN401 - a value of any library
    """``value`` as Python's own; a missing value of pandas, and NaN, is None."""
    if isinstance(value, np.generic | np.ndarray) or hasattr(value, "to_list"):
        value = value.tolist() if hasattr(value, "tolist") else value.to_list()
    if isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    return None if type(value).__name__ in ("NAType", "NaTType") else value


def _is_json(value: object) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True
