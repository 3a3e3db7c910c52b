"""LMDB: one value per sample, one transaction per round, readahead off."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Self

import lmdb
import numpy as np
from numpy.typing import NDArray

from pool.data import COMPLETION_WIDTH, PROMPT_WIDTH, Rows, Workload, left_mask, right_mask
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

_KEY = struct.Struct(">Q").pack
_HEADER = np.dtype(
    [(name, "<u4") for name in ("prompt_index", "round", "policy_step")] + [("lengths", "<u1", 2)]
)


class LmdbEnvironment(Peer[Rows]):
    """Samples in the main database; the rewards of a round also as one value, for the ranking.

    The interface takes Python rows.
    """

    name = "lmdb"
    promise = "atomic, synced"

    def __init__(self, folder: Path, workload: Workload, environment: lmdb.Environment) -> None:
        super().__init__(folder, workload)
        self.environment = environment
        self.rewards = environment.open_db(b"rewards")
        self.samples = environment.open_db(b"samples")

    @classmethod
    def create(cls, folder: Path, workload: Workload, capacity: int) -> Self:
        folder.mkdir(parents=True)
        size = 400 * capacity + (64 << 20)
        path = str(folder / "environment")
        environment = lmdb.open(path, map_size=size, max_dbs=2, readahead=False)
        peer = cls(folder, workload, environment)
        peer.count = 0
        return peer

    @classmethod
    def open(cls, folder: Path, workload: Workload) -> Self:
        path = str(folder / "environment")
        return cls(
            folder, workload, lmdb.open(path, readonly=True, max_dbs=2, readahead=False, lock=False)
        )

    def encode(self, rows: Rows) -> Rows:
        return rows

    def append(self, encoded: Rows) -> None:
        rows = encoded
        header = np.zeros(len(rows), _HEADER)
        header["prompt_index"] = rows.prompt_index
        header["round"] = header["policy_step"] = rows.number
        header["lengths"][:, 0], header["lengths"][:, 1] = rows.prompt_lengths, rows.lengths
        words = header.view(np.uint16).reshape(len(rows), -1)
        every = np.concatenate([words, rows.matrix()], axis=1)
        used = np.concatenate(
            [np.ones(words.shape, bool), left_mask(rows.prompt_lengths), right_mask(rows.lengths)],
            axis=1,
        )
        values = every[used].tobytes()
        ends = itertools.accumulate((2 * used.sum(1)).tolist(), initial=0)
        keys = map(_KEY, range(self.count, self.count + len(rows)))
        cuts = (values[a:b] for a, b in itertools.pairwise(ends))
        with self.environment.begin(write=True) as transaction:
            transaction.put(_KEY(rows.number), rows.rewards.tobytes(), db=self.rewards)
            with transaction.cursor(self.samples) as cursor:
                cursor.putmulti(zip(keys, cuts, strict=True), append=True)
        self.count += len(rows)

    def _rewards(self) -> NDArray[np.float32]:
        with self.environment.begin() as transaction, transaction.cursor(self.rewards) as cursor:
            return np.frombuffer(b"".join(value for _, value in cursor), np.float32)

    def quantizers(self) -> Mapping[str, Work]:
        return {"": lambda: boundaries(self._rewards())}

    def labellers(self) -> Mapping[str, Work]:
        return {"": lambda: labels_by_boundaries(self._rewards())}

    def prepare(self) -> None:
        keep_order(self.folder, self._rewards())

    def batches(self, batch_size: int) -> Batches:
        strata = Strata(kept_order(self.folder), batch_size)
        head = _HEADER.itemsize

        def batch(step: int) -> object:
            del step
            ids = strata.draw()
            prompts = np.zeros((batch_size, PROMPT_WIDTH), np.int64)
            rows = np.zeros((batch_size, COMPLETION_WIDTH), np.int64)
            with self.environment.begin(db=self.samples, buffers=True) as transaction:
                for row, id in enumerate(ids.tolist()):
                    value = transaction.get(_KEY(id))
                    length = value[head - 2]
                    tokens = np.frombuffer(value, np.uint16, offset=head)
                    prompts[row, PROMPT_WIDTH - length :] = tokens[:length]
                    rows[row, : len(tokens) - length] = tokens[length:]
            return prompts, rows, strata.labels

        return batch

    def close(self) -> None:
        self.environment.close()
        super().close()
