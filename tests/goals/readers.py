"""Readers beside a writer that appends, scores anew, compacts and collects: each snapshot that they see must be whole.

The writer's history is a pure function of the generation, so a reader knows every byte that it must find.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from quark.errors import PoolError, PoolSnapshotError
from quark.pool.memory import MemoryPool
from quark.pool.native import NativePool
from quark.selftest.samples import VOCAB_SIZE, fields, numbered_batch
from tests.goals.processes import start

PERIOD = 17
APPENDS = 12
"""A period: twelve appends, a draft of new scores in two parts, its publication, a step of a compaction, a collection."""
GENERATIONS_PER_POOL = 15 * PERIOD
"""Fewer appends than would let the pool merge prompt files by itself: that is a generation, too."""
KEPT = 4


@dataclass(slots=True, kw_only=True)
class Seen:
    """What readers saw."""

    num_generations: int = 0
    """Of the writer."""
    num_snapshots: int = 0
    """That were read and compared, by all readers."""
    num_distinct: int = 0
    """Times that a reader moved on to another one."""
    num_lost: int = 0
    """Times that a collection took a snapshot from a reader, which it says, and the next one was there."""
    problems: list[str] = field(default_factory=list)

    def add(self, other: Seen) -> None:
        self.num_snapshots += other.num_snapshots
        self.num_distinct += other.num_distinct
        self.num_lost += other.num_lost
        self.problems += other.problems


class History:
    """What the pool holds at every generation."""

    def __init__(self) -> None:
        self.model = MemoryPool(vocab_size=VOCAB_SIZE)
        self._ends = [0]

    def num_samples(self, num_batches: int) -> int:
        """Of the first so many batches."""
        while len(self._ends) <= num_batches:
            self.model.append(numbered_batch(len(self._ends) - 1))
            self._ends.append(len(self.model))
        return self._ends[num_batches]

    def at(self, generation: int) -> tuple[int, NDArray[np.float32]]:
        """Number of samples, and the scores ``judge``, f32 [N]."""
        cycle, position = divmod(generation, PERIOD)
        size = self.num_samples(cycle * APPENDS + min(position, APPENDS))
        version = cycle + (position >= APPENDS + 3)
        scores = self.model.scores("judge")[:size].copy() if size else np.empty(0, np.float32)
        replaced = self.num_samples(version * APPENDS)
        scores[:replaced] = scored_anew(version, 0, replaced)
        return size, scores


def scored_anew(version: int, first: int, end: int) -> NDArray[np.float32]:
    """Scores of version ``version`` of the samples ``first`` to ``end``, f32."""
    return ((np.arange(first, end) * 7 + version * 13) % 101).astype(np.float32)


def watch(folder: Path, *, num_readers: int, seconds: float) -> Seen:
    """Let readers follow writers, pool after pool, for so long."""
    deadline = time.monotonic() + seconds
    seen = Seen()
    number = 0
    while number == 0 or time.monotonic() < deadline:
        _watch_one(folder / f"pool-{number}", num_readers, deadline, seen)
        number += 1
    return seen


def _watch_one(path: Path, num_readers: int, deadline: float, seen: Seen) -> None:
    writer, from_writer = start(write, path, deadline)
    from_writer.recv()
    readers = [start(read, path, deadline, seed) for seed in range(num_readers)]
    try:
        for reader, from_reader in readers:
            try:
                seen.add(from_reader.recv())
            except EOFError:
                reader.join()
                seen.problems.append(f"a reader died with status {reader.exitcode}")
        written = from_writer.recv()
        if isinstance(written, str):
            seen.problems.append(written)
        else:
            seen.num_generations += written
    finally:
        for process, _ in [*readers, (writer, from_writer)]:
            process.kill()
            process.join()


def write(path: Path, deadline: float, sending: Connection) -> None:
    """Make the pool, say so, and write until it is full or time is up; then say how far it came."""
    history = History()
    with NativePool.create(path, vocab_size=VOCAB_SIZE) as pool:
        pool.append(numbered_batch(0))
        sending.send("made")
        try:
            while pool.snapshot.generation < GENERATIONS_PER_POOL and time.monotonic() < deadline:
                _write_next(pool, history)
        except PoolError as error:
            sending.send(f"the writer failed: {error}")
            return
        sending.send(pool.snapshot.generation)


def _write_next(pool: NativePool, history: History) -> None:
    cycle, position = divmod(pool.snapshot.generation, PERIOD)
    size = len(pool)
    if position < APPENDS:
        number = cycle * APPENDS + position
        pool.append(numbered_batch(number))
    elif position == APPENDS:
        pool.draft_scores("judge", 0, scored_anew(cycle + 1, 0, size // 2))
    elif position == APPENDS + 1:
        pool.draft_scores("judge", size // 2, scored_anew(cycle + 1, size // 2, size))
    elif position == APPENDS + 2:
        pool.publish_scores("judge")
    elif position == APPENDS + 3:
        # One step and so one commit: twelve small segments are always worth it.
        if not pool._pool.compact_once(1 << 20):
            raise PoolError("there was nothing to compact")
    else:
        pool.gc(keep_snapshots=KEPT)


def read(path: Path, deadline: float, seed: int, sending: Connection) -> None:
    """Follow the pool until it is full or time is up, and say what was seen."""
    history, chance, seen = History(), random.Random(seed), Seen()
    pool = NativePool.open(path)
    newest = -1
    while newest < GENERATIONS_PER_POOL and time.monotonic() < deadline and not seen.problems:
        try:
            generation = pool.refresh().generation
            if generation < newest:
                seen.problems.append(f"generation {generation} after {newest}")
            seen.num_distinct += generation > newest
            newest = generation
            for _ in range(2):
                seen.problems += _compare(pool, history, chance)
                seen.num_snapshots += 1
        except PoolSnapshotError as error:
            # A collection took a file that this handle had not opened yet: only with a later snapshot at hand.
            if pool.refresh().generation <= newest:
                seen.problems.append(f"generation {newest}: {error}")
            seen.num_lost += 1
        except PoolError as error:
            seen.problems.append(f"generation {newest}: {error}")
    sending.send(seen)


def _compare(pool: NativePool, history: History, chance: random.Random) -> list[str]:
    """What is wrong with the snapshot that a handle shows."""
    snapshot = pool.snapshot
    size, scores = history.at(snapshot.generation)
    if not snapshot.num_samples == len(pool) == size:
        return [f"generation {snapshot.generation} has {len(pool)} samples instead of {size}"]
    if pool.scores("judge").tobytes() != scores.tobytes():
        return [f"generation {snapshot.generation} has other scores"]
    ids = sorted(chance.sample(range(size), min(3, size)))
    problems = _compare_samples(pool, history, ids, scores)
    labels = pool.quantize(5).labels()
    if (labels < 0).sum() != np.isnan(history.model.scores("reward")[:size]).sum():
        problems.append(f"generation {snapshot.generation} ranks other samples")
    return problems


def _compare_samples(
    pool: NativePool, history: History, ids: Sequence[int], scores: NDArray[np.float32]
) -> list[str]:
    problems = []
    for ours, theirs in zip(history.model.samples(ids), pool.samples(ids), strict=True):
        expected, found = fields(ours), fields(theirs)
        expected["scores"] = {
            "reward": repr(float(ours.scores["reward"])),
            "judge": repr(float(scores[ours.id])),
        }
        if expected != found:
            problems.append(f"sample {ours.id} is not what was appended")
    return problems
