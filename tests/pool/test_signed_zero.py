"""A score of -0.0 ranks with 0.0, and keeps its sign wherever it is read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from quark.pool.base import SamplePool
from quark.pool.export import export_pool
from quark.pool.ingest import import_file
from quark.pool.memory import MemoryPool
from quark.pool.native import NativePool
from quark.pool.scope import Scope
from tests.pool.batches import VOCAB_SIZE, filled_alike, make_batch

SCORES = [-0.0, 0.0, -1.0, -0.0, 1.0, 0.0, -0.0, 0.5]


@pytest.fixture
def pools(tmp_path: Path) -> tuple[NativePool, MemoryPool]:
    """Enough appends that their runs were merged."""
    batches = (
        make_batch(f"run/{i}", {"reward": np.roll(SCORES, i).tolist()}, content=i)
        for i in range(20)
    )
    return filled_alike(tmp_path / "pool", batches)


def signs(scores: object) -> list[bool]:
    return np.signbit(np.asarray(scores, np.float32)).tolist()


def expected(ids: object) -> list[bool]:
    stored = np.concatenate([np.roll(SCORES, i) for i in range(20)])
    return signs(stored[np.asarray(ids, np.int64)])


@pytest.mark.parametrize("scope", [None, Scope(min_score=-2.0), Scope(per_prompt=True)], ids=str)
@pytest.mark.parametrize("window", [1, 3])
def test_a_batch_has_the_sign_that_was_appended(
    pools: tuple[NativePool, MemoryPool], scope: Scope | None, window: int
) -> None:
    for pool in pools:
        sampler = pool.quantize(3, scope=scope).sampler(batch_size=32, seed=1, bucket_window=window)
        seen = []
        for step in range(6):
            for batch in (sampler.batch(step, pad_id=0), sampler.packed(step)):
                assert signs(batch.scores) == expected(batch.ids)
                seen += signs(batch.scores)
        assert len(set(seen)) == 2


def test_every_reader_shows_the_sign(pools: tuple[NativePool, MemoryPool], tmp_path: Path) -> None:
    ids = range(160)
    pool: SamplePool
    for pool in pools:
        assert signs(pool.scores("reward")) == expected(ids)
        assert signs([sample.scores["reward"] for sample in pool.samples(ids)]) == expected(ids)
        first = pool.draft_end("again") or 0
        pool.draft_scores("again", first, pool.scores("reward"))
        pool.publish_scores("again")
        assert signs(pool.scores("again")) == expected(ids)
    native = pools[0]
    scanned = native.scan().select("reward", "again").collect()
    for name in scanned.columns:
        assert signs(scanned[name]) == expected(ids)
    for name in ("x.parquet", "x.jsonl", "x.arrow"):
        export_pool(native, tmp_path / name)
        import_file(tmp_path / f"{name}.pool", tmp_path / name, vocab_size=VOCAB_SIZE)
        with NativePool.open(tmp_path / f"{name}.pool") as copy:
            assert signs(copy.scores("reward")) == expected(ids), name
    kept = native.scan().filter(pl.col("reward") == 0.0).select("id", "reward").collect()
    assert signs(kept["reward"]) == expected(kept["id"])
