"""The reach of a configuration: the network, files, environment variables and code, each named exactly.

A configuration that the user passes is trusted. One in a run directory may come from a stranger, so
the user must allow what it reaches (``quark.config.grants``). What ships with quark, and data
inside the run directory itself, reach nothing.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from enum import StrEnum
from importlib.machinery import PathFinder
from pathlib import Path

from quark.config.schema import RunConfig
from quark.data.hub_files import SCHEME, is_on_hub
from quark.errors import UnsafeFileError
from quark.http_client import HttpSettings
from quark.models.config import ModelConfig
from quark.rewards.config import GIVEN_PREFIX, REWARD_NAMES, RewardConfig
from quark.rewards.source_files import package_files
from quark.safe_files import read_bytes


class Kind(StrEnum):
    """What is reached."""

    NETWORK = "network"
    FILE = "file"
    VARIABLE = "environment variable"
    CODE = "code"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reach:
    """One thing outside of a run directory that a configuration names."""

    kind: Kind
    key: str
    """The setting that names it, such as ``reward.http.url``."""
    thing: str
    """Exactly what is reached: a URL, ``hub:NAME`` or ``hub:NAME@REVISION``, ``package:NAME``, an
    absolute path with its links followed, ``$VARIABLE``, the name of a tracker, or a function as
    ``/path/file.py:name`` or ``module:name``."""
    said: str
    """The same, as written in the configuration."""
    sha256: str | None = None
    """For code: the hash of its file; None without a file to hash."""
    imports: tuple[tuple[str, str | None], ...] = ()
    """For code: path and hash of each file of its own folder or package that it imports."""


def reaches(
    config: RunConfig, run: Path, *, sections: Collection[str] = tuple(RunConfig.model_fields)
) -> tuple[Reach, ...]:
    """Everything that ``config`` reaches.

    Args:
        config: as it takes effect.
        run: the run directory that it is for; data inside is the run's own.
        sections: only what these use; ``evaluation`` uses the judges and the gold reward, ``pool`` the
            extra scores and the gold reward, too.
    """
    found: list[Reach] = []
    if "model" in sections:
        found += _of_model(config.model, run)
    if "prompts" in sections:
        for key in ("source", "evaluation_source"):
            source: str | None = getattr(config.prompts, key)
            if source is not None and is_on_hub(source):
                thing = "hub:" + source.removeprefix(SCHEME)
                reach = Reach(kind=Kind.NETWORK, key=f"prompts.{key}", thing=thing, said=source)
                found.append(reach)
            elif source is not None and not source.startswith("embedded:"):
                found += _of_path(f"prompts.{key}", source, run)
    rewards: list[tuple[str, str]] = []
    if "reward" in sections:
        rewards = [("reward.name", config.reward.name)]
        rewards += [("reward.members", name) for name in config.reward.members]
    if "evaluation" in sections:
        rewards += [("evaluation.judges", name) for name in config.evaluation.judges]
    if "pool" in sections:
        rewards += [("pool.extra_scores", name) for name in config.pool.extra_scores]
    if config.pool.gold is not None and not {"evaluation", "pool"}.isdisjoint(sections):
        rewards.append(("pool.gold", config.pool.gold))
    for key, name in rewards:
        found += _of_reward(key, name, config.reward, run)
    if "sampling" in sections and config.sampling.backend == "http":
        server = config.sampling.http
        found += _of_server("sampling.http", server)
        found.append(_network("sampling.http.reload_url", server.reload_url))
    if "tracking" in sections:
        found += [
            _network("tracking.trackers", name)
            for name in config.tracking.trackers
            if name != "tensorboard"
        ]
    return tuple(dict.fromkeys(found))


def _of_model(config: ModelConfig, run: Path) -> Iterator[Reach]:
    name = config.name
    scheme = name.partition(":")[0]
    if scheme == "package":
        yield Reach(kind=Kind.FILE, key="model.name", thing=name, said=name)
    elif scheme != "embedded":
        yield from _of_model_name("model.name", name, config.revision, run)
    if config.cache_dir is not None and (config.gguf_file is not None or name.endswith(".gguf")):
        yield from _of_path("model.cache_dir", str(config.cache_dir), run)


def _of_model_name(key: str, name: str, revision: str | None, run: Path) -> Iterator[Reach]:
    """A model folder or file, or a name on the Hub."""
    is_path = name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name
    if is_path or Path(name).expanduser().exists():
        yield from _of_path(key, name, run)
    else:
        thing = f"hub:{name}" if revision is None else f"hub:{name}@{revision}"
        said = name if revision is None else thing
        yield Reach(kind=Kind.NETWORK, key=key, thing=thing, said=said)


def _of_reward(key: str, name: str, settings: RewardConfig, run: Path) -> Iterator[Reach]:
    if name == "classifier":
        classifier = settings.classifier
        if classifier.model:
            yield from _of_model_name(
                "reward.classifier.model", classifier.model, classifier.revision, run
            )
    elif name == "http":
        yield from _of_server("reward.http", settings.http)
    elif name in REWARD_NAMES or name.startswith(GIVEN_PREFIX):
        return
    elif ":" in name:
        thing, file = _code(name)
        sha256 = _sha256(file)
        yield Reach(
            kind=Kind.CODE,
            key=key,
            thing=thing,
            said=name,
            sha256=sha256,
            imports=() if file is None or sha256 is None else _imports(file),
        )
    else:
        yield from _of_path(key, name, run)


def _of_server(section: str, settings: HttpSettings) -> Iterator[Reach]:
    if settings.url:
        yield _network(f"{section}.url", settings.url)
    variable = settings.api_key_env
    if variable is not None:
        yield Reach(
            kind=Kind.VARIABLE, key=f"{section}.api_key_env", thing=f"${variable}", said=variable
        )


def _network(key: str, address: str) -> Reach:
    return Reach(kind=Kind.NETWORK, key=key, thing=address, said=address)


def _of_path(key: str, said: str, run: Path) -> Iterator[Reach]:
    """A file or folder, unless it is the run's own."""
    real = _real(said)
    if not real.is_relative_to(os.path.realpath(run)):
        yield Reach(kind=Kind.FILE, key=key, thing=str(real), said=said)


