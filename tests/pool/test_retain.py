"""A pool without its oldest samples: ids stay, and what is left is ranked, drawn and read as ever."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from quark.pool.base import Retained, SampleBatch, SamplePool
from quark.pool.export import export_pool
from quark.pool.ingest import import_file, merge_pools
from quark.pool.memory import MemoryPool
from quark.pool.native import NativePool
from quark.pool.scope import Scope
from quark.run_directory import RunDirectory
from quark.selftest.samples import numbered_batch
from quark.training.explain import explain
from quark.training.state.run_state import oldest_snapshot_needed
from tests.cli.commands import quark
from tests.pool.batches import (
    VOCAB_SIZE,
    assert_same_content,
    assert_same_cut,
    assert_same_draws,
    fields,
    filled_alike,
    make_batch,
)
from tests.training.tiny_run import rows_of, train, write_inputs

NAN = float("nan")
SIZE = 3


def batch(number: int) -> SampleBatch:
    rewards = [NAN if (number + row) % 5 == 0 else float(number * row % 4) for row in range(SIZE)]
    made = make_batch(f"run/{number}", {"reward": rewards}, content=number)
    return dataclasses.replace(made, round=number // 2)


def lengths(_: Sequence[str], texts: Sequence[str]) -> list[float]:
    return [float(len(text)) for text in texts]


def filled(path: Path, appends: int = 12) -> tuple[NativePool, MemoryPool]:
    return filled_alike(path, map(batch, range(appends)))


def assert_same(pool: NativePool, spec: MemoryPool) -> None:
    """Samples, labels and draws."""
    assert_same_content(pool, spec)
    scopes = (None, Scope(last_rounds=2), Scope(per_prompt=True), Scope(where="round > AVG(round)"))
    for name in spec.score_columns:
        for scope in scopes:
            ours, theirs = (p.quantize(3, score=name, scope=scope) for p in (pool, spec))
            assert_same_cut(ours, theirs, spec.num_removed)
            if ours.counts.any():
                samplers = (q.sampler(batch_size=6, seed=1) for q in (ours, theirs))
                assert_same_draws(*samplers, steps=range(3))


@pytest.mark.parametrize("kind", ["native", "memory"])
def test_what_was_removed_is_in_arrays_alone(kind: str, tmp_path: Path) -> None:
    native, memory = filled(tmp_path / "pool", 4)
    pool: SamplePool = native if kind == "native" else memory
    before = list(map(fields, pool.samples(range(6, 12))))
    done = pool.retain(max_samples=8)
    assert done == Retained(num_appends=2, num_samples=6, num_removed=6)
    assert (len(pool), pool.num_removed, pool.snapshot.generation) == (12, 6, 5)
    assert list(map(fields, pool.samples(range(6, 12)))) == before
    scores = pool.scores("reward")
    assert np.isnan(scores[:6]).all()
    assert not np.isnan(scores[6:]).all()
    assert (pool.column("reward_token")[:6] == -1).all()
    assert np.isnan(pool.column("logprob_reference")[:6]).all()
    assert np.isnan(pool.column("logprob_sampled")[:6]).all()
    assert not np.isnan(pool.column("logprob_sampled")[6:]).all()
    cut = pool.quantize(2)
    assert (cut.labels()[:6] == -1).all()
    assert cut.num_unranked == np.isnan(scores[6:]).sum()
    drawn = np.concatenate([cut.sampler(batch_size=7, seed=0).draw(t)[0] for t in range(9)])
    assert set(drawn.tolist()) == set((6 + np.flatnonzero(~np.isnan(scores[6:]))).tolist())
    with pytest.raises(IndexError, match="the pool holds the samples 6 to 11"):
        pool.samples([5])
    with pytest.raises(IndexError, match="the pool holds the samples 6 to 11"):
        pool.gather(np.array([5], np.uint64), pad_id=0)
    # The key is known as ever, and ids go on.
    assert pool.append(batch(1)) == range(3, 6)
    assert pool.append(batch(4)) == range(12, 15)
    native.close()


@pytest.mark.parametrize(
    ("limits", "num_appends"),
    [
        ({"max_samples": 100}, 0),
        ({"max_samples": 36}, 0),
        ({"max_samples": 35}, 1),
        ({"max_samples": 1}, 11),
        ({"max_rounds": 6}, 0),
        ({"max_rounds": 2}, 8),
        ({"before_round": 0}, 0),
        ({"before_round": 4}, 8),
        ({"before_round": 99}, 11),
        ({"max_samples": 30, "max_rounds": 3, "before_round": 1}, 6),
    ],
)
def test_whole_appends_go(limits: dict[str, int], num_appends: int, tmp_path: Path) -> None:
    pool, spec = filled(tmp_path / "pool")
    told = pool.retain(**limits, dry_run=True)
    assert pool.num_removed == 0
    assert told == pool.retain(**limits) == spec.retain(**limits)
    assert (told.num_appends, told.num_samples) == (num_appends, 3 * num_appends)
    assert pool.snapshot.generation == 12 + bool(num_appends)
    assert pool.retain(**limits).num_appends == 0
    assert_same(pool, spec)
    for refused in ({}, {"max_samples": 0}, {"max_rounds": 0}, {"before_round": -1}):
        with pytest.raises(ValueError):
            pool.retain(**refused)
    pool.close()


def test_files_that_are_cut_are_written_anew(tmp_path: Path) -> None:
    pool, spec = filled(tmp_path / "pool")
    pool.compact()
    reader = NativePool.open(tmp_path / "pool")
    for each in (pool, spec):
        each.draft_scores("judge", 0, np.arange(36, dtype=np.float32) % 7)
        each.publish_scores("judge")
        each.draft_scores("other", 0, np.array([NAN, 1.0, 2.0, 3.0, NAN], np.float32))
        each.append(batch(12))
        # Through the large segment, runs of both columns, the scores that came later and the draft.
        assert each.retain(max_samples=38).num_removed == 3
    assert_same(pool, spec)
    assert reader.refresh() == pool.snapshot
    assert_same(reader, spec)
    for number in range(13, 24):
        assert pool.append(batch(number)) == spec.append(batch(number))
        if number % 4 == 0:
            assert pool.retain(max_rounds=5) == spec.retain(max_rounds=5)
    pool.compact()
    for each in (pool, spec):
        # All of the draft was removed: it goes on with the oldest sample.
        assert each.draft_end("other") == each.num_removed > 5
        each.draft_scores("other", each.num_removed, np.ones(len(each) - each.num_removed))
        each.publish_scores("other")
    pool.rescore("reward", lengths, chunk_size=4)
    spec_scores = pool.scores("reward")[spec.num_removed :]
    for first in range(0, len(spec_scores), 4):
        spec.draft_scores("reward", spec.num_removed + first, spec_scores[first : first + 4])
    spec.publish_scores("reward")
    assert_same(pool, spec)
    with pool.fork(tmp_path / "fork") as fork:
        assert_same(fork, spec)
        assert fork.retain(max_samples=5).num_samples > 0
        assert fork.append(batch(0)) == range(3)
    assert_same(pool, spec)
    pool.close()
    for name in ("pool", "fork"):
        assert NativePool.verify(tmp_path / name).is_sound
    assert_same(NativePool.open(tmp_path / "pool"), spec)


def test_older_snapshots_show_them_until_they_are_given_up(tmp_path: Path) -> None:
    pool, spec = filled(tmp_path / "pool")
    pool.retain(max_rounds=1)
    with NativePool.open(tmp_path / "pool", snapshot=12) as then:
        assert_same(then, spec)
    segments = tmp_path / "pool" / "segments"
    assert len(list(segments.iterdir())) == 12
    assert pool.gc(keep_snapshots=1).num_files > 10
    assert len(list(segments.iterdir())) == 2
    spec.retain(max_rounds=1)
    assert_same(pool, spec)
    pool.close()
    assert NativePool.verify(tmp_path / "pool").is_sound
    with NativePool.open(tmp_path / "pool", writable=True) as again:
        assert again.append(batch(5)) == range(15, 18)
        assert_same(again, spec)


def test_rows_go_out_and_in(tmp_path: Path) -> None:
    pool, _ = filled(tmp_path / "pool")
    pool.retain(max_samples=7)
    ids = list(range(30, 36))
    assert pool.scan().select("id").collect()["id"].to_list() == ids
    assert pool.scan().head(2).collect()["id"].to_list() == ids[:2]
    assert pool.scan().filter(pl.col("id") < 31).collect().height == 1
    info = pool.info()
    assert (info.num_removed, info.num_retained, info.snapshot.num_samples) == (30, 6, 36)
    (column,) = info.score_columns
    assert column.num_scored + column.num_unscored == 6
    assert export_pool(pool, tmp_path / "rows.parquet") == 6
    pool.close()
    done = import_file(tmp_path / "copy", tmp_path / "rows.parquet")
    assert (done.num_appended, done.num_known) == (6, 0)
    # What was removed is known to the pool that had it, and new to the others.
    filled(tmp_path / "whole")[0].close()
    assert [m.num_known for m in merge_pools(tmp_path / "pool", [tmp_path / "whole"])] == [36]
    (merged,) = merge_pools(tmp_path / "copy", [tmp_path / "whole"])
    assert (merged.num_appended, merged.num_known) == (30, 6)


def test_a_merge_brings_what_only_has_the_key_of_something_removed(tmp_path: Path) -> None:
    for number in (0, 1):
        with NativePool.create(tmp_path / f"from-{number}", vocab_size=VOCAB_SIZE) as source:
            for place in (1, 2):
                batch = numbered_batch(place)
                source.append(dataclasses.replace(batch, seeds=batch.seeds + np.uint64(number)))
    to, sources = tmp_path / "to", [tmp_path / "from-0", tmp_path / "from-1"]
    merge_pools(to, sources[:1])
    with NativePool.open(to, writable=True) as pool:
        pool.retain(max_samples=1)
    (again,) = merge_pools(to, sources[:1])
    assert again.num_appended == 0
    (other,) = merge_pools(to, sources[1:])
    with NativePool.open(sources[1]) as source:
        assert (other.num_appended, other.num_known) == (len(source), 0)


def test_the_command(tmp_path: Path) -> None:
    filled(tmp_path / "pool")[0].close()
    path = tmp_path / "pool"
    told = quark("pool", "retain", path, "--max-rounds", "4", "--dry-run", "--json").json
    assert told == {"samples": 12, "appends": 4, "kept": 24, "removed": 12, "dry_run": True}
    assert "removed 12 samples in 4 appends; 24 stay" in (
        quark("pool", "retain", path, "--before-round", "2").out
    )
    assert "removed 0 samples" in quark("pool", "retain", path, "--max-samples", "24").out
    assert quark("pool", "retain", path).code == 2
    info = quark("pool", "info", path, "--json").json
    assert (info["samples"], info["removed"]) == (36, 12)
    assert "24, and 12 older ones that were removed" in quark("pool", "info", path).out
    stats = quark("pool", "stats", path, "--json").json
    assert (stats["samples"], stats["removed"]) == (24, 12)
    assert [row["round"] for row in stats["rounds"]] == [2, 3, 4, 5]
    assert sum(row["samples"] for row in stats["rounds"]) == 24
    head = quark("pool", "head", path, "--num", "2", "--json").json
    assert [sample["id"] for sample in head["samples"]] == [12, 13]
    counted = quark("pool", "query", path, "SELECT COUNT(*), MIN(id) FROM pool", "--json").json
    assert counted["rows"] == [[24, 12]]
    assert quark("pool", "fork", path, tmp_path / "fork", "--json").json["samples"] == 24
    assert "sound: 24 samples" in quark("pool", "verify", path).out
    gone = quark("pool", "explain", path, "3")
    assert gone.code != 0
    assert "removed by retention" in gone.err


@pytest.mark.parametrize("cache", ["off", "hidden"])
def test_a_run_goes_on_without_its_oldest_samples(cache: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    config, run = write_inputs(tmp_path), tmp_path / "run"
    options = (f'reference.cache="{cache}"',)
    # In the middle of a round, which learns from all the samples that there are.
    assert train(config, run, stop_at=16, overrides=options).interrupted
    with NativePool.open(run / "pool", writable=True) as pool:
        before = pool.snapshot.generation
        num_removed = pool.retain(max_samples=1).num_removed
        assert len(pool) - 8 <= num_removed < len(pool)
    # The round ends as it began, however often it is interrupted: its snapshot is needed.
    assert train(config, run, stop_at=4, overrides=options).interrupted
    newest = max(
        RunDirectory(run).checkpoints.glob("step-*/state.json"), key=lambda p: p.stat().st_mtime_ns
    )
    state = json.loads(newest.read_bytes())["pool"]
    assert (state["generation"], state["learns_from"]) == (before + 1, before)
    assert oldest_snapshot_needed(RunDirectory(run)) == before
    assert "goes on from snapshot" in quark("pool", "gc", run).err
    result = train(config, run, overrides=options)
    assert (result.rounds, result.interrupted) == (3, False)
    train(config, tmp_path / "whole", overrides=options)
    ours, theirs = (
        [row for row in rows_of(path) if row["event"] == "step" and row["round"] < 2]
        for path in (run, tmp_path / "whole")
    )
    assert ours == theirs
    with NativePool.open(run / "pool") as pool:
        assert pool.num_removed == num_removed
        kept = explain(run, num_removed)
        assert kept.rounds
        with pytest.raises(IndexError, match="removed by retention"):
            explain(run, num_removed - 1)
    assert quark("report", run).code == 0
