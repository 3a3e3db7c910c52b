"""``quark push``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quark.cli.checkpoint_option import CheckpointOption
from quark.cli.trust import AllowOption

if TYPE_CHECKING:
    from quark.api.pushing import Upload


def push(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="A run directory.", show_default=False)
    ],
    repo: Annotated[
        str,
        typer.Argument(metavar="OWNER/NAME", help="A model repository.", show_default=False),
    ],
    public: Annotated[
        bool,
        typer.Option("--public", help="A repository that is made is public. Default: private."),
    ] = False,
    license_: Annotated[
        str | None,
        typer.Option(
            "--license",
            help="Identifier of the license, such as apache-2.0. Default: that of the original model, if known.",
            show_default=False,
        ),
    ] = None,
    checkpoint: CheckpointOption = None,
    allow: AllowOption = None,
    yes: Annotated[
        bool,
        typer.Option("--yes", help="Upload without asking. Needed where there is no terminal."),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object on stdout.")
    ] = False,
) -> None:
    """Upload a run's model and its card to the Hugging Face Hub. It shows what would be sent, and asks.

    **Examples**

    * `quark push runs/demo me/my-model`

    * `quark push runs/demo me/my-model --checkpoint best --license apache-2.0`
    """
    from quark.api.pushing import push as push_model
    from quark.cli.console import make_console, print_json, prints_to_stderr, prose
    from quark.run_directory import RunDirectory

    def confirm(upload: Upload) -> bool:
        _show(upload)
        return yes or _answers_yes()

    with prints_to_stderr():
        address = push_model(
            RunDirectory(run),
            repo,
            confirm=confirm,
            is_private=not public,
            license=license_,
            checkpoint=checkpoint,
            allow=allow or (),
        )
    if as_json:
        print_json({"repo": repo, "commit": address})
    elif address is None:
        make_console().print(prose("nothing was uploaded", "yellow"))
    else:
        make_console().print(prose(f"uploaded: {address}", "green"), soft_wrap=True)


def _show(upload: Upload) -> None:
    from quark.cli.console import figures, foreign, make_console, size

    console = make_console(sys.stderr)
    kind = "private" if upload.is_private else "public"
    rows = [
        ("repository", foreign(f"{upload.repo} at {upload.endpoint}, {kind} if it is new")),
        ("license", foreign(upload.license or "none: --license names one")),
        ("files", foreign(f"{len(upload.files)}, {size(upload.num_bytes)}")),
    ]
    console.print(figures([*rows, *((f"  {name}", size(count)) for name, count in upload.files)]))


def _answers_yes() -> bool:
    from quark.errors import ConfigError

    if sys.stdin is None or not sys.stdin.isatty():
        raise ConfigError("there is no terminal to ask on: add --yes to upload")
    sys.stderr.write("Upload? [y/N] ")
    sys.stderr.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes")
