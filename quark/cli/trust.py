"""The option ``--allow``: what a run directory's own configuration may reach."""

from __future__ import annotations

from typing import Annotated

import typer

AllowOption = Annotated[
    list[str] | None,
    typer.Option(
        "--allow",
        metavar="THING",
        help="A file, address, variable or code that the run's own configuration may reach. Remembered for this run.",
        show_default=False,
    ),
]
