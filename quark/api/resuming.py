"""A run directory as the source of a training: it goes on with its own configuration."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from quark.config.load import OWN_ORIGINS, LoadedConfig
from quark.run_directory import RunDirectory
from quark.run_identity import RunIdentity


def run_named(source: object) -> RunDirectory | None:
    """The run directory that ``source`` is; None if it is something else."""
    if not isinstance(source, str | Path):
        return None
    run = RunDirectory(Path(source).expanduser())
    return run if run.is_run() else None


def with_first_origins(loaded: LoadedConfig, run: RunDirectory) -> LoadedConfig:
    """``loaded`` from the run's own file, with the origins that its values had when the run began.

    Values that this call gives keep their origin. Not before what the file reaches was checked: ``run.json`` is no
    more to be trusted than the file.

    Raises:
        RunDirectoryError: ``run.json`` is damaged.
    """
    known = RunIdentity.read(run).origins
    origins = {
        key: origin if origin in OWN_ORIGINS else known.get(key, origin)
        for key, origin in loaded.origins.items()
    }
    return dataclasses.replace(loaded, origins=origins)
