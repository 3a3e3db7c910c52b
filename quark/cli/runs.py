"""``quark runs``: the runs in a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

_STYLES = {"running": "cyan", "finished": "green", "damaged": "red"}


def runs(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="A folder with runs, or one run.")
    ] = Path("runs"),
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object on stdout.")
    ] = False,
) -> None:
    """List the runs in a folder: state, reward before and now, drift.

    Drift is KL(sampled || original) in nats per token. It only reads small files, also of a run that goes on.

    **Example:**  `quark runs`
    """
    import dataclasses

    from quark.cli.console import (
        count,
        foreign,
        grid,
        make_console,
        number,
        print_json,
        prose,
    )
    from quark.report.overview import runs_in

    found = runs_in(folder)
    if as_json:
        print_json({"runs": [dataclasses.asdict(run) for run in found]})
        return
    console = make_console()
    if not found:
        console.print(prose(f"no runs in {folder}"))
        return
    titles = ("state", "rounds", "samples", "reward", "before", "now", "drift")
    table = grid("run", *titles, right=(2, 3, 5, 6, 7), wide=(0,))
    for run in found:
        table.add_row(
            foreign(str(run.path)),
            prose(run.state, _STYLES.get(run.state, "yellow")),
            prose(f"{run.rounds}/{run.num_rounds}"),
            prose(count(run.samples)),
            foreign(run.reward, limit=40),
            *(prose(number(value)) for value in (run.reward_before, run.reward_now, run.drift)),
        )
    console.print(table)
    for run in found:
        if run.problem is not None:
            console.print(foreign(f"{run.path}: {run.problem}", style="red"), soft_wrap=True)
