"""The option ``--checkpoint``, shared by the commands that load a run's model."""

from __future__ import annotations

from typing import Annotated

import typer

CheckpointOption = Annotated[
    str | None,
    typer.Option(
        "--checkpoint",
        metavar="best|last|STEP",
        help="Weights of a checkpoint of the run. Default: the finished model, or the last checkpoint without one.",
        show_default=False,
    ),
]
