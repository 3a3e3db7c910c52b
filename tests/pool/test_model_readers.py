"""Readers beside a writer that appends all the while."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import numpy as np
from numpy.testing import assert_array_equal

from quark.pool.memory import MemoryPool
from quark.pool.native import NativePool
from quark.selftest.samples import numbered_batch
from quark.selftest.writers import append_until_killed
from tests.pool.batches import VOCAB_SIZE, assert_same_content, assert_same_cut, assert_same_draws


def test_a_reader_sees_whole_commits_in_order_and_keeps_the_snapshot_it_has(tmp_path: Path) -> None:
    path = tmp_path / "pool"
    processes = multiprocessing.get_context("forkserver")
    receiving, sending = processes.Pipe(duplex=False)
    writer = processes.Process(target=append_until_killed, args=(path, 0, sending))
    writer.start()
    sending.close()
    try:
        acknowledged = receiving.recv() + 1
        reader = NativePool.open(path)
        pinned = NativePool.open(path, snapshot=1)
        kept = reader.quantize(3)
        labels = kept.labels()
        model = MemoryPool(vocab_size=VOCAB_SIZE)
        while reader.snapshot.generation < 80:
            assert writer.is_alive()
            seen = reader.refresh()
            assert seen.generation >= acknowledged, "what was acknowledged is visible"
            while model.snapshot.generation < seen.generation:
                model.append(numbered_batch(model.snapshot.generation))
            assert seen.num_samples == len(reader) == len(model)
            assert_same_cut(reader.quantize(5), model.quantize(5))
            while receiving.poll():
                acknowledged = receiving.recv() + 1
    finally:
        writer.kill()
        writer.join()
    assert_same_content(reader, model)
    assert_array_equal(kept.labels(), labels)
    first = MemoryPool(vocab_size=VOCAB_SIZE)
    first.append(numbered_batch(0))
    assert_same_content(pinned, first)


def test_tiers_of_tiers_rank_and_draw_like_the_model(tmp_path: Path) -> None:
    pool = NativePool.create(tmp_path / "pool", vocab_size=VOCAB_SIZE, tie_seed=9)
    model = MemoryPool(vocab_size=VOCAB_SIZE, tie_seed=9)
    rng = np.random.default_rng(4)
    # 8, 64 and 512 are where one, two and three levels merge at once.
    checked = {7, 8, 9, 63, 64, 65, 71, 72, 511, 512, 513, 520}
    for number in range(1, 521):
        batch = numbered_batch(int(rng.integers(0, 2**31)))
        for each in (pool, model):
            each.append(batch)
        if number in checked:
            cut, expected = pool.quantize(5), model.quantize(5)
            assert_array_equal(cut.counts, expected.counts)
            samplers = (q.sampler(batch_size=64, seed=number) for q in (cut, expected))
            assert_same_draws(*samplers, [0, 12345])
    assert [column.num_runs for column in pool.info().score_columns] == [2, 2]
    assert_same_cut(pool.quantize(5), model.quantize(5))
