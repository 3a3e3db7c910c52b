"""``quark pool gc``: expires old snapshots to free disk space."""

from __future__ import annotations

from typing import Annotated

import typer

from quark.cli.pool_path import JsonFlag, PoolPath, pool_path


def gc(
    path: PoolPath,
    keep: Annotated[
        int, typer.Option("--keep", min=1, max=(1 << 63) - 1, help="Snapshots to keep.")
    ] = 1,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only report what would be removed.")
    ] = False,
    force: Annotated[
        bool,
        typer.Option("--force", help="Also expire snapshots that the run's checkpoints need."),
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Expire old snapshots, and remove the files that only they need.

    These are replaced scores, discarded drafts, merged and compacted files, old logs, and samples that `retain` removed.
    Expired snapshots can no longer be opened: `explain` leaves out their rounds, and a run cannot resume from a
    checkpoint that needs one. Without --force, the command refuses to expire a snapshot that a checkpoint needs.

    **Examples**

    * `quark pool gc runs/demo --dry-run`

    * `quark pool gc runs/demo --keep 20`
    """
    import sys

    from quark.cli.console import counted, make_console, print_json, prose, size
    from quark.errors import ConfigError
    from quark.pool.native import NativePool
    from quark.run_directory import RunDirectory
    from quark.training.state.run_state import oldest_snapshot_needed

    with NativePool.open(pool_path(path), writable=True) as pool:
        needed = None if force else oldest_snapshot_needed(RunDirectory.around(path))
        if needed is not None:
            would_keep = pool.gc(keep_snapshots=keep, dry_run=True).oldest_generation
            if would_keep > needed:
                reason = (
                    f"a checkpoint of the run goes on from snapshot {needed}, which would be given up: keep it with "
                    f"--keep {pool.snapshot.generation + 2 - needed}, or give up resuming with --force"
                )
                if not dry_run:
                    raise ConfigError(reason)
                warning = prose(f"warning: without --dry-run this is refused: {reason}", "yellow")
                make_console(sys.stderr).print(warning, soft_wrap=True)
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
    done, be = ("would remove", "would be") if dry_run else ("removed", "is")
    line = (
        f"{done} {counted(collected.num_files, 'file')}, {size(collected.num_bytes)}; "
        f"the oldest snapshot {be} {collected.oldest_generation}"
    )
    make_console().print(prose(line, "green"), soft_wrap=True)
