"""``quark model``: the model of a run as a folder of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quark.cli.checkpoint_option import CheckpointOption
from quark.cli.trust import AllowOption

app = typer.Typer(help="Take the model out of a run.", no_args_is_help=True)


@app.command()
def export(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run directory.", show_default=False)],
    folder: Annotated[Path, typer.Argument(help="The model folder to write.", show_default=False)],
    checkpoint: CheckpointOption = None,
    allow: AllowOption = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object on stdout.")
    ] = False,
) -> None:
    """Write a folder that plain transformers loads, with adapters merged.

    **Examples**

    * `quark model export runs/demo my-model`

    * `quark model export runs/demo best-model --checkpoint best`
    """
    from quark.api.exporting import export_model
    from quark.api.trained_model import open_model
    from quark.cli.console import make_console, print_json, prose

    source = open_model(run, checkpoint=checkpoint, allow=allow or ())
    export_model(source, folder)
    if as_json:
        print_json({"model": folder, "checkpoint_step": source.checkpoint_step})
    else:
        make_console().print(prose(f"wrote {folder}", "green"), soft_wrap=True)
