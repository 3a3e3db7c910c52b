"""``quark config``: effective values with their origins, presets, and the schema."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from quark.cli.completing import presets, setting_keys

if TYPE_CHECKING:
    from rich.table import Table

    from quark.config.load import LoadedConfig

app = typer.Typer(
    help="Show presets, the effective configuration and its schema.", no_args_is_help=True
)

JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]


@app.command()
def show(
    source: Annotated[
        str | None,
        typer.Argument(
            metavar="PRESET|CONFIG.toml",
            help="Default: the built-in defaults.",
            show_default=False,
            autocompletion=presets,
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", "-s", metavar="KEY=VALUE", help="Override a key.", autocompletion=setting_keys
        ),
    ] = None,
    changed: Annotated[
        bool, typer.Option("--changed", help="Only values that differ from the defaults.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Show every value of a configuration and where it comes from.

    **Examples**

    * `quark config show demo`

    * `quark config show my.toml --set optimizer.learning_rate=1e-4`
    """
    from quark.cli.console import make_console, print_json
    from quark.config.load import load_config

    loaded = load_config(source, set_ or ())
    if as_json:
        config = loaded.config.model_dump(mode="json", exclude_defaults=changed)
        origins = {
            key: origin
            for key, origin in loaded.origins.items()
            if not changed or origin != "default"
        }
        print_json({"config": config, "origins": origins})
        return
    make_console().print(values_table(loaded, is_changed_only=changed))


@app.command("list")
def list_(as_json: JsonFlag = False) -> None:
    """List the presets and their purpose."""
    from quark.cli.console import figures, make_console, print_json
    from quark.config.load import load_config, preset_names

    names = list(preset_names())
    if as_json:
        print_json({"presets": names})
        return
    rows = []
    for name in names:
        config = load_config(name).config
        rows.append((name, f"model {config.model.name}, reward {config.reward.name}"))
    console = make_console()
    console.print(figures([(name, text) for name, text in rows]))


@app.command()
def schema() -> None:
    """Print the JSON schema of a configuration, for editors."""
    from quark.cli.console import print_json
    from quark.config.load import json_schema

    print_json(json_schema())


def flat_values(loaded: LoadedConfig) -> dict[str, object]:
    """Dotted key -> value of the whole configuration, sections in order."""
    flat: dict[str, object] = {}

    def walk(prefix: str, value: object) -> None:
        if isinstance(value, dict) and value:
            for key, item in value.items():
                walk(f"{prefix}.{key}" if prefix else str(key), item)
        else:
            flat[prefix] = value

    walk("", loaded.config.model_dump(mode="json"))
    return flat


def values_table(loaded: LoadedConfig, *, is_changed_only: bool = False) -> Table:
    """Key, value and origin of every setting; settings that differ from the default stand out."""
    from quark.cli.console import foreign, grid, prose
    from quark.config.load import load_config, origin_of

    table = grid("key", "value", "from", wide=(1,))
    section = ""
    defaults = flat_values(load_config(None)) if is_changed_only else {}
    for key, value in flat_values(loaded).items():
        if is_changed_only and value == defaults.get(key):
            continue
        origin = origin_of(loaded, key)
        if (head := key.split(".")[0]) != section:
            if section:
                table.add_section()
            section = head
        style = "dim" if origin == "default" else "bold"
        table.add_row(
            prose(key, style),
            foreign(_shown(value), limit=300),
            foreign(origin, style="dim" if origin == "default" else "green"),
        )
    return table


def _shown(value: object) -> str:
    import json

    if value is None:
        return "unset"
    return value if isinstance(value, str) else json.dumps(value)
