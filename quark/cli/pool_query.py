"""``quark pool query``: SQL over a pool."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quark.cli.pool_path import JsonFlag, PoolPath, opened

if TYPE_CHECKING:
    import polars as pl

_SHOWN_ROWS = 100
_TABLE_COLUMNS = 8
"""Tables with more columns are printed as blocks."""


def query(
    path: PoolPath,
    sql: Annotated[str, typer.Argument(metavar="SQL", help="A SELECT over the table `pool`.")],
    limit: Annotated[
        int | None,
        typer.Option(
            "--limit",
            "-n",
            min=0,
            help=f"Rows at most. Default: {_SHOWN_ROWS} to look at, all of them into a file.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="Write the rows to this file: .parquet, .jsonl, .arrow or .csv."
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
    allow_files: Annotated[
        bool,
        typer.Option(
            "--allow-files",
            help="Allow every function of polars, including read_csv() and others that open files and URLs.",
        ),
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Query a pool in SQL, in the dialect of polars.

    The table has one row per sample: id, prompt_id, prompt_text, prompt_tokens, prompt_metadata,
    completion_tokens, completion_text, finish_reason, round, chunk, policy_step, reward_token, settings,
    seed, logprob_policy, logprob_reference, logprob_sampled, key, and every score column under its name. Only
    the columns in the query are read. Without `--allow-files`, the query can read nothing but the pool.

    **Examples**

    * `quark pool query runs/demo "SELECT round, COUNT(*) AS n, AVG(reward) FROM pool GROUP BY round"`

    * `quark pool query runs/demo "SELECT prompt_text, reward FROM pool WHERE reward > 0.9" --out best.csv`
    """
    from quark.cli.console import make_console, print_json, prose

    if out is not None:
        _write(path, sql, limit, out, is_overwriting=force, may_open_files=allow_files)
        if as_json:
            print_json({"out": out, "bytes": out.stat().st_size})
        else:
            make_console().print(prose(f"wrote {out}", "green"), soft_wrap=True)
        return
    most = _SHOWN_ROWS if limit is None else limit
    with _answer(path, sql, may_open_files=allow_files) as rows:
        found = rows.limit(most + 1).collect()
    shown, is_complete = found.head(most), found.height <= most
    if as_json:
        print_json(
            {
                "columns": shown.columns,
                "rows": [[_plain(value) for value in row] for row in shown.iter_rows()],
                "is_complete": is_complete,
            }
        )
    else:
        _show(shown, is_complete=is_complete)


@contextmanager
def _answer(path: Path, sql: str, *, may_open_files: bool) -> Iterator[pl.LazyFrame]:
    """The result of ``sql``, computed within the context. Raises ConfigError if polars cannot compute it."""
    from quark.api.querying import answered

    hint = "; --allow-files permits every function"
    with (
        opened(path) as pool,
        answered(pool, sql, may_open_files=may_open_files, hint=hint) as rows,
    ):
        yield rows


def _write(
    path: Path,
    sql: str,
    limit: int | None,
    out: Path,
    *,
    is_overwriting: bool,
    may_open_files: bool,
) -> None:
    from quark.pool.export import write_rows

    with _answer(path, sql, may_open_files=may_open_files) as rows:
        write_rows(rows if limit is None else rows.limit(limit), out, is_overwriting=is_overwriting)


def _show(rows: pl.DataFrame, *, is_complete: bool) -> None:
    """A table, or one block per row if the table would be too wide."""
    from quark.cli.console import count, figures, foreign, grid, make_console, prose
    from quark.printable import printable

    console = make_console()
    names = [printable(name, limit=64) for name in rows.columns]
    if rows.width <= _TABLE_COLUMNS:
        numeric = [index for index, dtype in enumerate(rows.dtypes) if dtype.is_numeric()]
        wide = [index for index in range(rows.width) if index not in numeric]
        table = grid(*names, right=numeric, wide=wide)
        for row in rows.iter_rows():
            table.add_row(*(foreign(_text(value), limit=400) for value in row))
        console.print(table)
    else:
        for number, row in enumerate(rows.iter_rows()):
            if number:
                console.print()
            values = [foreign(_text(value), limit=2000) for value in row]
            console.print(figures(list(zip(names, values, strict=True))))
    if not is_complete:
        note = (
            f"the first {count(rows.height)} rows; --limit shows more, --out writes all to a file"
        )
        make_console(sys.stderr).print(prose(note, "dim"), soft_wrap=True)


def _text(value: object) -> str:
    if value is None:
        return "–"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _plain(value: object) -> object:
    """A value for JSON. Dates, decimals and similar values become text."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    is_json = value is None or isinstance(value, str | bool | int | float | dict)
    return value if is_json else str(value)
