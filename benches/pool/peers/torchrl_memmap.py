"""torchrl: a replay buffer over memory-mapped int32 tensors of fixed capacity."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Self

import tensordict
import torch
from torchrl.data import LazyMemmapStorage, ReplayBuffer

from pool.data import NUM_QUANTILES, PROMPT_WIDTH, Rows, Workload
from pool.peer import Batches, Peer, Strata, Work, files_of, keep_order, kept_order, sync

logging.getLogger("torchrl").setLevel(logging.WARNING)


class TorchrlMemmap(Peer[tensordict.TensorDict]):
    """Padded rows in place; it does not sync, so we do."""

    name = "torchrl"
    promise = "synced by us, not atomic"

    def __init__(self, folder: Path, workload: Workload, buffer: ReplayBuffer) -> None:
        super().__init__(folder, workload)
        self.buffer = buffer

    @classmethod
    def create(cls, folder: Path, workload: Workload, capacity: int) -> Self:
        folder.mkdir(parents=True)
        (folder / "capacity.json").write_text(json.dumps(capacity), encoding="utf-8")
        return cls(folder, workload, _buffer(folder, capacity))

    @classmethod
    def open(cls, folder: Path, workload: Workload) -> Self:
        capacity = json.loads((folder / "capacity.json").read_text(encoding="utf-8"))
        buffer = _buffer(folder, capacity)
        buffer.loads(folder / "buffer")
        return cls(folder, workload, buffer)

    def encode(self, rows: Rows) -> tensordict.TensorDict:
        matrix = torch.from_numpy(rows.matrix().astype("int32"))
        constant = torch.full((len(rows),), rows.number, dtype=torch.int32)
        return tensordict.TensorDict(
            {
                "prompt": matrix[:, :PROMPT_WIDTH].contiguous(),
                "response": matrix[:, PROMPT_WIDTH:].contiguous(),
                "reward": torch.from_numpy(rows.rewards),
                "prompt_index": torch.from_numpy(rows.prompt_index.astype("int32")),
                "round": constant,
                "policy_step": constant,
            },
            batch_size=[len(rows)],
        )

    def append(self, encoded: tensordict.TensorDict) -> None:
        self.buffer.extend(encoded)
        self.buffer.dumps(self.folder / "buffer")
        sync(files_of(self.folder / "buffer"))

    def _rewards(self) -> torch.Tensor:
        storage = self.buffer.storage
        return storage._storage["reward"][: len(storage)]

    def _boundaries(self) -> torch.Tensor:
        ordered = self._rewards().sort().values
        return ordered[torch.arange(1, NUM_QUANTILES) * len(ordered) // NUM_QUANTILES]

    def quantizers(self) -> Mapping[str, Work]:
        return {"": self._boundaries}

    def labellers(self) -> Mapping[str, Work]:
        return {"": lambda: torch.bucketize(self._rewards(), self._boundaries(), right=True)}

    def prepare(self) -> None:
        keep_order(self.folder, self._rewards().numpy())

    def batches(self, batch_size: int) -> Batches:
        strata = Strata(kept_order(self.folder), batch_size)
        storage = self.buffer.storage

        def batch(step: int) -> object:
            del step
            taken = storage.get(torch.from_numpy(strata.draw()))
            return taken["prompt"].long(), taken["response"].long(), strata.labels

        return batch


def _buffer(folder: Path, capacity: int) -> ReplayBuffer:
    storage = LazyMemmapStorage(capacity, scratch_dir=folder / "buffer" / "storage")
    return ReplayBuffer(storage=storage, batch_size=128)
