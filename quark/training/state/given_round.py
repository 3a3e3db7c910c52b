"""The pool that a run begins with: which one it is, and whether a run that is there began with it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from quark.errors import ConfigError
from quark.pool.native import NativePool
from quark.run_directory import RunDirectory
from quark.run_identity import FirstRound


@dataclass(frozen=True, slots=True, kw_only=True)
class GivenRound:
    """The pool that a call names for the first round."""

    path: Path
    first_round: FirstRound
    """Its state when the call began."""

    @classmethod
    def of(cls, path: Path, run: RunDirectory) -> GivenRound:
        """The pool at ``path``, or in the run directory ``path``.

        Raises:
            ConfigError: it is the pool of ``run`` itself.
            FileNotFoundError, PoolError: there is none, or it is damaged.
            UnsafeFileError: it is the pool of a run, and a link out of it.
        """
        around = RunDirectory.around(path)
        place = around.own(around.pool) if around.is_run() else path
        if place.resolve() == run.pool.resolve():
            raise ConfigError(
                f"--from-pool {path} is the pool of the run itself: leave it out to resume the run, or choose another "
                "--run-dir"
            )
        with NativePool.open(place) as pool:
            first_round = FirstRound(pool=pool.settings.uuid, generation=pool.snapshot.generation)
        return cls(path=place, first_round=first_round)


def check_first_round(
    run: RunDirectory, recorded: FirstRound | None, given: GivenRound | None
) -> None:
    """Check that a run that is there goes on with the first round that it began with.

    Raises:
        ConfigError: it began with another one, or has to get the one that it began with.
    """
    has_samples = run.pool.exists()
    if given is None:
        if recorded is not None and not has_samples:
            raise ConfigError(
                f"the first round of {run.path} comes from a pool and was not copied yet: repeat the command with "
                "--from-pool"
            )
    elif has_samples and (recorded is None or recorded.pool != given.first_round.pool):
        began = "its own samples" if recorded is None else "another pool"
        raise ConfigError(
            f"{run.path} began with {began}: leave out --from-pool to resume it, or choose another --run-dir"
        )
