"""Batches in the caller's memory, packed batches and the shares of ranks, for both pools."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from quark.pool.base import Quantization, SamplePool, SamplingMode
from quark.pool.batch import BatchBuffers, PackedBatch, PoolBatch
from quark.pool.memory import MemoryPool
from quark.pool.native import NativePool
from tests.pool.batches import VOCAB_SIZE, make_batch

Pair = tuple[SamplePool, SamplePool]


@pytest.fixture(scope="module", params=[VOCAB_SIZE, 1 << 17], ids=["u16", "u32"])
def pools(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """300 samples in 12 rounds, the native pool first."""
    vocab_size = request.param
    path = tmp_path_factory.mktemp("pools") / "pool"
    made: Pair = (
        NativePool.create(path, vocab_size=vocab_size),
        MemoryPool(vocab_size=vocab_size),
    )
    scores = np.random.default_rng(0).normal(size=300).round(1)
    for pool in made:
        for number in range(12):
            some = scores[25 * number : 25 * number + 25].tolist()
            pool.append(make_batch(str(number), {"reward": some}, content=number))
    return made


def buffers(dtype: type[np.int64 | np.int32] = np.int64) -> BatchBuffers:
    return BatchBuffers.allocate(64, prompt_tokens=4096, completion_tokens=4096, dtype=dtype)


def assert_same(ours: PoolBatch | PackedBatch, theirs: PoolBatch | PackedBatch) -> None:
    for field in fields(theirs):
        a, b = getattr(ours, field.name), getattr(theirs, field.name)
        assert a.dtype == b.dtype, field.name
        assert_array_equal(a, b, err_msg=field.name, strict=True)


@given(
    batch_size=st.integers(1, 60),
    step=st.integers(0, 2**64 - 1),
    mode=st.sampled_from(SamplingMode),
    dtype=st.sampled_from([np.int64, np.int32]),
    pad_id=st.integers(-(2**31), 2**31 - 1),
)
@settings(max_examples=40)
def test_both_pools_write_the_same_batch_into_the_callers_memory(
    pools: Pair,
    batch_size: int,
    step: int,
    mode: SamplingMode,
    dtype: type[np.int64 | np.int32],
    pad_id: int,
) -> None:
    ours, theirs = (
        pool.quantize(4).sampler(batch_size=batch_size, seed=1, mode=mode) for pool in pools
    )
    out, theirs_out = buffers(dtype), buffers(dtype)
    for _ in range(2):
        batch = ours.batch(step, pad_id=pad_id, out=out)
        assert_same(batch, theirs.batch(step, pad_id=pad_id, out=theirs_out))
        assert batch.completion_lengths.base is out.completion_lengths
        assert batch.completion_tokens.base is out.completion_tokens
        assert batch.completion_tokens.flags.c_contiguous
        packed = ours.packed(step, out=out)
        assert_same(packed, theirs.packed(step, out=theirs_out))
        assert packed.prompt_tokens.base is out.prompt_tokens
    assert_same(ours.packed(step), theirs.packed(step))
    plain = ours.batch(step, pad_id=pad_id)
    for field in fields(PoolBatch):
        assert_array_equal(
            getattr(plain, field.name),
            getattr(theirs.batch(step, pad_id=pad_id, out=out), field.name),
        )


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda b: pickle.loads(pickle.dumps(b))]
)
def test_a_copy_of_used_buffers_holds_batches_of_its_own(
    pools: Pair, copied: Callable[[BatchBuffers], BatchBuffers]
) -> None:
    sampler = pools[0].quantize(4).sampler(batch_size=8, seed=1)
    used = buffers()
    sampler.batch(0, pad_id=0, out=used)
    out = copied(used)
    assert_same(sampler.batch(1, pad_id=0, out=out), sampler.batch(1, pad_id=0))


@given(ids=st.lists(st.integers(0, 299), max_size=40))
@settings(max_examples=30)
def test_packed_samples_are_the_padded_ones_without_padding(pools: Pair, ids: list[int]) -> None:
    chosen = np.array(ids, np.uint64)
    for pool in pools:
        padded, packed = pool.gather(chosen, pad_id=-1), pool.gather_packed(chosen)
        for row in range(len(ids)):
            begin, end = packed.prompt_offsets[row : row + 2]
            kept = padded.prompt_tokens[row][padded.prompt_tokens[row] >= 0]
            assert_array_equal(packed.prompt_tokens[begin:end], kept)
            begin, end = packed.completion_offsets[row : row + 2]
            kept = padded.completion_tokens[row, : padded.completion_lengths[row]]
            assert_array_equal(packed.completion_tokens[begin:end], kept)
    ours, theirs = pools
    assert_same(ours.gather_packed(chosen), theirs.gather_packed(chosen))
    out = buffers(np.int32)
    assert_same(
        ours.gather_packed(chosen, out=out), theirs.gather_packed(chosen, out=buffers(np.int32))
    )
    assert_same(
        ours.gather(chosen, pad_id=7, out=out),
        theirs.gather(chosen, pad_id=7, out=buffers(np.int32)),
    )


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"completion_tokens": np.zeros(3, np.int64)}, "completion_tokens.* needs"),
        ({"ids": np.zeros(3, np.uint64)}, "needs 16"),
        ({"completion_lengths": np.zeros(3, np.int32)}, "needs 16"),
        ({"prompt_tokens": np.zeros(4096, np.float32)}, "out does not hold"),
        ({"prompt_tokens": np.zeros((64, 64), np.int64)}, "out does not hold"),
        ({"scores": np.zeros(128, np.float32)[::2]}, "out does not hold"),
    ],
)
def test_memory_that_does_not_do_is_refused(
    pools: Pair, changed: dict[str, Any], message: str
) -> None:
    bad = replace(buffers(), **changed)
    sampler = pools[0].quantize(4).sampler(batch_size=16, seed=1)
    with pytest.raises(ValueError, match=message):
        sampler.batch(0, pad_id=0, out=bad)


def test_a_pad_id_that_the_buffer_cannot_hold_is_refused(pools: Pair) -> None:
    for pool in pools:
        sampler = pool.quantize(4).sampler(batch_size=16, seed=1)
        with pytest.raises(ValueError, match="pad_id"):
            sampler.batch(0, pad_id=2**31, out=buffers(np.int32))
        with pytest.raises(ValueError, match="pad_id"):
            next(sampler.stream(pad_id=-(2**31) - 1, out=[buffers(np.int32)]))


def cuts(pools: Pair) -> tuple[Quantization, Quantization]:
    return pools[0].quantize(5), pools[1].quantize(5)


@pytest.mark.parametrize("mode", SamplingMode)
@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_ranks_share_the_rows_of_the_batch_in_turn(
    pools: Pair, mode: SamplingMode, world_size: int
) -> None:
    for cut in cuts(pools):
        whole = cut.sampler(batch_size=13, seed=2, mode=mode)
        for rank in range(world_size):
            part = cut.sampler(batch_size=13, seed=2, mode=mode, rank=rank, world_size=world_size)
            for step in (0, 1, 2**50):
                ids, quantiles = whole.draw(step)
                assert_array_equal(part.draw(step)[0], ids[rank::world_size], strict=True)
                assert_array_equal(part.draw(step)[1], quantiles[rank::world_size], strict=True)
                assert_array_equal(part.batch(step, pad_id=0).ids, ids[rank::world_size])


@pytest.mark.parametrize(("rank", "world_size"), [(2, 2), (0, 0), (0, 14), (-1, 2)])
def test_a_rank_that_has_no_share_is_refused(pools: Pair, rank: int, world_size: int) -> None:
    for cut in cuts(pools):
        with pytest.raises(ValueError):
            cut.sampler(batch_size=13, seed=2, rank=rank, world_size=world_size)
