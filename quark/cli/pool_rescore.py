"""``quark pool rescore``: scores all samples with another reward."""

from __future__ import annotations

from typing import Annotated

import typer

from quark.cli.pool_path import JsonFlag, PoolPath, pool_path
from quark.pool.columns import REWARD_COLUMN
from quark.pool.defaults import RESCORING_CHUNK


def rescore(
    path: PoolPath,
    reward: Annotated[
        str,
        typer.Argument(
            metavar="NAME|MODULE:FUNCTION|FOLDER", help="The reward.", show_default=False
        ),
    ],
    name: Annotated[
        str, typer.Option("--as", help="Score column to write. An existing one is replaced.")
    ] = REWARD_COLUMN,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", "-s", metavar="KEY=VALUE", help="A reward setting, as in a run."),
    ] = None,
    chunk_size: Annotated[int, typer.Option(min=1, help="Samples per commit.")] = RESCORING_CHUNK,
    restart: Annotated[
        bool, typer.Option("--restart", help="Discard the scores of an interrupted attempt.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Score every sample again, without generating anything.

    Scores are committed in chunks, and the last commit switches to them. After an interruption, run the command again
    to continue. Older snapshots keep their scores. To train on the new scores, stop the run first (only one process
    can write a pool), then continue it with `--set reward.name=REWARD`.

    **Examples**

    * `quark pool rescore runs/mine toxicity`

    * `quark pool rescore runs/mine ./my_rewards.py:politeness --as politeness`
    """
    import sys

    from quark.api.rescoring import rescore as rescore_pool
    from quark.cli.console import (
        count,
        figures,
        make_console,
        number,
        print_json,
        prints_to_stderr,
        prose,
    )
    from quark.cli.reward import reward_config
    from quark.errors import ConfigError
    from quark.pool.native import NativePool
    from quark.rewards.build import build_reward

    config = reward_config(reward, set_ or ())
    with prints_to_stderr():
        function = build_reward(config)
    progress = make_console(sys.stderr)

    with NativePool.open(pool_path(path), writable=True) as pool, prints_to_stderr():
        try:
            result = rescore_pool(
                pool,
                name,
                function,
                config,
                chunk_size=chunk_size,
                restart=restart,
                on_warning=lambda text: progress.print(
                    prose("warning: " + text, "yellow"), soft_wrap=True
                ),
                on_chunk=lambda done, total: progress.print(
                    prose(f"{count(done)} of {count(total)} samples", "dim")
                ),
            )
        except ValueError as err:
            raise ConfigError(str(err)) from err
        column = next(column for column in pool.info().score_columns if column.name == name)
        generation = pool.snapshot.generation
    if as_json:
        print_json(
            {
                "score": name,
                "version": column.version,
                "snapshot": generation,
                "samples": result.num_samples,
                "resumed": result.num_resumed,
                "failed": result.num_failed,
                "mean": column.mean,
                "std": column.std,
                "min": column.min,
                "max": column.max,
            }
        )
        return
    spread = f"{number(column.min)} .. {number(column.mean)} .. {number(column.max)}"
    make_console().print(
        figures(
            [
                (f"score {name}", f"version {column.version}, in snapshot {generation}"),
                ("samples", f"{count(result.num_samples)}, {count(result.num_failed)} not scored"),
                ("lowest, mean, highest", spread),
            ]
        )
    )
