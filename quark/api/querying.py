"""Answers SQL over a pool: what `quark pool query` and `Pool.query` share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import polars as pl

from quark.errors import ConfigError
from quark.pool.native import NativePool
from quark.pool.sql import check_query, reason_of


@contextmanager
def answered(
    pool: NativePool, sql: str, *, may_open_files: bool = False, hint: str = ""
) -> Iterator[pl.LazyFrame]:
    """The rows that ``sql`` asks for, to be computed inside.

    Args:
        pool: the table ``pool``.
        sql: a SELECT in the dialect of polars.
        may_open_files: permit every function, also those that open files and URLs.
        hint: added to the message if a function is not permitted.

    Raises:
        ConfigError: the query is refused, or polars cannot compute it.
    """
    try:
        check_query(sql, may_open_files=may_open_files)
    except ValueError as error:
        way_out = hint if "which is not among" in str(error) else ""
        raise ConfigError(f"the query {error}{way_out}") from error
    try:
        yield pl.SQLContext(pool=pool.scan()).execute(sql, eager=False)
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        reason = reason_of(error)
        way_out = "; the table is called pool" if reason.startswith("relation ") else ""
        raise ConfigError(f"the query cannot be run: {reason}{way_out}") from error
