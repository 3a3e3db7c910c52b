"""Batches prepared ahead: the same ones, in order, and no thread or hang left behind."""

from __future__ import annotations

import contextlib
import gc
import os
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from quark.errors import PoolCorruptedError, PoolError
from quark.pool.base import Quantization, SamplePool
from quark.pool.batch import BatchBuffers, PackedBatch, PoolBatch
from quark.pool.memory import MemoryPool
from quark.pool.native import NativePool
from tests.pool.batches import VOCAB_SIZE, make_batch
from tests.pool.forked import is_true_in_a_fork


def filled(pool: SamplePool) -> Quantization:
    for number in range(8):
        scores = np.random.default_rng(number).random(30).tolist()
        pool.append(make_batch(str(number), {"reward": scores}, content=number))
    return pool.quantize(4)


@pytest.fixture
def native(tmp_path: Path) -> Quantization:
    return filled(NativePool.create(tmp_path / "pool", vocab_size=VOCAB_SIZE))


@pytest.fixture(params=["native", "memory"])
def cut(request: pytest.FixtureRequest, tmp_path: Path) -> Quantization:
    if request.param == "memory":
        return filled(MemoryPool(vocab_size=VOCAB_SIZE))
    return filled(NativePool.create(tmp_path / "pool", vocab_size=VOCAB_SIZE))


def assert_same(ours: PoolBatch | PackedBatch, theirs: PoolBatch | PackedBatch) -> None:
    for field in fields(theirs):
        a, b = getattr(ours, field.name), getattr(theirs, field.name)
        assert_array_equal(a, b, err_msg=field.name)


TASKS = Path("/proc/self/task")


def num_threads() -> int:
    """Threads that prepare batches; other tests of this process may leave threads of other names."""
    names = []
    for task in TASKS.iterdir():
        with contextlib.suppress(OSError):  # ended meanwhile
            names.append((task / "comm").read_text())
    return sum(name.startswith("quark-batches") for name in names)


@pytest.mark.parametrize("depth", [1, 3])
def test_a_stream_gives_the_batches_in_turn(cut: Quantization, depth: int) -> None:
    sampler = cut.sampler(batch_size=12, seed=0)
    with sampler.stream(5, 11, pad_id=-1, depth=depth) as stream:
        for step, batch in enumerate(stream, 5):
            assert_same(batch, sampler.batch(step, pad_id=-1))
        assert step == 10
    for step, packed in enumerate(sampler.packed_stream(2, 4, depth=depth), 2):
        assert_same(packed, sampler.packed(step))


def test_a_stream_ends_with_the_samples(cut: Quantization) -> None:
    sampler = cut.sampler(batch_size=50, seed=0, max_uses=1)
    assert sampler.num_batches == 4
    assert len(list(sampler.stream(pad_id=0))) == 4
    with pytest.raises(ValueError, match="used up after 4 batches"):
        list(sampler.stream(3, 6, pad_id=0))


def test_a_ring_of_buffers_is_written_in_turn(cut: Quantization) -> None:
    sampler = cut.sampler(batch_size=12, seed=0)
    ring = [
        BatchBuffers.allocate(12, prompt_tokens=200, completion_tokens=200, dtype=np.int32)
        for _ in range(2)
    ]
    for step, batch in enumerate(sampler.stream(0, 5, pad_id=0, out=ring)):
        assert batch.prompt_tokens.base is ring[step % 2].prompt_tokens
        assert_same(batch, sampler.batch(step, pad_id=0))
    small = BatchBuffers.allocate(12, prompt_tokens=200, completion_tokens=1)
    with pytest.raises(ValueError, match="completion_tokens has room for 1"):
        next(iter(sampler.stream(pad_id=0, out=[small])))


@pytest.mark.skipif(not TASKS.is_dir(), reason="this system does not list a process's threads")
def test_a_stream_that_is_closed_or_forgotten_ends_its_thread(native: Quantization) -> None:
    sampler = native.sampler(batch_size=12, seed=0)
    before = num_threads()
    stream = sampler.stream(pad_id=0)
    next(stream)
    assert num_threads() == before + 1
    stream.close()
    assert num_threads() == before
    with pytest.raises(StopIteration):
        next(stream)
    stream = sampler.stream(pad_id=0)
    del stream
    gc.collect()
    assert num_threads() == before


def test_damage_reaches_the_consumer(tmp_path: Path) -> None:
    filled(NativePool.create(tmp_path / "pool", vocab_size=VOCAB_SIZE))
    segment = max((tmp_path / "pool" / "segments").iterdir())
    content = bytearray(segment.read_bytes())
    content[512:3000] = bytes(2488)
    segment.chmod(0o644)
    segment.write_bytes(content)
    with NativePool.open(tmp_path / "pool") as pool:
        sampler = pool.quantize(4).sampler(batch_size=64, seed=0)
        with pytest.raises(PoolCorruptedError):
            list(sampler.stream(0, 20, pad_id=0))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_stream_in_a_forked_child_says_so_and_the_parents_goes_on(native: Quantization) -> None:
    sampler = native.sampler(batch_size=12, seed=0)
    stream = sampler.stream(pad_id=0)
    next(stream)

    def is_refused() -> bool:
        nonlocal stream
        try:
            next(stream)
        except PoolError as error:
            del stream
            return "forked" in str(error)
        return False

    assert is_true_in_a_fork(is_refused)
    assert_same(next(stream), sampler.batch(1, pad_id=0))
