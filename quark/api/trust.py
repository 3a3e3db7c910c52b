"""Checks before anything uses what a run directory's own configuration reaches."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from quark.config.grants import Grants, require
from quark.config.load import OWN_ORIGINS, LoadedConfig, origin_of
from quark.config.reach import reaches
from quark.config.schema import RunConfig
from quark.run_directory import RunDirectory


def check_reach(
    config: RunConfig,
    run: Path,
    *,
    sections: Collection[str],
    named: Collection[tuple[str, str]],
    allow: Collection[str] | None,
) -> None:
    """Check that the user allows what the configuration of ``run`` reaches; see ``quark.config.grants.require``.

    Raises:
        ConfigError: the user has not.
    """
    require(reaches(config, run, sections=sections), run, named=named, allowed=allow or ())


def may_reach(
    config: RunConfig, run: Path, *, sections: Collection[str], allow: Collection[str]
) -> bool:
    """Whether the user allows, now or before, everything that some sections of a run's configuration reach."""
    grants = Grants(run)
    found = reaches(config, run, sections=sections)
    return all(reach.thing in allow or grants.has(reach) for reach in found)


def check_source(loaded: LoadedConfig, source: str | None, allow: Collection[str] | None) -> None:
    """Check the reach of a configuration that is a run's own file.

    Passing the path of a stranger's file does not vouch for its text. Values of ``--set``,
    and those that a call in Python gives, are the user's own.

    Raises:
        ConfigError: the user has not allowed it.
    """
    run = _run_of(source)
    if run is not None:
        asked = [
            reach
            for reach in reaches(loaded.config, run)
            if origin_of(loaded, reach.key) not in OWN_ORIGINS
        ]
        require(asked, run, allowed=allow or ())


def may_read_prompts(config: RunConfig, run: Path, source: str) -> bool:
    """Whether ``source`` is a prompt file of the run's configuration that ships with quark or was allowed before."""
    if source not in (config.prompts.source, config.prompts.evaluation_source):
        return False
    return may_reach(config, run, sections=("prompts",), allow=())


def remember(config: RunConfig, run: Path) -> None:
    """Allow ``run`` what a configuration of the user's own reaches, so that using the run asks nothing."""
    Grants(run).remember(reaches(config, run))


def _run_of(source: str | None) -> Path | None:
    """The run directory whose own configuration ``source`` is."""
    if source is None:
        return None
    path = Path(source).expanduser()
    for place in (path, path.resolve()):
        run = RunDirectory(place.parent)
        if run.is_run() and run.config.name == place.name:
            return run.path
    return None
