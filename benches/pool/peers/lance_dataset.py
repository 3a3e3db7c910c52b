"""Lance: one fragment per round; it does not sync on local disks, so we do."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Self

import lance
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pool import arrow
from pool.data import Rows, Workload
from pool.peer import (
    Batches,
    Peer,
    Strata,
    Work,
    boundaries,
    files_of,
    keep_order,
    kept_order,
    labels_by_boundaries,
    sync,
)


class LanceDataset(Peer[pa.Table]):
    """Columns in fragments, rows by position."""

    name = "lance"
    promise = "atomic, synced by us"
    largest = 1_000_000

    def __init__(self, folder: Path, workload: Workload) -> None:
        super().__init__(folder, workload)
        self.path = folder / "samples.lance"
        self.synced: set[Path] = set()

    @classmethod
    def open(cls, folder: Path, workload: Workload) -> Self:
        peer = cls(folder, workload)
        peer.dataset = lance.dataset(str(peer.path))
        return peer

    def encode(self, rows: Rows) -> pa.Table:
        return arrow.table(rows)

    def append(self, encoded: pa.Table) -> None:
        mode = "append" if self.path.exists() else "create"
        self.dataset = lance.write_dataset(encoded, str(self.path), mode=mode)
        new = set(files_of(self.path)) - self.synced
        sync([*new, *{path.parent for path in new}])
        self.synced |= new

    def _rewards(self) -> NDArray[np.float32]:
        return self.dataset.to_table(columns=["reward"]).column("reward").to_numpy()

    def quantizers(self) -> Mapping[str, Work]:
        return {"": lambda: boundaries(self._rewards())}

    def labellers(self) -> Mapping[str, Work]:
        return {"": lambda: labels_by_boundaries(self._rewards())}

    def prepare(self) -> None:
        keep_order(self.folder, self._rewards())

    def batches(self, batch_size: int) -> Batches:
        strata = Strata(kept_order(self.folder), batch_size)

        def batch(step: int) -> object:
            del step
            taken = self.dataset.take(strata.draw(), columns=["prompt", "response"])
            return *arrow.padded_batch(taken), strata.labels

        return batch
