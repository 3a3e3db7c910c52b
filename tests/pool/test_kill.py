"""A writer killed at any moment loses nothing that it was promised; two writers never meet."""

from __future__ import annotations

import multiprocessing
import os
import random
import subprocess
import sys
import time
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest

from quark.errors import PoolLockedError
from quark.pool.memory import MemoryPool
from quark.pool.native import NativePool
from tests.pool.batches import (
    VOCAB_SIZE,
    assert_same_content,
    assert_same_cut,
    assert_same_draws,
    fields,
    make_batch,
)
from tests.pool.killable_writer import append_until_killed, numbered_batch

NUM_POOLS = 12
KILLS_PER_POOL = 18


@pytest.fixture(scope="module")
def processes() -> ForkServerContext:
    """Processes forked from a server without threads, so that hundreds of them are cheap."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.pool.killable_writer"])
    return context


def write_and_be_killed(
    processes: ForkServerContext, path: Path, number: int, *, after: int, wait_s: float
) -> list[int]:
    """The numbers that a writer was promised before it was killed.

    The kill comes ``wait_s`` after ``after`` acknowledgements.
    """
    receiving, sending = processes.Pipe(duplex=False)
    writer = processes.Process(target=append_until_killed, args=(path, number, sending))
    writer.start()
    sending.close()
    promised = [receiving.recv() for _ in range(after)]
    time.sleep(wait_s)
    writer.kill()
    promised += drain(receiving)
    writer.join()
    assert writer.exitcode == -9, "the writer died of something else"
    return promised


def drain(receiving: Connection) -> list[int]:
    received = []
    while True:
        try:
            received.append(receiving.recv())
        except EOFError:
            receiving.close()
            return received


def test_a_killed_writer_loses_no_acknowledged_sample(
    processes: ForkServerContext, tmp_path: Path
) -> None:
    chance = random.Random(20)
    kills = 0
    for life in range(NUM_POOLS):
        path = tmp_path / f"pool-{life}"
        model = MemoryPool(vocab_size=VOCAB_SIZE)
        history = life * 100_000
        for _ in range(KILLS_PER_POOL):
            promised = write_and_be_killed(
                processes,
                path,
                history + model.snapshot.generation,
                after=chance.choice([0, 0, 1, 2, 5]),
                wait_s=chance.uniform(0, 0.02),
            )
            kills += 1
            known = len(model)
            for number in promised:
                model.append(numbered_batch(number))
            if not path.exists() or NativePool.verify(path).generation is None:
                assert not promised
                continue
            with NativePool.open(path) as pool:
                # The append that was under way may have been committed, whole, or not at all.
                unacknowledged = pool.snapshot.generation - model.snapshot.generation
                assert unacknowledged in (0, 1)
                if unacknowledged:
                    model.append(numbered_batch(history + model.snapshot.generation))
                assert len(pool) == len(model)
                fresh = range(known, len(model))
                assert list(map(fields, pool.samples(fresh))) == list(
                    map(fields, model.samples(fresh))
                )
        with NativePool.open(path, writable=True) as pool:
            assert_same_content(pool, model)
            cut, expected = pool.quantize(5), model.quantize(5)
            assert_same_cut(cut, expected)
            assert_same_draws(
                cut.sampler(batch_size=32, seed=life),
                expected.sampler(batch_size=32, seed=life),
                [0, 1, 1000],
            )
        assert NativePool.verify(path).is_sound
    assert kills >= 200


def test_a_second_writer_is_refused_while_readers_are_not(tmp_path: Path) -> None:
    path = tmp_path / "pool"
    with NativePool.create(path, vocab_size=VOCAB_SIZE) as pool:
        pool.append(make_batch("a", {"reward": [1.0]}))
        with pytest.raises(PoolLockedError, match=str(os.getpid())):
            NativePool.open(path, writable=True)
        program = (
            "import sys; from quark.pool.native import NativePool\n"
            "from quark.errors import PoolLockedError\n"
            "assert len(NativePool.open(sys.argv[1])) == 1\n"
            "try: NativePool.open(sys.argv[1], writable=True)\n"
            "except PoolLockedError as error: print(error)\n"
        )
        other = subprocess.run(
            [sys.executable, "-c", program, path], capture_output=True, text=True, check=True
        )
        assert str(os.getpid()) in other.stdout
    with NativePool.open(path, writable=True) as again:
        assert len(again) == 1
