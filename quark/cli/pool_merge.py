"""``quark pool merge``: appends the samples of pools to another one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quark.cli.pool_path import JsonFlag, pool_path


def merge(
    into: Annotated[
        Path,
        typer.Argument(
            metavar="INTO",
            help="The pool to write. It is created if it does not exist.",
            show_default=False,
        ),
    ],
    sources: Annotated[
        list[Path],
        typer.Argument(
            metavar="FROM…", help="Pools, or run directories, to read.", show_default=False
        ),
    ],
    is_same_tokenizer: Annotated[
        bool,
        typer.Option("--same-tokenizer", help="Merge even if the pools name different models."),
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Append the samples of pools to another one with the same vocabulary.

    No sample is added twice: samples keep their idempotency keys, and samples that INTO already has keep their scores
    there. A merge can be repeated. Different samples under one key get the key `<key>#<digest>`.

    **Example:**  `quark pool merge all runs/a runs/b`
    """
    from quark.cli.console import count, make_console, print_json, prose
    from quark.pool.ingest import merge_pools

    pool, paths = pool_path(into), [pool_path(source) for source in sources]
    results = merge_pools(pool, paths, is_same_tokenizer=is_same_tokenizer)
    if as_json:
        merged = [
            {"path": path, "appended": done.num_appended, "known": done.num_known}
            for path, done in zip(paths, results, strict=True)
        ]
        print_json({"pool": pool, "sources": merged})
        return
    console = make_console()
    for path, done in zip(paths, results, strict=True):
        line = (
            f"{path}: {count(done.num_appended)} samples came, {count(done.num_known)} were there"
        )
        console.print(prose(line, "green"), soft_wrap=True)
