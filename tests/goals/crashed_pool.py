"""Opening a large pool after its writer was killed: how long that takes."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from quark.pool.base import PromptRecord, SampleBatch
from quark.pool.native import NativePool
from quark.selftest.samples import VOCAB_SIZE
from tests.goals.dead_writers import hold
from tests.goals.processes import start

_ROWS_PER_APPEND = 10_000


@dataclass(slots=True, kw_only=True)
class Opened:
    """Seconds from the call to the first sample."""

    num_samples: int
    reader_s: float
    writer_s: float


def open_after_crash(folder: Path, *, num_samples: int) -> Opened:
    """Fill a pool, kill a writer in the middle of an append, and open it."""
    path = folder / "pool"
    rng = np.random.default_rng(0)
    with NativePool.create(path, vocab_size=VOCAB_SIZE) as pool:
        for first in range(0, num_samples, _ROWS_PER_APPEND):
            pool.append(_batch(f"fill/{first}", min(_ROWS_PER_APPEND, num_samples - first), rng))
    writer, said = start(hold, path, 0)
    said.recv()
    time.sleep(0.05)
    writer.kill()
    writer.join()
    begin = time.perf_counter()
    pool = NativePool.open(path)
    pool.samples([len(pool) - 1])
    reader_s = time.perf_counter() - begin
    begin = time.perf_counter()
    with NativePool.open(path, writable=True) as pool:
        pool.samples([0])
        return Opened(
            num_samples=len(pool), reader_s=reader_s, writer_s=time.perf_counter() - begin
        )


def _batch(key: str, size: int, rng: np.random.Generator) -> SampleBatch:
    length = 16
    prompt = PromptRecord(token_ids=np.arange(8, dtype=np.uint32), text="a prompt", metadata="{}")
    return SampleBatch(
        key=key,
        prompts=[prompt],
        prompt_index=np.zeros(size, np.uint32),
        completion_tokens=rng.integers(0, VOCAB_SIZE, size * length, dtype=np.uint32),
        completion_offsets=np.arange(size + 1, dtype=np.int64) * length,
        completion_texts=["a completion of some words"] * size,
        finish_reasons=np.ones(size, np.uint8),
        round=0,
        chunk=0,
        policy_step=0,
        reward_tokens=np.full(size, -1, np.int16),
        settings="{}",
        seeds=np.arange(size, dtype=np.uint64),
        logprob_policy=np.zeros(size, np.float32),
        logprob_reference=np.zeros(size, np.float32),
        logprob_sampled=np.zeros(size, np.float32),
        scores={"reward": rng.normal(size=size).astype(np.float32)},
    )
