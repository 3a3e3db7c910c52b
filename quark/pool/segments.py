"""Which files the samples of a snapshot lie in, append by append."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


class Appended(Protocol):
    """The part of a pool on disk that says where its appends lie."""

    @property
    def path(self) -> Path: ...
    def appends(self) -> list[tuple[str, int, str, int, int, int, int]]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """The samples of one append, and where they lie: row ``offset`` of the file is the sample ``first``."""

    file: Path
    offset: int
    """0 unless the file was made of several."""
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
            file=pool.path / file,
            offset=first - begin,
            key=key,
            first=first,
            count=count,
            round=round_,
            chunk=chunk,
        )
        for file, begin, key, first, count, round_, chunk in pool.appends()
    ]
