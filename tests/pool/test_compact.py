"""A compacted pool is the pool it was, in fewer files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from quark.pool.base import SampleBatch
from quark.pool.memory import MemoryPool
from quark.pool.native import NativePool
from quark.pool.scope import Scope
from tests.cli.commands import quark
from tests.pool.batches import assert_same_content, assert_same_draws, filled_alike, make_batch

NAN = float("nan")


def batch(number: int) -> SampleBatch:
    rewards = [NAN if (number + row) % 5 == 0 else float(number * row % 4) for row in range(7)]
    return make_batch(f"run/{number}", {"reward": rewards}, content=number)


def filled(path: Path, appends: int = 12) -> tuple[NativePool, MemoryPool]:
    return filled_alike(path, map(batch, range(appends)))


def assert_same(pool: NativePool, spec: MemoryPool) -> None:
    """Samples, labels and draws."""
    assert_same_content(pool, spec)
    for scope in (None, Scope(last_rounds=2)):
        ours, theirs = pool.quantize(3, scope=scope), spec.quantize(3, scope=scope)
        np.testing.assert_array_equal(ours.labels(), theirs.labels())
        samplers = (q.sampler(batch_size=6, seed=1) for q in (ours, theirs))
        assert_same_draws(*samplers, steps=range(3))


def test_nothing_that_is_read_changes(tmp_path: Path) -> None:
    pool, spec = filled(tmp_path / "pool")
    reader = NativePool.open(tmp_path / "pool")
    compacted = pool.compact()
    assert (compacted.num_segments_before, compacted.num_segments) == (12, 1)
    assert pool.compact().num_commits == 0
    for handle in (pool, reader, NativePool.open(tmp_path / "pool", snapshot=12)):
        assert_same(handle, spec)
    reader.refresh()
    assert reader.snapshot == pool.snapshot
    assert_same(reader, spec)

    for number in (3, 12, 13):
        assert pool.append(batch(number)) == spec.append(batch(number))
        assert pool.find(f"run/{number}") == spec.find(f"run/{number}")
    assert pool.gc(keep_snapshots=1).num_files > 12
    assert NativePool.verify(tmp_path / "pool").is_sound
    pool.close()
    assert_same(NativePool.open(tmp_path / "pool"), spec)


def test_files_have_at_most_as_many_samples(tmp_path: Path) -> None:
    pool, spec = filled(tmp_path / "pool")
    assert pool.compact(max_samples=30).num_segments == 3
    assert_same(pool, spec)
    with pytest.raises(ValueError, match="max_samples"):
        pool.compact(max_samples=0)


def test_appends_merge_small_files(tmp_path: Path) -> None:
    pool, spec = filled(tmp_path / "pool", 300)
    info = pool.info()
    assert 200 < info.num_segments <= 256, "an append merges only what is too much"
    assert pool.snapshot.generation > 300
    assert_same(pool, spec)
    for number in (0, 40, 299):
        assert pool.append(batch(number)) == spec.find(f"run/{number}"), "keys are still known"
    assert len(NativePool.open(tmp_path / "pool", snapshot=100)) == 700
    assert NativePool.verify(tmp_path / "pool").is_sound


def test_samples_that_were_scored_anew_are_compacted_apart(tmp_path: Path) -> None:
    pool, spec = filled(tmp_path / "pool", 6)
    scores = np.arange(len(pool), dtype=np.float32)
    for each in (pool, spec):
        each.draft_scores("reward", 0, scores)
        each.publish_scores("reward")
        for number in range(6, 10):
            each.append(batch(number))
    assert pool.compact().num_segments == 2
    assert_same(pool, spec)
    assert NativePool.verify(tmp_path / "pool").is_sound


def test_the_command(tmp_path: Path) -> None:
    filled(tmp_path / "pool")[0].close()
    done = quark("pool", "compact", tmp_path / "pool", "--max-samples", "30", "--json").json
    assert (done["segments_before"], done["segments"]) == (12, 3)
    again = quark("pool", "compact", tmp_path / "pool", "--max-samples", "30")
    assert "nothing to do: 3" in again.out
    assert "became 1" in quark("pool", "compact", tmp_path / "pool").out
    assert quark("pool", "compact", tmp_path / "pool", "--max-samples", "1").code == 2
