"""The pool argument of the commands."""

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
    typer.Argument(metavar="PATH", help="A pool, or its run directory.", show_default=False),
]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]


def pool_path(path: Path) -> Path:
    """The pool at ``path``, or in the run directory ``path``.

    Raises:
        UnsafeFileError: the pool of a run is a link out of the run.
    """
    from quark.run_directory import RunDirectory

    run = RunDirectory(path)
    if run.is_run():
        return run.own(run.pool)
    outer = RunDirectory(path.absolute().parent)
    return outer.own(path) if outer.is_run() else path


def place(path: Path) -> Path:
    """``path``, for something new. Raises FileNotFoundError if its folder does not exist."""
    if not path.absolute().parent.exists():
        raise FileNotFoundError(f"there is no directory {path.parent}")
    return path


@contextmanager
def opened(path: Path, snapshot: int | None = None) -> Iterator[NativePool]:
    """The pool at ``path`` (or in the run directory ``path``), read-only, at its newest or an older snapshot.

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
