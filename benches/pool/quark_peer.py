"""Ours, as a training loop uses it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Self

import numpy as np

from pool.data import (
    COMPLETION_WIDTH,
    NUM_QUANTILES,
    PROMPT_WIDTH,
    VOCABULARY,
    Rows,
    Workload,
)
from pool.peer import Batches, Peer, Work
from quark.pool.base import PromptColumns, SampleBatch
from quark.pool.batch import BatchBuffers
from quark.pool.native import NativePool

RAW_BYTES_BESIDE_TOKENS = 4 + 2 + 1 + 12 + 2 + 4 + 8 + 8 + 4
"""Prompt id, length, finish, round + chunk + step, reward token, settings, seed, log-probabilities, reward."""


class Quark(Peer[SampleBatch]):
    """The pool: atomic, synced, checksummed, with provenance; prompts once however many samples have them."""

    name = "quark"
    promise = "atomic, synced"
    largest = 1 << 60

    def __init__(self, folder: Path, workload: Workload, pool: NativePool) -> None:
        super().__init__(folder, workload)
        self.pool = pool

    @classmethod
    def create(cls, folder: Path, workload: Workload, capacity: int) -> Self:
        del capacity
        pool = NativePool.create(folder, vocab_size=VOCABULARY, store_text=False)
        peer = cls(folder, workload, pool)
        peer.prompts = PromptColumns(
            token_ids=np.concatenate(workload.prompts).astype(np.uint32),
            offsets=np.cumsum([0, *map(len, workload.prompts)]),
        )
        return peer

    @classmethod
    def open(cls, folder: Path, workload: Workload) -> Self:
        return cls(folder, workload, NativePool.open(folder))

    def encode(self, rows: Rows) -> SampleBatch:
        size = len(rows)
        offsets = np.zeros(size + 1, np.int64)
        np.cumsum(rows.lengths, out=offsets[1:])
        return SampleBatch(
            key=f"bench/{rows.number}",
            prompts=self.prompts,
            prompt_index=rows.prompt_index,
            completion_tokens=rows.tokens.astype(np.uint32),
            completion_offsets=offsets,
            completion_texts=None,
            finish_reasons=np.ones(size, np.uint8),
            round=rows.number,
            chunk=0,
            policy_step=rows.number,
            reward_tokens=np.full(size, -1, np.int16),
            settings="{}",
            seeds=np.zeros(size, np.uint64),
            scores={"reward": rows.rewards},
        )

    def append(self, encoded: SampleBatch) -> None:
        self.pool.append(encoded)

    def quantizers(self) -> Mapping[str, Work]:
        return {"": lambda: self.pool.quantize(NUM_QUANTILES)}

    def labellers(self) -> Mapping[str, Work]:
        return {"": lambda: self.pool.quantize(NUM_QUANTILES).labels()}

    def prepare(self) -> None:
        pass

    def batches(self, batch_size: int) -> Batches:
        quantization = self.pool.quantize(NUM_QUANTILES)
        sampler = quantization.sampler(batch_size=batch_size, seed=0)
        # Into memory that is there already, as the padded peer's `np.take(out=...)`.
        out = BatchBuffers.allocate(
            batch_size,
            prompt_tokens=batch_size * PROMPT_WIDTH,
            completion_tokens=batch_size * COMPLETION_WIDTH,
        )
        return lambda step: sampler.batch(step, pad_id=0, out=out)

    def close(self) -> None:
        self.pool.close()
        super().close()
