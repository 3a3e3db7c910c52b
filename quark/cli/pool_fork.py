"""``quark pool fork``: a second pool with the same samples."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quark.cli.pool_path import JsonFlag, PoolPath, place, pool_path


def fork(
    path: PoolPath,
    to: Annotated[
        Path,
        typer.Argument(
            metavar="TO", help="A directory that does not exist yet.", show_default=False
        ),
    ],
    snapshot: Annotated[
        int | None,
        typer.Option(min=0, help="Fork this snapshot instead of the newest.", show_default=False),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Create a second pool with the same samples. The two are independent afterwards.

    Both share data files through hard links, so a fork on the same disk needs hardly any time or space. It works while
    a run writes to the pool.

    **Examples**

    * `quark pool fork runs/demo experiment`

    * `quark pool fork runs/demo before --snapshot 12`
    """
    from quark.cli.console import count, make_console, print_json, prose
    from quark.errors import ConfigError
    from quark.pool.native import NativePool

    try:
        original = NativePool.open(pool_path(path), snapshot=snapshot)
    except ValueError as err:
        raise ConfigError(str(err)) from err
    with original:
        try:
            pool = original.fork(place(to))
        except FileExistsError as err:
            raise ConfigError(f"{to} exists: give another name") from err
    with pool:
        uuid, generation = pool.settings.uuid, pool.snapshot.generation
        num_samples = len(pool) - pool.num_removed
    # Not from info(), which reads the scores: the fork exists now, even if it is damaged.
    num_bytes = sum(file.stat().st_size for file in to.glob("*/*.arrow"))
    if as_json:
        print_json(
            {
                "path": to,
                "uuid": uuid,
                "snapshot": generation,
                "samples": num_samples,
                "bytes": num_bytes,
            }
        )
        return
    line = f"made {to}: {count(num_samples)} samples, from snapshot {generation} on"
    make_console().print(prose(line, "green"), soft_wrap=True)
