"""Giving old snapshots up removes what only they need, and nothing else."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from quark.errors import PoolCorruptedError, PoolSnapshotError
from quark.pool.memory import MemoryPool
from quark.pool.native import NativePool
from quark.training.loop.draws import first_snapshot_with
from tests.cli.commands import quark, quark_process
from tests.pool.batches import VOCAB_SIZE, assert_same_content, make_batch


@pytest.fixture
def pool(tmp_path: Path) -> NativePool:
    """Nine appends of three samples with merges, scores that were replaced, a draft that was begun."""
    pool = NativePool.create(tmp_path / "pool", vocab_size=VOCAB_SIZE)
    for number in range(9):
        pool.append(make_batch(f"k{number}", {"reward": [0.5, -1.0, float("nan")]}, content=number))
    for _ in range(2):
        pool.rescore("reward", lambda _, texts: [float(len(text)) for text in texts], chunk_size=3)
    pool.draft_scores("other", 0, np.ones(5, np.float32))
    return pool


def files(pool: Path) -> set[Path]:
    return set(pool.glob("*/*"))


def test_what_only_old_snapshots_need_goes(pool: NativePool, tmp_path: Path) -> None:
    before, scores, snapshot = files(tmp_path / "pool"), pool.scores("reward"), pool.snapshot
    size = sum(file.stat().st_size for file in before)
    with NativePool.open(tmp_path / "pool") as reader:
        texts = [sample.completion_text for sample in reader.samples(range(27))]
        told = pool.gc(keep_snapshots=1, dry_run=True)
        assert (files(tmp_path / "pool"), pool.snapshot) == (before, snapshot)
        collected = pool.gc(keep_snapshots=1)
        assert told.oldest_generation == collected.oldest_generation == pool.snapshot.generation
        assert told.num_files == collected.num_files
        after = files(tmp_path / "pool")
        left = sum(file.stat().st_size for file in after)
        assert size - left <= collected.num_bytes <= size
        assert {file.parent.name for file in before - after} == {"manifest", "runs", "scores"}
        # What is open stays open, and the rest comes with a refresh.
        assert [sample.completion_text for sample in reader.samples(range(27))] == texts
        assert reader.refresh() == pool.snapshot
        np.testing.assert_array_equal(reader.scores("reward"), scores)
    assert pool.draft_end("other") == 5
    pool.draft_scores("other", 5, np.ones(22, np.float32))
    pool.publish_scores("other")
    pool.append(make_batch("more", {"reward": [1.0]}))
    pool.close()
    assert NativePool.verify(tmp_path / "pool").is_sound
    with NativePool.open(tmp_path / "pool", writable=True) as again:
        assert len(again) == 28


def test_a_collection_with_nothing_to_give_up_changes_nothing(
    pool: NativePool, tmp_path: Path
) -> None:
    pool.gc(keep_snapshots=3)
    then, there = pool.snapshot, files(tmp_path / "pool")
    assert pool.gc(keep_snapshots=3).num_files == 0
    assert (pool.snapshot, files(tmp_path / "pool")) == (then, there)
    with pytest.raises(ValueError, match="keep"):
        pool.gc(keep_snapshots=0)
    for generation in range(then.generation - 2, then.generation + 1):
        assert len(NativePool.open(tmp_path / "pool", snapshot=generation)) == 27
    with pytest.raises(ValueError, match="no snapshot 0; it has those from"):
        NativePool.open(tmp_path / "pool", snapshot=0)
    with first_snapshot_with(tmp_path / "pool", 5) as oldest:
        assert oldest.snapshot.generation == then.generation - 2
    pool.close()


def test_a_reader_of_what_was_collected_is_told_so(tmp_path: Path) -> None:
    pool = NativePool.create(tmp_path / "pool", vocab_size=VOCAB_SIZE)
    for number in range(20):
        pool.append(make_batch(f"k{number}", {"reward": [0.5, -1.0]}, content=number))
    first, second = (NativePool.open(tmp_path / "pool") for _ in range(2))
    quantization = second.quantize(2)
    sampler = quantization.sampler(batch_size=4, seed=1)
    pool.compact()
    oldest = pool.gc(keep_snapshots=1).oldest_generation
    gone = (
        f"snapshot {first.snapshot.generation} .* given up by a collection.* {oldest} on: refresh"
    )
    ids = np.array([0], np.uint64)
    for read in (
        first.scan,
        first.info,
        first.reopen,
        lambda: first.samples([0]),
        lambda: first.gather(ids, pad_id=0),
        lambda: first.gather_packed(ids),
        lambda: first.column("round"),
        lambda: first.fork(tmp_path / "fork"),
        lambda: first.scores("reward"),
        quantization.labels,
        lambda: sampler.batch(0, pad_id=0),
        lambda: sampler.packed(0),
        lambda: next(sampler.stream(0, 1, pad_id=0)),
    ):
        with pytest.raises(PoolSnapshotError, match=gone):
            read()
    first.refresh()
    assert len(first.samples(range(len(first)))) == len(pool)
    file = next((tmp_path / "pool" / "segments").iterdir())
    file.write_bytes(bytes(file.stat().st_size))
    with NativePool.open(tmp_path / "pool") as damaged, pytest.raises(PoolCorruptedError):
        damaged.samples([0])


def test_a_collected_pool_is_the_list_it_was(tmp_path: Path) -> None:
    model = MemoryPool(vocab_size=VOCAB_SIZE)
    with NativePool.create(tmp_path / "pool", vocab_size=VOCAB_SIZE) as pool:
        for number in range(40):
            batch = make_batch(f"k{number}", {"reward": [float(number % 7)] * 2}, content=number)
            assert pool.append(batch) == model.append(batch)
            if number % 5 == 4:
                pool.gc(keep_snapshots=1 + number % 3)
        assert_same_content(pool, model)
        with pool.fork(tmp_path / "fork") as fork:
            pool.gc(keep_snapshots=1)
            assert_same_content(fork, model)
    assert NativePool.verify(tmp_path / "fork").is_sound


def test_a_killed_collection_loses_nothing(pool: NativePool, tmp_path: Path) -> None:
    pool.close()
    program = (
        "import sys; from quark.pool.native import NativePool\n"
        "from quark.selftest.samples import make_batch\n"
        "pool = NativePool.open(sys.argv[1], writable=True); print(len(pool), flush=True)\n"
        "for i in range(len(pool), 10**6):\n"
        "    pool.append(make_batch(f'x{i}', {'reward': [1.0]})); pool.gc(keep_snapshots=1)\n"
        "    print(len(pool), flush=True)"
    )
    size = 27
    for trial in range(3):
        child = subprocess.Popen(
            [sys.executable, "-c", program, tmp_path / "pool"], stdout=subprocess.PIPE, text=True
        )
        assert child.stdout is not None
        first = child.stdout.readline()
        time.sleep(0.1 * (trial + 1))
        child.send_signal(signal.SIGKILL)
        said = (first + child.stdout.read()).split("\n")[:-1]
        child.wait()
        child.stdout.close()
        report = NativePool.verify(tmp_path / "pool")
        assert report.is_sound, report
        size = max([size, *map(int, said)])
        assert report.num_samples in (size, size + 1)
        size = report.num_samples


def test_the_command_collects(pool: NativePool, tmp_path: Path) -> None:
    pool.close()
    told = quark_process("pool", "gc", tmp_path / "pool", "--dry-run", "--json")
    assert told.code == 0, told.err
    assert told.json["dry_run"]
    done = quark_process("pool", "gc", tmp_path / "pool", "--keep", "2", "--json")
    assert done.code == 0, done.err
    assert done.json["files"] > 0
    assert "removed 0 files" in quark("pool", "gc", tmp_path / "pool", "--keep", "2").out
    assert quark("pool", "gc", tmp_path / "pool", "--keep", "0").code == 2
    assert quark("pool", "verify", tmp_path / "pool").code == 0
