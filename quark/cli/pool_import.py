"""``quark pool import``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quark.cli.pool_path import JsonFlag, PoolPath, pool_path


def import_(
    path: PoolPath,
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="What `quark pool export` wrote.", show_default=False),
    ],
    vocab_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=2**32 - 1,
            help="Tokens of a new pool's vocabulary. Parquet files bring it along.",
        ),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Append the samples of a file to a pool, or make a pool of them.

    What the pool already has under its key is left alone: an import that was interrupted is simply repeated.
    Other samples, or other scores, under a key that the pool has are refused.

    **Example:**  `quark pool import copy samples.parquet`
    """
    from quark.cli.console import count, make_console, print_json, prose
    from quark.pool.ingest import import_file

    pool = pool_path(path)
    done = import_file(pool, file, vocab_size=vocab_size)
    if as_json:
        print_json({"pool": pool, "appended": done.num_appended, "known": done.num_known})
    else:
        line = (
            f"{pool}: {count(done.num_appended)} samples came, {count(done.num_known)} were there"
        )
        make_console().print(prose(line, "green"), soft_wrap=True)
