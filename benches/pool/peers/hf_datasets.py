"""Hugging Face datasets: one saved dataset per round, concatenated; it does not sync, so we do."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Self

import datasets
import numpy as np
from datasets import Dataset, concatenate_datasets, load_from_disk
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

datasets.disable_progress_bars()


class HfDatasets(Peer[tuple[Path, Dataset]]):
    """Memory-mapped Arrow tables in arrow format."""

    name = "datasets"
    promise = "synced by us, not atomic"
    largest = 1_000_000

    def __init__(self, folder: Path, workload: Workload) -> None:
        super().__init__(folder, workload)
        self.parts: list[Dataset] = []

    @classmethod
    def open(cls, folder: Path, workload: Workload) -> Self:
        peer = cls(folder, workload)
        paths = sorted(path for path in folder.iterdir() if path.is_dir())
        peer.parts = [load_from_disk(str(path)) for path in paths]
        peer.whole = concatenate_datasets(peer.parts)
        return peer

    def encode(self, rows: Rows) -> tuple[Path, Dataset]:
        return self.folder / f"{rows.number:08d}", Dataset(arrow.table(rows))

    def append(self, encoded: tuple[Path, Dataset]) -> None:
        path, dataset = encoded
        dataset.save_to_disk(str(path))
        sync([*files_of(path), path, self.folder])
        self.parts.append(load_from_disk(str(path)))
        self.whole = concatenate_datasets(self.parts)

    def _rewards(self) -> NDArray[np.float32]:
        return self.whole.data.column("reward").to_numpy()

    def quantizers(self) -> Mapping[str, Work]:
        return {"": lambda: boundaries(self._rewards())}

    def labellers(self) -> Mapping[str, Work]:
        return {"": lambda: labels_by_boundaries(self._rewards())}

    def prepare(self) -> None:
        keep_order(self.folder, self._rewards())

    def batches(self, batch_size: int) -> Batches:
        strata = Strata(kept_order(self.folder), batch_size)
        whole = self.whole.select_columns(["prompt", "response"]).with_format("arrow")

        def batch(step: int) -> object:
            del step
            return *arrow.padded_batch(whole[strata.draw()]), strata.labels

        return batch
