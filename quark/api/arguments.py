"""What a call passes: settings by keyword, and objects in place of names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from quark.api.resuming import run_named
from quark.config.load import LoadedConfig, load_config
from quark.config.schema import RunConfig
from quark.errors import ConfigError
from quark.rewards.given import GivenReward
from quark.run_directory import RunDirectory
from quark.training.given import Given, GivenModel, GivenPrompts

Table = dict[str, dict[str, Any]]
_Made = TypeVar("_Made")


def loaded_with(
    source: str | Path | Mapping[str, object] | RunConfig | None,
    run_dir: Path | None,
    *,
    model: object,
    prompts: object,
    reward: object,
    settings: Mapping[str, object],
) -> tuple[LoadedConfig, RunDirectory, Given]:
    """The configuration of a call, its run directory, and the objects that the configuration stands for.

    Raises:
        ConfigError: a setting is unknown, ambiguous or of no possible value.
        DataError, ModelError, RewardError: an object cannot be used.
    """
    table = settings_table(settings)
    given = Given(
        reward=_or_setting(table, "reward", reward, GivenReward),
        prompts=_or_setting(table, "prompts", prompts, GivenPrompts.of),
        model=_or_setting(table, "model", model, _loaded_model),
    )
    origin: str | Path | None = None
    if isinstance(source, RunConfig):
        table = _merged(source.model_dump(mode="json"), table)
    elif isinstance(source, Mapping):
        table = _merged(source, table)
    else:
        origin = source
    if (resumed := run_named(source)) is not None:
        run_dir, origin = run_dir or resumed.path, resumed.config
    name = load_config(origin).name
    run = RunDirectory(run_dir if run_dir is not None else Path("runs") / name)
    return load_config(origin, table=_merged(table, given.table(run))), run, given


def settings_table(settings: Mapping[str, object]) -> Table:
    """Settings by section and key.

    Args:
        settings: a value under its key (``num_rounds``) where only one section has that key, else under
            ``section.key``; or a mapping under a section.

    Raises:
        ConfigError: several sections have the key; names them.
    """
    sections = {
        name: field.annotation
        for name, field in RunConfig.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
    }
    table: dict[str, Any] = {}
    for key, value in settings.items():
        if key in sections and isinstance(value, Mapping):
            table = _merged(table, {key: value})
            continue
        path = key.split(".")
        if len(path) == 1:
            holders = [name for name, kind in sections.items() if key in kind.model_fields]
            if len(holders) > 1:
                ways = " or ".join(f"{name}={{{key!r}: ...}}" for name in holders)
                raise ConfigError(f"{key} is a setting of {', '.join(holders)}: write {ways}")
            path = [*holders, key]
        nested: object = value
        for part in reversed(path):
            nested = {part: nested}
        assert isinstance(nested, dict)
        table = _merged(table, nested)
    return table


def _or_setting(
    table: Table,
    section: str,
    value: object,
    make: Callable[[object], _Made],
) -> _Made | None:
    """None for what the configuration can say, which goes into ``table``; else the object."""
    if value is None:
        return None
    said: Mapping[str, object]
    if isinstance(value, str | Path):
        said = {"source" if section == "prompts" else "name": str(value)}
    elif isinstance(value, Mapping) and section != "prompts":
        said = value
    else:
        return make(value)
    table[section] = {**said, **table.get(section, {})}
    return None


def _loaded_model(value: object) -> GivenModel:
    if isinstance(value, tuple) and len(value) == 2:
        return GivenModel.of(*value)
    return GivenModel.of(value, None)


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        if isinstance(value, Mapping):
            merged[key] = _merged(old if isinstance(old, Mapping) else {}, value)
        else:
            merged[key] = value
    return merged
