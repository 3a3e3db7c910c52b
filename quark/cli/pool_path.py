"""Which pool a command is about."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from quark.pool.native import NativePool

PoolPath = Annotated[
    Path,
    typer.Argument(
        metavar="PATH", help="A pool, or the run directory it is in.", show_default=False
    ),
]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]


def pool_path(path: Path) -> Path:
    """The pool at ``path``, or in the run directory that ``path`` is.

    Raises:
        UnsafeFileError: it is the pool of a run, and a link out of the run.
    """
    from quark.run_directory import RunDirectory

    run = RunDirectory(path)
    if run.is_run():
        return run.own(run.pool)
    outer = RunDirectory(path.absolute().parent)
    return outer.own(path) if outer.is_run() else path


def place(path: Path) -> Path:
    """``path``, where something new is to be. Raises FileNotFoundError where there is no folder for it."""
    if not path.absolute().parent.exists():
        raise FileNotFoundError(f"there is no directory {path.parent}")
    return path


@contextmanager
def opened(path: Path, snapshot: int | None = None) -> Iterator[NativePool]:
    """The pool at ``path`` (or in the run directory ``path``), read-only, as it is or as it was.

    Raises:
        ConfigError: the pool has no such snapshot.
    """
    from quark.errors import ConfigError
    from quark.pool.native import NativePool

    try:
        pool = NativePool.open(pool_path(path), snapshot=snapshot)
    except ValueError as error:
        raise ConfigError(f"--snapshot {snapshot}: {error}") from error
    try:
        yield pool
    finally:
        pool.close()
