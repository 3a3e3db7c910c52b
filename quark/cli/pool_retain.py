"""``quark pool retain``: removes the oldest samples."""

from __future__ import annotations

from typing import Annotated

import typer

from quark.cli.pool_path import JsonFlag, PoolPath, pool_path


def retain(
    path: PoolPath,
    max_samples: Annotated[
        int | None,
        typer.Option(
            "--max-samples", min=1, max=(1 << 64) - 1, help="Keep at most this many samples."
        ),
    ] = None,
    max_rounds: Annotated[
        int | None,
        typer.Option(
            "--max-rounds", min=1, max=(1 << 64) - 1, help="Keep this many newest rounds."
        ),
    ] = None,
    before_round: Annotated[
        int | None,
        typer.Option(
            "--before-round",
            min=0,
            max=(1 << 32) - 1,
            help="Remove the samples of earlier rounds.",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only report what would be removed.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Remove the oldest samples of a pool in one commit. Only whole appends are removed, never the newest one.

    The other samples keep their ids. Older snapshots still show the removed samples, and their files stay until
    `quark pool gc` expires these snapshots.

    **Examples**

    * `quark pool retain runs/demo --max-rounds 10 --dry-run`

    * `quark pool retain runs/demo --max-samples 1000000`
    """
    from quark.cli.console import count, make_console, print_json, prose
    from quark.errors import ConfigError
    from quark.pool.native import NativePool

    if max_samples is None and max_rounds is None and before_round is None:
        raise ConfigError("say what is to stay: --max-samples, --max-rounds or --before-round")
    with NativePool.open(pool_path(path), writable=True) as pool:
        retained = pool.retain(
            max_samples=max_samples,
            max_rounds=max_rounds,
            before_round=before_round,
            dry_run=dry_run,
        )
        num_kept = len(pool) - retained.num_removed
    if as_json:
        print_json(
            {
                "samples": retained.num_samples,
                "appends": retained.num_appends,
                "kept": num_kept,
                "removed": retained.num_removed,
                "dry_run": dry_run,
            }
        )
        return
    done = "would remove" if dry_run else "removed"
    line = (
        f"{done} {count(retained.num_samples)} samples in {count(retained.num_appends)} appends; "
        f"{count(num_kept)} stay"
    )
    if retained.num_samples and not dry_run:
        line += ". Their files go with the older snapshots: quark pool gc"
    make_console().print(prose(line, "green"), soft_wrap=True)
