"""What it means that two pools answer the same; the batches are those of the self-test."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from quark import _pool_rs
from quark.pool.base import PoolBatch, Quantization, SampleBatch, SamplePool, Sampler
from quark.pool.memory import MemoryPool
from quark.pool.native import NativePool
from quark.pool.sample_columns import PROVENANCE_COLUMNS
from quark.selftest.samples import VOCAB_SIZE as VOCAB_SIZE
from quark.selftest.samples import fields as fields
from quark.selftest.samples import make_batch as make_batch
from quark.types import Json


def filled_alike(path: Path, batches: Iterable[SampleBatch]) -> tuple[NativePool, MemoryPool]:
    """A new pool and its specification, with the same samples and the same ties."""
    pool = NativePool.create(path, vocab_size=VOCAB_SIZE)
    spec = MemoryPool(vocab_size=VOCAB_SIZE, tie_seed=pool.settings.tie_seed)
    for batch in batches:
        pool.append(batch)
        spec.append(batch)
    return pool, spec


def older_pool(
    path: Path,
    version: int,
    *,
    vocab_size: int = VOCAB_SIZE,
    store_text: bool = True,
    tie_seed: int = 7,
    metadata: Mapping[str, Json] | None = None,
) -> NativePool:
    """An empty pool as a build of that format version made it, open for writing."""
    _pool_rs.Pool.create(
        path,
        uuid=uuid.uuid4().hex,
        vocab_size=vocab_size,
        store_text=store_text,
        tie_seed=tie_seed,
        metadata=json.dumps(dict(metadata or {})),
        holder="",
        format=version,
    ).close()
    return NativePool.open(path, writable=True)


def assert_same_content(pool: SamplePool, model: SamplePool) -> None:
    """Every sample, every column, and every score bit by bit."""
    assert (len(pool), pool.num_removed) == (len(model), model.num_removed)
    assert pool.score_columns == model.score_columns
    everything = range(model.num_removed, len(model))
    assert list(map(fields, pool.samples(everything))) == list(
        map(fields, model.samples(everything))
    )
    for name in PROVENANCE_COLUMNS:
        assert_array_equal(pool.column(name), model.column(name), err_msg=name, strict=True)
    for name in model.score_columns:
        ours, theirs = pool.scores(name), model.scores(name)
        assert ours.dtype == np.float32
        assert_array_equal(ours, theirs)
        assert_array_equal(np.signbit(ours)[~np.isnan(ours)], np.signbit(theirs)[~np.isnan(theirs)])


def assert_same_batch(batch: PoolBatch, expected: PoolBatch) -> None:
    """Arrays equal in type, shape and content."""
    for name in PoolBatch.__slots__:
        ours, theirs = getattr(batch, name), getattr(expected, name)
        assert ours.dtype == theirs.dtype, name
        assert_array_equal(ours, theirs, err_msg=name, strict=True)


def assert_same_draws(sampler: Sampler, expected: Sampler, steps: Sequence[int]) -> None:
    """The same ids and quantiles at every step, and the same padded arrays."""
    for step in steps:
        for ours, theirs in zip(sampler.draw(step), expected.draw(step), strict=True):
            assert_array_equal(ours, theirs, err_msg=f"step {step}", strict=True)
        assert_same_batch(sampler.batch(step, pad_id=-7), expected.batch(step, pad_id=-7))


def assert_same_cut(cut: Quantization, expected: Quantization, num_removed: int = 0) -> None:
    """The same quantiles: counts, bounds and every label; those of removed samples have no label to ask for."""
    assert cut.num_quantiles == expected.num_quantiles
    assert cut.num_unranked == expected.num_unranked
    assert cut.snapshot.num_samples == expected.snapshot.num_samples
    assert_array_equal(cut.counts, expected.counts, strict=True)
    assert_array_equal(cut.lower_bounds, expected.lower_bounds, strict=True)
    assert_array_equal(cut.labels(), expected.labels(), strict=True)
    some = np.arange(num_removed, cut.snapshot.num_samples, dtype=np.uint64)[::-1].copy()
    assert_array_equal(cut.labels_of(some), expected.labels_of(some), strict=True)
    if num_removed:
        for quantization in (cut, expected):
            with pytest.raises(IndexError):
                quantization.labels_of(np.array([num_removed - 1], np.uint64))
