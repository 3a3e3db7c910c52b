"""Batches of a pool in plain Python; ``quark.pool.base.Sampler`` describes the sequence that they follow."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Generic, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from quark.pool.base import Sample, SamplePool, SamplingMode
from quark.pool.batch import BatchBuffers, PackedBatch, PoolBatch
from quark.pool.scrambling import permute, scramble

_BatchT = TypeVar("_BatchT", bound=PoolBatch | PackedBatch)


class MemoryWalk:
    """Walks ``members`` without replacement, epoch by epoch."""

    def __init__(self, key: int, members: Sequence[int]) -> None:
        self._key = key
        self._members = members

    @property
    def size(self) -> int:
        """Number of turns in an epoch."""
        return len(self._members)

    def at(self, turn: int) -> int:
        """The sample at a turn."""
        epoch, place = divmod(turn, self.size)
        return self._members[permute(self.size, scramble(self._key, epoch), place)]


class AgedWalk(MemoryWalk):
    """Takes a quota of each round per epoch; see ``quark.pool.base.Sampler``."""

    def __init__(
        self, key: int, round_key: int, samples: Sequence[Sample], weights: list[int]
    ) -> None:
        rounds = sorted({sample.round for sample in samples}, reverse=True)
        weight = 0
        turns: list[
            tuple[int, int]
        ] = []  # of an epoch: round number, and draws of this round so far
        self._rounds: list[MemoryWalk] = []
        self._quotas: list[int] = []
        for number, round in enumerate(rounds):
            members = sorted(sample.id for sample in samples if sample.round == round)
            age = rounds[0] - round
            before = weight >> 20
            weight += len(members) * (weights[age] if age < len(weights) else 0)
            quota = (weight >> 20) - before
            turns += [(number, taken) for taken in range(quota)]
            self._quotas.append(quota)
            self._rounds.append(MemoryWalk(scramble(round_key, round), members))
        self._turns = turns
        super().__init__(key, range(len(turns)))

    def at(self, turn: int) -> int:
        """The sample at a turn. The quotas choose its round, and the walk of the round chooses the sample."""
        number, taken = self._turns[super().at(turn)]
        epoch = turn // self.size
        return self._rounds[number].at(epoch * self._quotas[number] + taken)


class MemorySampler:
    """Draws batches: batch t takes the slots t B .. (t + 1) B - 1 of an endless sequence."""

    def __init__(
        self,
        pool: SamplePool,
        values: list[float],
        labels: dict[int, int],
        strata: list[tuple[int, list[int]]],
        walks: list[MemoryWalk],
        batch_size: int,
        seed: int,
        mode: SamplingMode,
        mine: slice,
        max_uses: int | None,
        bucket_window: int,
    ) -> None:
        self._pool = pool
        self._values = values
        self._labels = labels
        self._strata = strata
        self._walks = walks
        self._batch_size = batch_size
        self._seed = seed
        self._mode = mode
        self._mine = mine
        self._max_uses = max_uses
        self._bucket_window = bucket_window

    @property
    def num_batches(self) -> int | None:
        """Number of whole batches until every sample is used ``max_uses`` times; None without that limit."""
        if self._max_uses is None:
            return None
        return sum(self._max_uses * walk.size for walk in self._walks) // self._batch_size

    def draw(self, step: int) -> tuple[NDArray[np.uint64], NDArray[np.int16]]:
        """Ids and quantiles of this rank's rows of batch ``step``. Raises ValueError beyond the last batch."""
        if self.num_batches is not None and step >= self.num_batches:
            raise ValueError(f"the samples are used up after {self.num_batches} batches")
        ids = self._window(step)[self._mine]
        return (
            np.array(ids, dtype=np.uint64),
            np.array([self._labels[id] for id in ids], dtype=np.int16),
        )

    def _window(self, step: int) -> list[int]:
        """Ids of a batch, after its window was bucketed by length."""
        number, place = divmod(step, self._bucket_window)
        if self._bucket_window == 1:
            return self._drawn(step)
        first, count = number * self._bucket_window, self._bucket_window
        if self.num_batches is not None:
            count = min(count, self.num_batches - first)
        batches = [self._drawn(first + i) for i in range(count)]
        samples = self._pool.samples([id for batch in batches for id in batch])
        by_length = [s.id for s in sorted(samples, key=lambda s: len(s.completion_tokens))]
        key = scramble(scramble(self._seed, 6), number)
        for i in sorted(range(count), key=lambda i: permute(count, key, i)):
            for slot, id in enumerate(batches[i]):
                is_alike = (self._labels[other] == self._labels[id] for other in by_length)
                batches[i][slot] = by_length.pop(list(is_alike).index(True))
        return batches[place]

    def _drawn(self, step: int) -> list[int]:
        slots = range(step * self._batch_size, (step + 1) * self._batch_size)
        return [self._at(slot) for slot in slots]

    def _at(self, slot: int) -> int:
        if self._mode is SamplingMode.IID:
            seed, strata = self._seed, self._strata
            _, members = strata[scramble(scramble(seed, 2), slot) * len(strata) >> 64]
            return members[scramble(scramble(seed, 3), slot) * len(members) >> 64]
        walks, turn = self._walks, 0
        if self._max_uses is not None:
            # One turn of each quantile at a time, while quantiles drop out.
            while slot >= len(walks := [w for w in walks if turn < self._max_uses * w.size]):
                slot -= len(walks)
                turn += 1
            return walks[slot].at(turn)
        turn, which = divmod(slot, len(walks))
        return walks[which].at(turn)

    def batch(self, step: int, *, pad_id: int, out: BatchBuffers | None = None) -> PoolBatch:
        """Draw batch ``step`` and gather its rows, padded, with their quantiles and scores."""
        ids, quantiles = self.draw(step)
        rows = self._pool.gather(ids, pad_id=pad_id)
        batch = replace(rows, quantiles=quantiles, scores=self._scores(ids))
        return batch if out is None else out.copied(batch)

    def packed(self, step: int, *, out: BatchBuffers | None = None) -> PackedBatch:
        """Draw batch ``step`` and gather its rows as flat arrays, with their quantiles and scores."""
        ids, quantiles = self.draw(step)
        rows = self._pool.gather_packed(ids)
        batch = replace(rows, quantiles=quantiles, scores=self._scores(ids))
        return batch if out is None else out.copied(batch)

    def stream(
        self,
        start: int = 0,
        stop: int | None = None,
        *,
        pad_id: int,
        depth: int = 2,
        out: Sequence[BatchBuffers] = (),
    ) -> MemoryStream[PoolBatch]:
        """The padded batches from ``start`` on, each made when it is asked for; ``depth`` has no effect."""
        del depth  # nothing runs ahead
        ring = itertools.cycle(out or [None])
        return MemoryStream(
            self.batch(t, pad_id=pad_id, out=next(ring)) for t in self._steps(start, stop)
        )

    def packed_stream(
        self,
        start: int = 0,
        stop: int | None = None,
        *,
        depth: int = 2,
        out: Sequence[BatchBuffers] = (),
    ) -> MemoryStream[PackedBatch]:
        """The packed batches from ``start`` on, each made when it is asked for; ``depth`` has no effect."""
        del depth  # nothing runs ahead
        ring = itertools.cycle(out or [None])
        return MemoryStream(self.packed(t, out=next(ring)) for t in self._steps(start, stop))

    def _steps(self, start: int, stop: int | None) -> Iterable[int]:
        end = self.num_batches if stop is None else stop
        return itertools.count(start) if end is None else range(start, end)

    def _scores(self, ids: NDArray[np.uint64]) -> NDArray[np.float32]:
        return np.array([self._values[int(id)] for id in ids], dtype=np.float32)


class MemoryStream(Generic[_BatchT]):
    """Batches in order, each made on demand."""

    def __init__(self, batches: Iterator[_BatchT]) -> None:
        self._batches = batches

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> _BatchT:
        return next(self._batches)

    def close(self) -> None:
        """End the stream: no further batch comes out of it."""
        self._batches = iter(())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
