"""``quark init``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from quark.cli.completing import presets
from quark.cli.pool_path import place

_HEAD = """\
# The settings to change first; the others are the preset's. `quark config show FILE` shows all of them,
# docs/configuration.md explains them, and `quark init --full` writes them.
"""
_FIRST_KEYS = (
    "model.name",
    "prompts.source",
    "sampling.max_new_tokens",
    "reward.name",
    "run.num_rounds",
    "run.prompts_per_round",
    "optimizer.learning_rate",
)


def init(
    path: Annotated[Path, typer.Argument(help="The file to write.")] = Path("quark.toml"),
    preset: Annotated[
        str,
        typer.Option(help="Preset to start from (`quark config list`).", autocompletion=presets),
    ] = "own",
    full: Annotated[
        bool, typer.Option("--full", help="Write every setting, not only the first to change.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")] = False,
) -> None:
    """Write a configuration to edit: the settings to change first, each with a comment.

    **Examples**

    * `quark init` – writes quark.toml for your own model, prompts and reward

    * `quark init demo.toml --preset demo --full` – every setting of the demo

    * `quark init toxicity.toml --preset smollm2-toxicity`
    """
    from quark.cli.console import make_console, prose
    from quark.config.load import load_config, to_short_toml, to_toml
    from quark.errors import ConfigError
    from quark.publication import publish_file

    if full:
        text = to_toml(load_config(preset).config, comments=True)
    else:
        text = _HEAD + to_short_toml(preset, _FIRST_KEYS)
    if path.is_dir():
        path = path / "quark.toml"
    if os.path.lexists(path) and not force:
        raise ConfigError(f"{path} exists: give another name, or --force to overwrite it")
    publish_file(place(path), text)
    console = make_console()
    console.print(prose(f"wrote {path}", "green"))
    console.print(prose(f"  quark train {path} --dry-run    checks it"), soft_wrap=True)
    console.print(prose(f"  quark train {path}              runs it"), soft_wrap=True)