def _real(said: str) -> Path:
    return Path(os.path.realpath(Path(said).expanduser()))


def _code(name: str) -> tuple[str, Path | None]:
    """A function's exact name, and the file that holds it."""
    module, _, attribute = name.rpartition(":")
    if module.endswith(".py"):
        file = Path(os.path.realpath(module))
        return f"{file}:{attribute}", file
    words = (*module.split("."), *attribute.split("."))
    is_plain = all(map(str.isidentifier, words)) and module not in ("hub", "package")
    # Set apart from what names another kind of thing: a URL has a colon, too.
    return name if is_plain else f"module {name}", _module_file(module)


def _module_file(module: str) -> Path | None:
    """The file of a module, found without running its packages; None if it is unknown."""
    places: list[str] | None = None
    file: str | None = None
    parts = module.split(".")
    for end in range(1, len(parts) + 1):
        spec = PathFinder.find_spec(".".join(parts[:end]), places)
        if spec is None:
            return None
        file = spec.origin if spec.has_location else None
        places = list(spec.submodule_search_locations or ())
    return None if file is None else Path(os.path.realpath(file))


def _imports(file: Path) -> tuple[tuple[str, str | None], ...]:
    try:
        return tuple((str(path), _sha256(path)) for path in package_files(file)[1:])
    except OSError:  # a file went while they were looked for
        return ()


def _sha256(file: Path | None) -> str | None:
    if file is None:
        return None
    try:
        return hashlib.sha256(read_bytes(file, file.parent)).hexdigest()
    except (OSError, UnsafeFileError):
        return None
