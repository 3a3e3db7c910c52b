"""``quark init``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from quark.cli.pool_path import place


def init(
    path: Annotated[Path, typer.Argument(help="The file to write.")] = Path("quark.toml"),
    preset: Annotated[
        str, typer.Option(help="Preset to start from (`quark config list`).")
    ] = "demo",
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")] = False,
) -> None:
    """Write a configuration with a comment on every setting.

    **Examples**

    * `quark init` – writes quark.toml, to edit and pass to `quark train quark.toml`

    * `quark init toxicity.toml --preset smollm2-toxicity`
    """
    from quark.cli.console import make_console, prose
    from quark.config.load import load_config, to_toml
    from quark.errors import ConfigError
    from quark.publication import publish_file

    text = to_toml(load_config(preset).config, comments=True)
    if path.is_dir():
        path = path / "quark.toml"
    if os.path.lexists(path) and not force:
        raise ConfigError(f"{path} exists: give another name, or --force to overwrite it")
    publish_file(place(path), text)
    console = make_console()
    console.print(prose(f"wrote {path}", "green"))
    console.print(prose(f"  quark train {path} --dry-run    checks it"), soft_wrap=True)
    console.print(prose(f"  quark train {path}              runs it"), soft_wrap=True)
