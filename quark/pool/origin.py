"""The snapshot that a read comes from, to distinguish damage from files that a collection removed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from quark import _pool_rs
from quark.errors import PoolCorruptedError, PoolError, PoolSnapshotError

_Given = ParamSpec("_Given")
_Read = TypeVar("_Read")


@dataclass(frozen=True, slots=True)
class Origin:
    """A snapshot of the pool at a path."""

    path: Path
    generation: int

    def check(self) -> None:
        """Raise PoolSnapshotError if a collection has expired the snapshot."""
        try:
            newest = _pool_rs.Pool.open(self.path, holder=None, snapshot=None)
        except (PoolError, OSError):
            return
        oldest = newest.oldest_generation
        newest.close()
        if self.generation < oldest:
            raise PoolSnapshotError(
                f"snapshot {self.generation} of {self.path} was given up by a collection, which left those from "
                f"{oldest} on: refresh() the pool or open it anew"
            )


class _Reader(Protocol):
    @property
    def _origin(self) -> Origin: ...


_AnyReader = TypeVar("_AnyReader", bound=_Reader)


def reads(
    read: Callable[Concatenate[_AnyReader, _Given], _Read],
) -> Callable[Concatenate[_AnyReader, _Given], _Read]:
    """Decorate a read: raise PoolSnapshotError if the missing files were collected, not damaged."""

    @functools.wraps(read)
    def checked(self: _AnyReader, /, *args: _Given.args, **kwargs: _Given.kwargs) -> _Read:
        try:
            return read(self, *args, **kwargs)
        except PoolCorruptedError:
            self._origin.check()
            raise

    return checked
