"""``quark pool gc``: give old snapshots up for the space they take."""

from __future__ import annotations

from typing import Annotated

import typer

from quark.cli.pool_path import JsonFlag, PoolPath, pool_path


def gc(
    path: PoolPath,
    keep: Annotated[int, typer.Option("--keep", min=1, help="Snapshots to keep.")] = 1,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be removed.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Remove what only old snapshots need: replaced scores, discarded drafts, merged runs, old logs.

    Every sample stays. The older snapshots cannot be opened any more, so a run that goes on cannot go back
    behind them, and `explain` leaves their rounds out.

    **Examples**

    * `quark pool gc runs/demo --dry-run`

    * `quark pool gc runs/demo --keep 20`
    """
    from quark.cli.console import count, make_console, print_json, prose, size
    from quark.pool.native import NativePool

    with NativePool.open(pool_path(path), writable=True) as pool:
        collected = pool.gc(keep_snapshots=keep, dry_run=dry_run)
    if as_json:
        print_json(
            {
                "oldest_snapshot": collected.oldest_generation,
                "files": collected.num_files,
                "bytes": collected.num_bytes,
                "dry_run": dry_run,
            }
        )
        return
    done = "would remove" if dry_run else "removed"
    line = (
        f"{done} {count(collected.num_files)} files, {size(collected.num_bytes)}; "
        f"the oldest snapshot is {collected.oldest_generation}"
    )
    make_console().print(prose(line, "green"), soft_wrap=True)
