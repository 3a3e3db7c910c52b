"""A writer killed at any moment loses nothing that it was promised; two writers never meet."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from quark.errors import PoolLockedError
from quark.pool.native import NativePool
from quark.selftest.writers import KilledWriter
from tests.pool.batches import (
    VOCAB_SIZE,
    assert_same_content,
    assert_same_cut,
    assert_same_draws,
    make_batch,
)

NUM_POOLS = 12
KILLS_PER_POOL = 18


def test_a_killed_writer_loses_no_acknowledged_sample(tmp_path: Path) -> None:
    chance = random.Random(20)
    num_acknowledged = 0
    for life in range(NUM_POOLS):
        writer = KilledWriter(tmp_path / f"pool-{life}", first=life * 100_000)
        for _ in range(KILLS_PER_POOL):
            trial = writer.kill_once(
                after=chance.choice([0, 0, 1, 2, 5]), wait_s=chance.uniform(0, 0.02)
            )
            assert trial.problems == ()
            num_acknowledged += trial.num_acknowledged
        with NativePool.open(writer.path, writable=True) as pool:
            assert_same_content(pool, writer.model)
            cut, expected = pool.quantize(5), writer.model.quantize(5)
            assert_same_cut(cut, expected)
            assert_same_draws(
                cut.sampler(batch_size=32, seed=life),
                expected.sampler(batch_size=32, seed=life),
                [0, 1, 1000],
            )
        assert NativePool.verify(writer.path).is_sound
    assert num_acknowledged > NUM_POOLS * KILLS_PER_POOL


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
