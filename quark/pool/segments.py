"""The files with the samples of a snapshot, append by append."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from quark._pool_rs import Append


class Appended(Protocol):
    """The part of a pool on disk that lists its appends and their files."""

    @property
    def path(self) -> Path:
        """The pool's directory, which contains the segment files."""
        ...

    def appends(self) -> list[Append]:
        """The appends of the snapshot, by first id."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """The samples of one append and their file. Row ``offset`` of the file is the sample ``first``."""

    file: Path
    offset: int
    """0 unless the file was merged from several."""
    key: str
    """Idempotency key of the append."""
    first: int
    count: int
    round: int
    chunk: int


def segments_of(pool: Appended) -> list[Segment]:
    """The appends of ``pool.snapshot``, by first id."""
    return [
        Segment(
            file=pool.path / append.file,
            offset=append.first - append.file_first,
            key=append.key,
            first=append.first,
            count=append.num_samples,
            round=append.round,
            chunk=append.chunk,
        )
        for append in pool.appends()
    ]
