"""``quark pool export``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from quark.cli.pool_path import JsonFlag, PoolPath, opened


def export(
    path: PoolPath,
    out: Annotated[
        Path,
        typer.Argument(
            metavar="OUT", help="The file: .parquet, .jsonl or .arrow.", show_default=False
        ),
    ],
    where: Annotated[
        str | None,
        typer.Option(help="Only samples for which this SQL condition holds.", show_default=False),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Write samples to one file: Parquet, JSON lines or Arrow, as its name says.

    The file holds every column of all samples, or of those that `--where` keeps; `quark pool import` makes a
    pool of it. It appears when it is whole. Some columns, or CSV: `quark pool query PATH "SELECT …" --out FILE`.

    **Examples**

    * `quark pool export runs/demo samples.parquet`

    * `quark pool export runs/demo recent.parquet --where "round >= 40 AND reward > 0.5"`
    """
    from quark.cli.console import count, make_console, print_json, prose, size
    from quark.pool.export import export_pool

    with opened(path) as pool:
        num_samples = export_pool(pool, out, where=where, is_overwriting=force)
        snapshot = pool.snapshot
    num_bytes = out.stat().st_size
    if as_json:
        print_json(
            {
                "out": out,
                "samples": num_samples,
                "bytes": num_bytes,
                "snapshot": dataclasses.asdict(snapshot),
            }
        )
    else:
        line = f"wrote {count(num_samples)} samples to {out} ({size(num_bytes)})"
        make_console().print(prose(line, "green"), soft_wrap=True)
