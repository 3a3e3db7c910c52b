"""Thirty lines of NumPy: ten raw files, each appended to and synced; ragged gather from maps.

Durable, but not atomic across its files, and without a manifest: the peer to beat all the same.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from pool.data import COMPLETION_WIDTH, PROMPT_WIDTH, Rows, Workload, left_mask, padded, right_mask
from pool.peer import (
    Batches,
    Peer,
    Strata,
    Work,
    boundaries,
    keep_order,
    kept_order,
    labels_by_argsort,
    labels_by_boundaries,
    sync,
)


class RawFiles(Peer[dict[str, NDArray[np.generic]]]):
    """Columns as raw files of fixed-width numbers."""

    promise = "synced, not atomic"
    largest = 1 << 60
    columns: ClassVar[Mapping[str, type[np.generic]]]

    def __init__(self, folder: Path, workload: Workload) -> None:
        super().__init__(folder, workload)
        self.ends: dict[str, int] = {}

    def append(self, encoded: dict[str, NDArray[np.generic]]) -> None:
        for name, values in encoded.items():
            with (self.folder / name).open("ab") as file:
                file.write(memoryview(values).cast("B"))
            sync([self.folder / name])

    def map(self, name: str) -> NDArray[np.generic]:
        return np.memmap(self.folder / name, self.columns[name], "r")

    def quantizers(self) -> Mapping[str, Work]:
        return {"": lambda: boundaries(self.map("rewards"))}

    def labellers(self) -> Mapping[str, Work]:
        return {"": lambda: labels_by_boundaries(self.map("rewards"))}

    def prepare(self) -> None:
        keep_order(self.folder, self.map("rewards"))


class NumpyRagged(RawFiles):
    """Tokens one after another, with u64 offsets."""

    name = "numpy"
    columns: ClassVar = {
        "prompt_tokens": np.uint16,
        "prompt_ends": np.uint64,
        "prompt_lengths": np.uint8,
        "tokens": np.uint16,
        "ends": np.uint64,
        "lengths": np.uint8,
        "rewards": np.float32,
        "prompt_index": np.uint32,
        "round": np.uint32,
        "policy_step": np.uint32,
    }

    def encode(self, rows: Rows) -> dict[str, NDArray[np.generic]]:
        constant = np.full(len(rows), rows.number, np.uint32)
        return {
            "prompt_tokens": rows.prompt_tokens,
            "prompt_ends": self._ends("prompt_ends", rows.prompt_lengths),
            "prompt_lengths": rows.prompt_lengths.astype(np.uint8),
            "tokens": rows.tokens,
            "ends": self._ends("ends", rows.lengths),
            "lengths": rows.lengths.astype(np.uint8),
            "rewards": rows.rewards,
            "prompt_index": rows.prompt_index,
            "round": constant,
            "policy_step": constant,
        }

    def _ends(self, name: str, lengths: NDArray[np.int64]) -> NDArray[np.uint64]:
        ends = np.cumsum(lengths).astype(np.uint64) + np.uint64(self.ends.get(name, 0))
        self.ends[name] = int(ends[-1])
        return ends

    def quantizers(self) -> Mapping[str, Work]:
        return {
            **super().quantizers(),
            "argsort": lambda: np.argsort(self.map("rewards")),
        }

    def labellers(self) -> Mapping[str, Work]:
        return {
            **super().labellers(),
            "argsort": lambda: labels_by_argsort(self.map("rewards")),
        }

    def batches(self, batch_size: int) -> Batches:
        strata = Strata(kept_order(self.folder), batch_size)
        prompt_tokens, prompt_ends = self.map("prompt_tokens"), self.map("prompt_ends")
        prompt_lengths = self.map("prompt_lengths")
        tokens, ends, lengths = self.map("tokens"), self.map("ends"), self.map("lengths")

        def batch(step: int) -> object:
            del step
            ids = strata.draw()
            mask = left_mask(prompt_lengths[ids])
            places = prompt_ends[ids].astype(np.int64)[:, None] + np.arange(-PROMPT_WIDTH, 0)
            prompts = padded(prompt_tokens[places[mask]], mask)
            counts = lengths[ids].astype(np.int64)
            mask = right_mask(counts)
            begins = ends[ids].astype(np.int64) - counts
            places = begins[:, None] + np.arange(COMPLETION_WIDTH)
            return prompts, padded(tokens[places[mask]], mask), strata.labels

        return batch


class NumpyMadvise(NumpyRagged):
    """The same files, mapped with the advice that reads will be random: its best cold start."""

    name = "numpy-madvise"

    def map(self, name: str) -> NDArray[np.generic]:
        with (self.folder / name).open("rb") as file:
            region = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        region.madvise(mmap.MADV_RANDOM)
        return np.frombuffer(region, self.columns[name])
