"""SQLite with a write-ahead log and full synchronisation; token ids as blobs."""

from __future__ import annotations

import itertools
import sqlite3
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from pool.data import Rows, Workload, left_mask, padded, right_mask
from pool.peer import (
    Batches,
    Peer,
    Strata,
    Work,
    boundaries,
    keep_order,
    kept_order,
    labels_by_boundaries,
)


class SqliteTable(Peer[Rows]):
    """Rows by integer key; a round is one transaction. The interface takes Python rows."""

    name = "sqlite"
    promise = "atomic, synced"
    largest = 1_000_000

    def __init__(self, folder: Path, workload: Workload, connection: sqlite3.Connection) -> None:
        super().__init__(folder, workload)
        self.connection = connection

    @classmethod
    def create(cls, folder: Path, workload: Workload, capacity: int) -> Self:
        del capacity
        folder.mkdir(parents=True)
        peer = cls.open(folder, workload)
        peer.connection.execute(
            "CREATE TABLE samples (id INTEGER PRIMARY KEY, prompt BLOB, response BLOB, reward REAL,"
            " prompt_index INTEGER, round INTEGER, policy_step INTEGER)"
        )
        return peer

    @classmethod
    def open(cls, folder: Path, workload: Workload) -> Self:
        connection = sqlite3.connect(folder / "samples.db", isolation_level=None)
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        return cls(folder, workload, connection)

    def encode(self, rows: Rows) -> Rows:
        return rows

    def append(self, encoded: Rows) -> None:
        rows = encoded
        self.connection.execute("BEGIN")
        self.connection.executemany(
            "INSERT INTO samples (prompt, response, reward, prompt_index, round, policy_step)"
            " VALUES (?, ?, ?, ?, ?, ?)",
            zip(
                _blobs(rows.prompt_tokens, rows.prompt_lengths),
                _blobs(rows.tokens, rows.lengths),
                rows.rewards.tolist(),
                rows.prompt_index.tolist(),
                itertools.repeat(rows.number),
                itertools.repeat(rows.number),
                strict=False,
            ),
        )
        self.connection.execute("COMMIT")

    def _rewards(self) -> NDArray[np.float32]:
        rows = self.connection.execute("SELECT reward FROM samples ORDER BY id")
        return np.fromiter((reward for (reward,) in rows), np.float32)

    def quantizers(self) -> Mapping[str, Work]:
        return {"": lambda: boundaries(self._rewards())}

    def labellers(self) -> Mapping[str, Work]:
        return {"": lambda: labels_by_boundaries(self._rewards())}

    def prepare(self) -> None:
        self.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        keep_order(self.folder, self._rewards())

    def batches(self, batch_size: int) -> Batches:
        strata = Strata(kept_order(self.folder), batch_size)

        def batch(step: int) -> object:
            del step
            ids = strata.draw()
            places = ", ".join(map(str, (ids + 1).tolist()))
            taken = self.connection.execute(
                f"SELECT id, prompt, response FROM samples WHERE id IN ({places})"
            ).fetchall()
            keys, prompts, responses = zip(*taken, strict=True)
            order = np.argsort(ids)
            found = np.searchsorted(ids[order], np.array(keys) - 1)
            return (
                _padded(prompts, left_mask),
                _padded(responses, right_mask),
                strata.labels[order[found]],
            )

        return batch

    def close(self) -> None:
        self.connection.close()
        super().close()


def _blobs(tokens: NDArray[np.uint16], lengths: NDArray[np.int64]) -> Iterator[bytes]:
    whole = tokens.tobytes()
    ends = itertools.accumulate((2 * lengths).tolist(), initial=0)
    return (whole[a:b] for a, b in itertools.pairwise(ends))


def _padded(blobs: tuple[bytes, ...], mask_of: object) -> NDArray[np.int64]:
    lengths = np.array([len(blob) // 2 for blob in blobs])
    return padded(np.frombuffer(b"".join(blobs), np.uint16), mask_of(lengths))  # type: ignore[operator]
