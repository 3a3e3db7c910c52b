"""Loads a configuration: defaults < preset or file < ``--set``, with the origin of each value."""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ValidationError

from quark.config.schema import RunConfig
from quark.errors import ConfigError
from quark.settings import Misfit, Settings, misfits
from quark.types import Json

Table = dict[str, Any]
MAX_CONFIG_BYTES = 1 << 16
"""Of a configuration file."""
MAX_DOTS = 256
"""Of a line in it."""
BESIDE_PREFIX = "run:"
"""Begins the name of what lies in the folder of the configuration file, such as what a call gave to a run."""
_BESIDE = (("prompts", "source"), ("prompts", "evaluation_source"), ("model", "name"))
"""Sections and keys that may name it."""
FROM_CALL = "call"
"""Origin of a value that was passed to a function in Python."""
OWN_ORIGINS = ("--set", FROM_CALL)
"""Origins of values that the user of this process gives, whatever a file says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedConfig:
    """A configuration and the origin of every value in it."""

    config: RunConfig
    origins: Mapping[str, str]
    """Dotted key -> ``default``, ``preset NAME``, ``file PATH``, ``--set`` or ``call``."""
    name: str
    """Stem of the source, for the default run directory."""


def preset_names() -> list[str]:
    """Names of the shipped presets."""
    folder = resources.files("quark.config") / "presets"
    return sorted(
        entry.name.removesuffix(".toml")
        for entry in folder.iterdir()
        if entry.name.endswith(".toml")
    )


def load_config(
    source: str | Path | None,
    overrides: Sequence[str] = (),
    *,
    table: Mapping[str, object] | None = None,
) -> LoadedConfig:
    """The effective configuration.

    Args:
        source: a preset's name, a TOML file, or None for the bare defaults. A file may begin with
            ``preset = "demo"`` to start from a preset.
        overrides: ``section.key=value``, the value in TOML syntax; bare words are strings.
        table: values by section and key, over all others.

    Raises:
        ConfigError: no such file, more than ``MAX_CONFIG_BYTES``, not TOML, an unknown key (with the nearest
            valid one), or a bad value.
    """
    values: Table = {}
    origins: dict[str, str] = {}
    name = "run" if source is None else Path(source).stem
    try:
        for layer, origin in _layers(source) if source is not None else ():
            _merge(values, layer, origins, origin)
        for override in overrides:
            _merge(values, _override(override), origins, "--set")
        _merge(values, dict(table or {}), origins, FROM_CALL)
        config = _validate(values, _Origins(origins))
    except RecursionError as err:
        raise ConfigError(f"{source or '--set'}: tables are nested too deeply") from err
    for key in _leaves(config.model_dump(mode="json")):
        origins.setdefault(key, "default")
    return LoadedConfig(config=config, origins=origins, name=name)


def origin_of(loaded: LoadedConfig, key: str) -> str:
    """Where the value at ``key`` came from: its own entry or the nearest enclosing one."""
    while key:
        if key in loaded.origins:
            return loaded.origins[key]
        key = key.rpartition(".")[0]
    return "default"


def to_toml(config: RunConfig, *, comments: bool) -> str:
    """``config`` as a TOML file that loads to the same values.

    Args:
        config: what to write. Unset values are left out (as comments where ``comments`` is on).
        comments: explain each key.
    """
    lines: list[str] = []
    _write_section(lines, "", config, comments=comments)
    return "\n".join(lines).strip() + "\n"


def choices(annotation: object) -> tuple[str, ...]:
    """The words that a key of this type accepts, alone or in a list; empty if it accepts anything else."""
    if isinstance(annotation, type) and issubclass(annotation, StrEnum):
        return tuple(annotation)
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    return tuple(word for part in get_args(annotation) for word in choices(part))


def beside(config: RunConfig, folder: Path) -> RunConfig:
    """``config`` as a file in ``folder`` says it: what lies in the folder is named relative to the file."""
    values: dict[str, Settings] = {}
    for section, key in _BESIDE:
        settings = values.get(section) or getattr(config, section)
        value = getattr(settings, key)
        if value is not None and Path(value).is_relative_to(folder.absolute()):
            name = Path(value).relative_to(folder.absolute()).as_posix()
            values[section] = settings.model_copy(update={key: BESIDE_PREFIX + name})
    return config.model_copy(update=values)


def words_of(key: str) -> tuple[str, ...]:
    """The words that a dotted key accepts; empty if it accepts anything else, or there is no such key."""
    kind: object = RunConfig
    for part in key.split("."):
        fields = kind.model_fields if isinstance(kind, type) and issubclass(kind, BaseModel) else {}
        if part not in fields:
            return ()
        kind = fields[part].annotation
    return choices(kind)


def to_short_toml(source: str, keys: Sequence[str]) -> str:
    """A TOML file that starts from a preset and says only some keys, with its values and their explanations.

    Args:
        source: the preset.
        keys: dotted, of one section after the other.

    Raises:
        ConfigError: there is no such preset.
    """
    config = load_config(source).config
    lines = [f"preset = {_toml(source)}"]
    section = ""
    for key in keys:
        name, _, field = key.partition(".")
        if name != section:
            lines += ["", f"[{name}]"]
            section = name
        settings = getattr(config, name)
        description = type(settings).model_fields[field].description or ""
        lines += [f"# {line}" for line in description.splitlines()]
        lines.append(f"{field} = {_toml(settings.model_dump(mode='json')[field])}")
    return "\n".join(lines) + "\n"


def json_schema() -> dict[str, Json]:
    """JSON schema of a configuration file."""
    schema = RunConfig.model_json_schema()
    schema["properties"]["preset"] = {
        "type": "string",
        "enum": list(preset_names()),
        "description": "Start from this preset; the other keys override it.",
    }
    return schema


def _layers(source: str | Path) -> list[tuple[Table, str]]:
    path = Path(source).expanduser()
    if str(source) in preset_names():
        return [(_preset(str(source)), f"preset {source}")]
    if not path.is_file():
        if path.suffix == ".toml" or len(path.parts) > 1:
            raise ConfigError(f"there is no configuration file {path}")
        near = _nearest(str(source), preset_names())
        raise ConfigError(
            f"{source!r} is neither a preset nor a file{near}; presets: {', '.join(preset_names())}"
        )
    table = _located(_parsed(path), path.parent)
    layers: list[tuple[Table, str]] = []
    preset = table.pop("preset", None)
    if preset is not None:
        if preset not in preset_names():
            raise ConfigError(
                f"{path}: there is no preset {preset!r}{_nearest(str(preset), preset_names())}"
            )
        layers.append((_preset(preset), f"preset {preset}"))
    layers.append((table, f"file {path}"))
    return layers


def _located(table: Table, folder: Path) -> Table:
    """Replace the names of what lies beside the file by paths."""
    for section, key in _BESIDE:
        values = table.get(section)
        value = values.get(key) if isinstance(values, dict) else None
        if isinstance(value, str) and value.startswith(BESIDE_PREFIX):
            table[section][key] = str(folder.absolute() / value.removeprefix(BESIDE_PREFIX))
    return table


def _parsed(path: Path) -> Table:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_CONFIG_BYTES + 1)
    except OSError as err:
        raise ConfigError(f"{path}: cannot be read: {err.strerror}") from err
    if len(content) > MAX_CONFIG_BYTES:
        raise ConfigError(
            f"{path} has more than {MAX_CONFIG_BYTES:,} bytes: it is no configuration"
        )
    try:
        return parse_toml(content.decode("utf-8-sig"))
    except ValueError as err:
        raise ConfigError(f"{path}: not valid TOML: {err}") from err


def parse_toml(text: str) -> Table:
    """``tomllib.loads`` in bounded time.

    Raises:
        ValueError: it is not TOML, nested too deeply, or a line has more than ``MAX_DOTS`` dots.
    """
    for number, line in enumerate(text.split("\n"), start=1):
        # The parser's time grows with the square of the parts of a dotted key.
        if line.count(".") > MAX_DOTS:
            raise ValueError(f"line {number} has more than {MAX_DOTS} dots")
    try:
        return tomllib.loads(text)
    except RecursionError as err:
        raise ValueError("tables or lists are nested too deeply") from err


def _preset(name: str) -> Table:
    file = resources.files("quark.config") / "presets" / f"{name}.toml"
    return tomllib.loads(file.read_text(encoding="utf-8"))


def _override(text: str) -> Table:
    key, equals, value = text.partition("=")
    key = key.strip()
    parts = key.split(".")
    if not equals or not all(parts):
        raise ConfigError(f"--set {text!r}: write section.key=value")
    value = value.strip()
    try:
        parsed: Any = tomllib.loads(f"value = {value}")["value"]
    except ValueError:  # too many digits, or not TOML
        parsed = None if value in ("none", "null") else value
    for part in reversed(parts):
        parsed = {part: parsed}
    table: Table = parsed
    return table


def _merge(
    into: Table, table: Table, origins: dict[str, str], origin: str, prefix: str = ""
) -> None:
    for key, value in table.items():
        dotted = f"{prefix}{key}"
        if isinstance(value, dict) and isinstance(into.get(key, {}), dict):
            _merge(into.setdefault(key, {}), value, origins, origin, f"{dotted}.")
        else:
            into[key] = value
            origins[dotted] = origin


@dataclass(frozen=True, slots=True)
class _Origins:
    """Where a key was set, for error messages."""

    by_key: Mapping[str, str]

    def place(self, key: str) -> str:
        """`` (file PATH, line N)``, `` (--set)``, or nothing for a default."""
        for known, origin in self.by_key.items():
            if known == key or known.startswith(f"{key}.") or key.startswith(f"{known}."):
                line = _line_of(key, Path(origin[5:])) if origin.startswith("file ") else None
                return f" ({origin})" if line is None else f" ({origin}, line {line})"
        return ""


def _line_of(key: str, path: Path) -> int | None:
    """The line of a TOML file that sets ``key`` or opens its table; None if it is written in an unusual way."""
    table: tuple[str, ...] = ()
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), start=1):
        if opened := re.match(r"\s*\[\s*([\w.\- ]+?)\s*\]", line):
            table = tuple(opened[1].split("."))
            if ".".join(table) == key:
                return number
        elif (said := re.match(r"\s*([\w.\-]+)\s*=", line)) and ".".join((*table, said[1])) == key:
            return number
    return None


def _validate(values: Table, origins: _Origins) -> RunConfig:
    try:
        return RunConfig.model_validate(values)
    except ValidationError as err:
        raise ConfigError("\n".join(_explain(misfit, origins) for misfit in misfits(err))) from err


def _explain(misfit: Misfit, origins: _Origins) -> str:
    key = misfit.key
    where = origins.place(key)
    if misfit.is_unknown:
        known = known_keys()
        siblings = [k for k in known if k.rpartition(".")[0] == key.rpartition(".")[0]]
        return f"unknown key {key}{where}{_nearest(key, siblings or known) or _nearest(key, known)}"
    if not key:
        return misfit.expected
    return f"{key} = {misfit.value}{where}: {misfit.expected}"


def known_keys() -> list[str]:
    """All sections and dotted keys."""
    return [
        *RunConfig.model_fields,
        *_leaves(RunConfig().model_dump(mode="json")),
        *(
            f"{section}.{key}"
            for section, field in RunConfig.model_fields.items()
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
            for key in field.annotation.model_fields
        ),
    ]


def _nearest(key: str, known: Sequence[str]) -> str:
    """`` (did you mean X?)``, or nothing: by the whole key, then by its last part in any section."""
    match = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if not match:
        by_last = {k.rpartition(".")[2]: k for k in reversed(known)}
        last = difflib.get_close_matches(key.rpartition(".")[2], list(by_last), n=1, cutoff=0.7)
        match = [by_last[last[0]]] if last else []
    return f" (did you mean {match[0]}?)" if match else ""


def _leaves(table: Mapping[str, Any], prefix: str = "") -> list[str]:
    keys: list[str] = []
    for key, value in table.items():
        if isinstance(value, dict) and value:
            keys += _leaves(value, f"{prefix}{key}.")
        else:
            keys.append(f"{prefix}{key}")
    return keys


def _write_section(lines: list[str], name: str, section: BaseModel, *, comments: bool) -> None:
    dumped = section.model_dump(mode="json")
    nested: list[tuple[str, BaseModel, str | None]] = []
    if name:
        lines += ["", f"[{name}]"]
    for key, field in type(section).model_fields.items():
        value = getattr(section, key)
        if isinstance(value, BaseModel):
            nested.append((f"{name}.{key}" if name else key, value, field.description))
            continue
        if comments and field.description:
            lines += [f"# {line}" for line in field.description.splitlines()]
        if comments and (words := choices(field.annotation)):
            lines.append(
                f"# {'Any' if isinstance(value, tuple) else 'One'} of: {', '.join(words)}."
            )
        if dumped[key] is None:
            if comments:
                lines.append(f"# {key} =")
        else:
            lines.append(f"{key} = {_toml(dumped[key])}")
        if comments:
            lines.append("")
    for nested_name, value, _ in nested:
        if comments:
            doc = (type(value).__doc__ or "").strip().splitlines()
            if doc:
                lines += ["", f"# {doc[0]}"]
        _write_section(lines, nested_name, value, comments=comments)


def _toml(value: Any) -> str:  # noqa: ANN401 - any TOML value
    match value:
        case bool():
            return "true" if value else "false"
        case int() | float():
            return repr(value)
        case str():
            # TOML's basic strings are JSON's, but for one more forbidden character.
            return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
        case list() | tuple():
            return "[" + ", ".join(_toml(item) for item in value) + "]"
        case dict():
            return "{" + ", ".join(f"{json.dumps(k)} = {_toml(v)}" for k, v in value.items()) + "}"
    raise TypeError(f"{value!r} has no TOML form")
