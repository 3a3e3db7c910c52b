"""The ranking of a pool in plain Python: which sample is in which quantile, and in which order."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from quark.pool.base import (
    RemainderRule,
    SamplePool,
    SamplingMode,
    Snapshot,
    TieRule,
    age_weights,
)
from quark.pool.memory_sampler import AgedWalk, MemorySampler, MemoryWalk
from quark.pool.scrambling import scramble


class MemoryQuantization:
    """The ranking of a ``MemoryPool``, cut into quantiles."""

    def __init__(
        self,
        pool: SamplePool,
        num_quantiles: int,
        values: list[float],
        *,
        runs: list[list[int]] | None,
        groups: list[int] | None,
        tie_seed: int,
        ties: TieRule,
        remainder: RemainderRule,
    ) -> None:
        """``runs`` order the members of a quantile; without runs, their ids do. ``groups`` are ranked separately."""
        self._pool = pool
        self._num_quantiles = num_quantiles
        self._values = values
        self._snapshot = pool.snapshot
        self._num_removed = pool.num_removed
        ranked = [id for id, value in enumerate(values) if not math.isnan(value)]

        def worst_first(id: int) -> tuple[float, int]:
            tie = -id if ties is TieRule.OLDER_FIRST else -scramble(tie_seed, id)
            return values[id], tie

        ascending = sorted(ranked, key=worst_first)
        if groups is not None:
            self._labels = self._within(groups, ascending, ties)
            self._members = self._by_age()
            return
        total = len(ascending)
        if remainder is RemainderRule.SPREAD:
            starts = [k * total // num_quantiles for k in range(num_quantiles)]
        else:
            size = total // num_quantiles
            starts = [0, *(total - (num_quantiles - k) * size for k in range(1, num_quantiles))]
        label_of: dict[int, int] = {}
        for k, start in enumerate(starts):
            if ties is TieRule.TOGETHER and start < total:
                # The whole block at the boundary goes up.
                while start > 0 and values[ascending[start - 1]] == values[ascending[start]]:
                    start -= 1
            for id in ascending[start:]:
                label_of[id] = k
        self._labels = label_of
        if runs is None:
            self._members = self._by_age()
            return
        self._members = [
            self._in_run_order(k, runs, ties, starts, ascending) for k in range(num_quantiles)
        ]

    def _within(self, groups: list[int], ascending: list[int], ties: TieRule) -> dict[int, int]:
        label_of: dict[int, int] = {}
        for group in set(groups):
            members = [id for id in ascending if groups[id] == group]
            for worse, id in enumerate(members):
                label_of[id] = (2 * worse + 1) * self._num_quantiles // (2 * len(members))
            if ties is TieRule.TOGETHER:
                for low, high in reversed(list(pairwise(members))):
                    if self._values[low] == self._values[high]:
                        label_of[low] = label_of[high]
        return label_of

    def _by_age(self) -> list[list[int]]:
        return [
            [id for id in sorted(self._labels) if self._labels[id] == k]
            for k in range(self._num_quantiles)
        ]

    def _in_run_order(
        self,
        quantile: int,
        runs: list[list[int]],
        ties: TieRule,
        starts: list[int],
        ascending: list[int],
    ) -> list[int]:
        """Members of a quantile in the order of samplers: blocks cut by age first, then run by run."""
        age_cut: list[int] = []
        if ties is TieRule.OLDER_FIRST:
            for k in (quantile + 1, quantile):
                if 0 < k < self._num_quantiles and starts[k] < len(ascending) and starts[k] > 0:
                    value = self._values[ascending[starts[k]]]
                    if self._values[ascending[starts[k] - 1]] == value:
                        block = sorted(
                            id
                            for id, label in self._labels.items()
                            if label == quantile and self._values[id] == value
                        )
                        age_cut += [id for id in block if id not in age_cut]
        return age_cut + [
            id for run in runs for id in run if self._labels[id] == quantile and id not in age_cut
        ]

    @property
    def num_quantiles(self) -> int:
        """Number K of quantiles, empty ones included."""
        return self._num_quantiles

    @property
    def snapshot(self) -> Snapshot:
        """The state of the pool when it was ranked."""
        return self._snapshot

    @property
    def counts(self) -> NDArray[np.int64]:
        """[K] number of samples in each quantile."""
        return np.array([len(members) for members in self._members], dtype=np.int64)

    @property
    def lower_bounds(self) -> NDArray[np.float32]:
        """[K] lowest value in each quantile, NaN for an empty one."""
        return np.array(
            [min((self._values[id] for id in m), default=math.nan) for m in self._members],
            dtype=np.float32,
        )

    @property
    def num_unranked(self) -> int:
        """Number of samples that are in no quantile; removed samples do not count."""
        return self._snapshot.num_samples - self._num_removed - len(self._labels)

    def labels(self) -> NDArray[np.int16]:
        """[N] quantile of each sample in id order, -1 for a sample that is in none."""
        return np.array(
            [self._labels.get(id, -1) for id in range(self._snapshot.num_samples)], dtype=np.int16
        )

    def labels_of(self, ids: NDArray[np.uint64]) -> NDArray[np.int16]:
        """[M] quantiles of the samples with these ids. Raises IndexError for an unknown or removed id."""
        if any(not self._num_removed <= int(id) < self._snapshot.num_samples for id in ids):
            raise IndexError(f"the snapshot holds {self._snapshot.num_samples} samples")
        return np.array([self._labels.get(int(id), -1) for id in ids], dtype=np.int16)

    def only(self, is_kept: NDArray[np.bool_]) -> MemoryQuantization:
        """A copy that drops the samples where ``is_kept`` [N] is false. Raises ValueError for another shape or type."""
        if is_kept.dtype != np.bool_ or is_kept.shape != (self._snapshot.num_samples,):
            raise ValueError(f"is_kept is no vector of {self._snapshot.num_samples} booleans")
        kept = copy.copy(self)
        kept._labels = {id: label for id, label in self._labels.items() if is_kept[id]}
        kept._members = kept._by_age()
        return kept

    def sampler(
        self,
        *,
        batch_size: int,
        seed: int,
        mode: SamplingMode = SamplingMode.STRATIFIED,
        quantiles: Sequence[int] | None = None,
        rank: int = 0,
        world_size: int = 1,
        age_half_life: float | None = None,
        max_uses: int | None = None,
        bucket_window: int = 1,
    ) -> MemorySampler:
        """A stream of minibatches over the ranked samples. Raises ValueError for a setting out of range."""
        wanted = range(self._num_quantiles) if quantiles is None else quantiles
        if any(not 0 <= k < self._num_quantiles for k in wanted):
            raise ValueError(f"quantiles are 0 .. {self._num_quantiles - 1}")
        strata = [(k, self._members[k]) for k in sorted(set(wanted)) if self._members[k]]
        if batch_size < 1 or not strata:
            raise ValueError("batch_size is below 1, or there is nothing to draw from")
        if not 0 <= rank < world_size <= batch_size:
            raise ValueError(f"rank is {rank} of {world_size}, in a batch of {batch_size}")
        if age_half_life is not None and mode is not SamplingMode.STRATIFIED:
            raise ValueError("age_half_life needs the stratified mode")
        if max_uses is not None and (max_uses < 1 or mode is SamplingMode.IID):
            raise ValueError("max_uses is below 1, or the mode draws with replacement")
        if bucket_window < 1:
            raise ValueError("bucket_window is below 1")
        walks = [
            MemoryWalk(scramble(scramble(seed, 1), k), members)
            if age_half_life is None
            else AgedWalk(
                scramble(scramble(seed, 1), k),
                scramble(scramble(seed, 5), k),
                [self._pool.samples([id])[0] for id in members],
                age_weights(age_half_life),
            )
            for k, members in strata
        ]
        if mode is SamplingMode.SHUFFLE:
            walks = [MemoryWalk(scramble(seed, 4), [id for _, members in strata for id in members])]
        return MemorySampler(
            self._pool,
            self._values,
            self._labels,
            strata,
            walks,
            batch_size,
            seed,
            mode,
            slice(rank, None, world_size),
            max_uses,
            bucket_window,
        )
