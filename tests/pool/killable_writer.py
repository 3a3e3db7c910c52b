"""A process that appends until it is killed, and says what it has been promised."""

from __future__ import annotations

from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from quark.pool.base import SampleBatch
from quark.pool.native import NativePool
from tests.pool.batches import VOCAB_SIZE, make_batch


def numbered_batch(number: int) -> SampleBatch:
    """Batch ``number`` of a history that anyone can repeat."""
    rng = np.random.default_rng(number)
    rewards = rng.normal(size=rng.integers(1, 60)).round(1)
    rewards[rng.random(len(rewards)) < 0.1] = np.nan
    scores = {"reward": rewards.tolist(), "judge": rewards[::-1].tolist()}
    return make_batch(f"history/{number}", scores, content=number)


def append_until_killed(path: Path, number: int, acknowledged: Connection) -> None:
    """Make or open the pool, append from batch ``number`` on, send each number after its append."""
    if path.exists() and NativePool.verify(path).generation is not None:
        pool = NativePool.open(path, writable=True)
    else:
        pool = NativePool.create(path, vocab_size=VOCAB_SIZE)
    while True:
        pool.append(numbered_batch(number))
        acknowledged.send(number)
        number += 1
