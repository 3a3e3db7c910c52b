"""``quark pool compact``: merges small files into large ones."""

from __future__ import annotations

from typing import Annotated

import typer

from quark.cli.pool_path import JsonFlag, PoolPath, pool_path
from quark.pool.defaults import COMPACTED_FILE


def compact(
    path: PoolPath,
    max_samples: Annotated[
        int,
        typer.Option(
            "--max-samples", min=2, max=(1 << 31) - 1, help="Maximum number of samples in a file."
        ),
    ] = COMPACTED_FILE,
    as_json: JsonFlag = False,
) -> None:
    """Merge the many small files of appends into few large ones.

    Samples, ids and draws do not change. The small files remain for older snapshots until `quark pool gc` removes
    both.

    **Examples**

    * `quark pool compact runs/demo`

    * `quark pool compact runs/demo --max-samples 100000`
    """
    from quark.cli.console import count, make_console, print_json, prose
    from quark.pool.native import NativePool

    with NativePool.open(pool_path(path), writable=True) as pool:
        compacted = pool.compact(max_samples=max_samples)
    if as_json:
        print_json(
            {
                "segments_before": compacted.num_segments_before,
                "segments": compacted.num_segments,
                "commits": compacted.num_commits,
            }
        )
        return
    line = f"{count(compacted.num_segments_before)} segment files became {count(compacted.num_segments)}"
    if compacted.num_commits == 0:
        line = f"nothing to do: {count(compacted.num_segments)} segment files"
    make_console().print(prose(line, "green"), soft_wrap=True)
