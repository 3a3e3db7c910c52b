"""``quark view``: a local page over runs and pools."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def view(
    paths: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[RUN|POOL|FOLDER]...",
            help="Runs, pools or folders with runs. Default: runs.",
            show_default=False,
        ),
    ] = None,
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port of this machine; 0 takes any.")
    ] = 0,
    browser: Annotated[
        bool, typer.Option("--open", help="Open the page in the default browser.")
    ] = False,
    seconds: Annotated[
        float | None,
        typer.Option(min=0.0, help="Stop after this long. Default: at Ctrl-C.", show_default=False),
    ] = None,
) -> None:
    """Look at runs and pools in a browser: from a curve to the samples of a round to one sample.

    The page is served on this machine alone, at a secret address, and reads only. It follows runs that go on.

    **Examples**

    * `quark view runs/demo`

    * `quark view runs imported-pool --open`
    """
    import threading

    from quark.cli.console import make_console, prose
    from quark.view.server import ViewServer
    from quark.view.sources import Answers, sources_of

    server = ViewServer(Answers(sources_of(paths or [Path("runs")])), port=port)
    with server:
        make_console(sys.stdout).print(prose(server.url), soft_wrap=True)
        if seconds is None:
            make_console(sys.stderr).print(prose("Ctrl-C stops the page.", "dim"))
        if browser:
            import webbrowser

            webbrowser.open(server.url)
        if seconds is not None:
            timer = threading.Timer(seconds, server.shutdown)
            timer.daemon = True
            timer.start()
        try:
            server.serve_forever(poll_interval=0.1)
        except KeyboardInterrupt:
            return
