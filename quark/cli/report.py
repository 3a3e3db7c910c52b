"""``quark report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quark.cli.pool_path import place


def report(
    run_dir: Annotated[
        Path, typer.Argument(help="A finished or unfinished run directory.", show_default=False)
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="File to write, or a folder for report.html. Default: the run directory.",
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object on stdout.")
    ] = False,
) -> None:
    """Write a run's report: one HTML file that opens anywhere, offline.

    It only reads the run directory, so you can write it during a run or after a crash.

    **Example:**  `quark report runs/demo`
    """
    from quark.cli.console import make_console, print_json, prose
    from quark.report.render import write_report
    from quark.run_directory import RunDirectory

    if output is not None and output.is_dir():
        output = output / RunDirectory(run_dir).report.name
    path = write_report(run_dir, None if output is None else place(output))
    if as_json:
        print_json({"report": path, "bytes": path.stat().st_size})
    else:
        make_console().print(prose(f"wrote {path}", "green"), soft_wrap=True)
