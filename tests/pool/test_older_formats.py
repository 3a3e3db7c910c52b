"""Pools as older builds made them are read, written and left as they are; what they have no column for is not known."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from polars.testing import assert_frame_equal

from quark import _pool_rs
from quark.errors import DataError
from quark.pool.base import SampleBatch
from quark.pool.export import export_pool, write_rows
from quark.pool.ingest import import_file, merge_pools
from quark.pool.native import NativePool
from quark.pool.scope import Scope
from tests.pool.batches import VOCAB_SIZE, make_batch, older_pool

FIXTURES = Path(__file__).parents[2] / "quark_pool_rs" / "tests" / "fixtures"
OLDER = range(1, _pool_rs.FORMAT_VERSION)
FILES = ["x.parquet", "x.jsonl", "x.arrow"]


def batch(number: int) -> SampleBatch:
    return make_batch(f"run/{number}", {"reward": [0.5, -1.0, 2.0]}, content=number)


def unknown(batch: SampleBatch) -> SampleBatch:
    """The same where nobody knows what was drawn from."""
    nothing = np.full(len(batch.seeds), np.nan, np.float32)
    return dataclasses.replace(batch, logprob_sampled=nothing)


@pytest.mark.parametrize("version", OLDER)
def test_a_recorded_pool_shows_the_column_as_not_known(tmp_path: Path, version: int) -> None:
    shutil.copytree(FIXTURES / f"v{version}", tmp_path / "pool")
    with NativePool.open(tmp_path / "pool", writable=True) as pool:
        assert not pool.has_sampled_logprobs
        assert (pool.column("logprob_policy") == -1.5).all()
        assert np.isnan(pool.column("logprob_sampled")).all()
        assert all(np.isnan(sample.logprob_sampled) for sample in pool.samples(range(18)))
        shown = pool.scan().select("logprob_policy", "logprob_sampled").collect()
        assert shown["logprob_policy"].to_list() == [-1.5] * 18
        assert shown["logprob_sampled"].null_count() == 18
        assert pool.scan().filter(pl.col("logprob_sampled") < 0).collect().is_empty()
        assert pool.scan().filter(pl.col("logprob_sampled").is_null()).collect().height == 18
        ranked = pool.quantize(2, scope=Scope(where="logprob_sampled < 0"))
        assert (ranked.labels() == -1).all()
        everything = pool.scan().collect()
        pool.compact()
        pool.retain(max_samples=9)
        assert_frame_equal(pool.scan().collect(), everything[len(pool) - 8 :])
        with pool.fork(tmp_path / "fork") as fork:
            assert not fork.has_sampled_logprobs
            assert_frame_equal(fork.scan().collect(), pool.scan().collect())
    for path in (tmp_path / "pool", tmp_path / "fork"):
        assert NativePool.verify(path).is_sound


@pytest.mark.parametrize("version", OLDER)
def test_what_an_older_pool_has_no_column_for_is_refused_and_not_dropped(
    tmp_path: Path, version: int
) -> None:
    with older_pool(tmp_path / "old", version) as pool:
        says = rf"logprob_sampled\[\d\] is -0\.\d+, which a pool of format version {version} has no"
        with pytest.raises(ValueError, match=says):
            pool.append(batch(0))
        assert len(pool) == 0
        pool.append(unknown(batch(0)))
        assert len(pool) == 3
    with NativePool.create(tmp_path / "new", vocab_size=VOCAB_SIZE) as pool:
        assert pool.has_sampled_logprobs
        pool.append(batch(1))
        export_pool(pool, tmp_path / "x.parquet")
    for move in (
        lambda: import_file(tmp_path / "old", tmp_path / "x.parquet"),
        lambda: merge_pools(tmp_path / "old", [tmp_path / "new"]),
    ):
        with pytest.raises(DataError, match=rf"rows 1 to 3: {says}"):
            move()
    merged = merge_pools(tmp_path / "all", [tmp_path / "old", tmp_path / "new"])
    assert [part.num_appended for part in merged] == [3, 3]
    with NativePool.open(tmp_path / "all") as pool:
        found = pool.column("logprob_sampled")
    assert np.isnan(found[:3]).all()
    np.testing.assert_array_equal(found[3:], batch(1).logprob_sampled)


@pytest.mark.parametrize("version", OLDER)
@pytest.mark.parametrize("name", FILES)
def test_an_older_pool_comes_into_a_new_one_by_a_file(
    tmp_path: Path, version: int, name: str
) -> None:
    with older_pool(tmp_path / "old", version) as old:
        for number in range(3):
            old.append(unknown(batch(number)))
        export_pool(old, tmp_path / name)
        import_file(tmp_path / "new", tmp_path / name, vocab_size=VOCAB_SIZE)
        with NativePool.open(tmp_path / "new") as new:
            assert new.has_sampled_logprobs
            # Prompts are numbered anew.
            ours, theirs = (pool.scan().drop("prompt_id").collect() for pool in (new, old))
            assert_frame_equal(ours, theirs)


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_an_older_build_exported_lacks_the_column(tmp_path: Path, name: str) -> None:
    with NativePool.create(tmp_path / "pool", vocab_size=VOCAB_SIZE) as pool:
        pool.append(batch(0))
        pool.append(batch(1))
        write_rows(pool.scan().drop("logprob_sampled"), tmp_path / name)
        rest = pool.scan().drop("logprob_sampled", "prompt_id").collect()
        # What the file does not say is not compared.
    assert import_file(tmp_path / "pool", tmp_path / name).num_known == 6
    import_file(tmp_path / "new", tmp_path / name, vocab_size=VOCAB_SIZE)
    with NativePool.open(tmp_path / "new") as new:
        assert np.isnan(new.column("logprob_sampled")).all()
        assert_frame_equal(new.scan().drop("logprob_sampled", "prompt_id").collect(), rest)
    write_rows(pl.LazyFrame(rest).drop("logprob_policy"), tmp_path / f"less-{name}")
    with pytest.raises(DataError, match=r"has no column logprob_policy$"):
        import_file(tmp_path / "other", tmp_path / f"less-{name}", vocab_size=VOCAB_SIZE)
