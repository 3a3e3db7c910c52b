"""Which segment files a snapshot consists of, read from the manifest.

The extension serves samples; where their files lie and under which key they came only the manifest says.
Every record is checked against its SHA-256 and the chain must end in the snapshot's own hash, so what
this room returns is what the extension shows. Layout: FORMAT.md, "Manifest".
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quark.errors import PoolCorruptedError, PoolVersionError
from quark.pool.base import Snapshot

_HEADER = struct.Struct("<8sIIQ32s32s8s")
"""Magic, kind, payload length, generation, digest before, own digest, sum."""
_DIGESTED_BYTES = 56
"""The part of a header that its digest covers, with the payload."""
_MAGIC = b"\xffQRKMAN\xfe"
_STATE, _COMMIT, _SCORES, _UPKEEP = 1, 2, 3, 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """The file of one append: row r is the sample ``first + r``."""

    file: Path
    key: str
    """Idempotency key of the append."""
    first: int
    count: int
    round: int
    chunk: int


def segments_of(path: Path, snapshot: Snapshot) -> list[Segment]:
    """The segments of a snapshot, by first id.

    Raises:
        PoolCorruptedError: The manifest no longer holds the snapshot.
        PoolVersionError: The manifest says things that only a newer quark understands.
    """
    logs = {int(log.stem): log for log in path.glob("manifest/*.log") if log.stem.isdigit()}
    # A log that a crash left behind may begin at the snapshot without holding it: older ones do then.
    for first in sorted((first for first in logs if first <= snapshot.generation), reverse=True):
        entries: list[dict[str, Any]] = []
        for kind, digest, payload in _records(logs[first].read_bytes(), snapshot.generation):
            if kind not in (_STATE, _COMMIT, _SCORES, _UPKEEP):
                raise PoolVersionError(f"{logs[first]} has records of the unknown kind {kind}")
            if kind == _STATE:
                entries = list(payload["segments"])
            elif kind == _COMMIT:
                entries.append(payload["segment"])
            if digest == snapshot.hash:
                return [_segment(path, entry) for entry in entries]
    raise PoolCorruptedError(f"{path / 'manifest'} does not hold snapshot {snapshot.generation}")


def _records(log: bytes, newest: int) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """Kind, digest of the commit and payload of the records up to a generation, while they are a chain."""
    offset, before = 0, b""
    while offset + _HEADER.size <= len(log):
        magic, kind, length, generation, previous, digest, _ = _HEADER.unpack_from(log, offset)
        body = offset + _HEADER.size
        payload = log[body : body + length]
        found = hashlib.sha256(log[offset : offset + _DIGESTED_BYTES] + payload).digest()
        if (
            magic != _MAGIC
            or found != digest
            or generation > newest
            or before not in (b"", previous)
        ):
            return
        # A state repeats the commit before it; the one of the empty pool has none.
        of_commit = previous if kind == _STATE and generation > 0 else digest
        yield kind, of_commit.hex(), json.loads(payload)
        offset, before = body + length, digest


def _segment(path: Path, entry: dict[str, Any]) -> Segment:
    return Segment(
        file=path / entry["file"]["name"],
        key=entry["key"],
        first=entry["first"],
        count=entry["count"],
        round=entry["round"],
        chunk=entry["chunk"],
    )
