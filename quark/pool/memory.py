"""The pool as a page of plain Python: the executable specification of the Rust one.

Slow and forgetful on purpose. Whatever it answers, the durable pool must answer, ids drawn by samplers
included; property tests drive both with the same operations. Scrambling and permutations repeat
``quark_pool_rs/src/rng.rs``.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from quark.pool.base import (
    RemainderRule,
    Retained,
    Sample,
    SampleBatch,
    SamplingMode,
    Snapshot,
    TieRule,
    age_weights,
)
from quark.pool.batch import BatchBuffers, PackedBatch, PoolBatch
from quark.pool.columns import REWARD_COLUMN
from quark.pool.scope import (
    LOGPROB_COLUMNS,
    PROVENANCE_COLUMNS,
    Scope,
    Score,
    refuse_remainder,
    values_of,
)
from quark.types import FinishReason

_BatchT = TypeVar("_BatchT", bound=PoolBatch | PackedBatch)

_MASK = (1 << 64) - 1
_TIER = 8


def mix64(z: int) -> int:
    """The finalizer of splitmix64: a bijection of 64 bits."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & _MASK
    return z ^ (z >> 31)


def scramble(seed: int, value: int) -> int:
    """A hash of ``value`` (modulo 2**64) under ``seed``; bijective in ``value``."""
    return mix64(mix64((seed + 0x9E3779B97F4A7C15) & _MASK) ^ (value & _MASK))


def permute(n: int, key: int, i: int) -> int:
    """Where ``i`` goes in the keyed permutation of 0 .. n-1: a Feistel network walked into the range."""
    bits = max((n - 1).bit_length(), 6)
    low_bits = bits // 2
    low_mask, high_mask = (1 << low_bits) - 1, (1 << (bits - low_bits)) - 1
    while True:
        low, high = i & low_mask, i >> low_bits
        for number in range(0, 6, 2):
            low ^= scramble((key + number) & _MASK, high) & low_mask
            high ^= scramble((key + number + 1) & _MASK, low) & high_mask
        i = high << low_bits | low
        if i < n:
            return i


class MemoryPool:
    """A ``SamplePool`` in lists.

    Args:
        vocab_size: token ids are below this.
        store_text: whether completions carry their text.
        tie_seed: of the hash that cuts blocks of equal scores.
    """

    def __init__(self, *, vocab_size: int, store_text: bool = True, tie_seed: int = 0) -> None:
        self._vocab_size = vocab_size
        self._store_text = store_text
        self.tie_seed = tie_seed
        self._samples: list[Sample] = []
        self._prompts: dict[tuple[bytes, str, str], int] = {}
        self._keys: dict[str, range] = {}
        self._columns: dict[str, list[float]] = {}
        self._runs: dict[str, list[tuple[int, list[int]]]] = {}
        self._drafts: dict[str, list[float]] = {}
        self._sources: dict[str, str] = {}
        self._draft_runs: dict[str, list[tuple[int, list[int]]]] = {}
        self._num_changes = 0
        self._num_removed = 0
        self._hash = hashlib.sha256()

    @property
    def path(self) -> Path | None:
        """None: the pool is not on disk."""
        return None

    @property
    def snapshot(self) -> Snapshot:
        """The current state; each append and each other change counts as one commit."""
        return Snapshot(
            generation=len(self._keys) + self._num_changes,
            hash=self._hash.hexdigest(),
            num_samples=len(self),
        )

    @property
    def score_columns(self) -> tuple[str, ...]:
        """Names of the published score columns."""
        return tuple(self._columns)

    @property
    def num_removed(self) -> int:
        """Number of samples that ``retain`` removed so far."""
        return self._num_removed

    @property
    def has_sampled_logprobs(self) -> bool:
        """Always true: every sample has the column."""
        return True

    def __len__(self) -> int:
        return len(self._samples)

    def append(self, batch: SampleBatch) -> range:
        """Check and add ``batch`` and return its ids; a known key adds nothing and returns its first ids."""
        if batch.key in self._keys:
            return self._keys[batch.key]
        self._check(batch)
        first, count = len(self), len(batch.prompt_index)
        ids = range(first, first + count)
        prompt_ids = [
            self._prompts.setdefault(
                (p.token_ids.astype(np.uint32).tobytes(), p.text, p.metadata), len(self._prompts)
            )
            for p in batch.prompts
        ]
        for row, id in enumerate(ids):
            which = int(batch.prompt_index[row])
            prompt = batch.prompts[which]
            begin, end = batch.completion_offsets[row : row + 2]
            self._samples.append(
                Sample(
                    id=id,
                    prompt_id=prompt_ids[which],
                    prompt_text=prompt.text,
                    prompt_tokens=prompt.token_ids.astype(np.uint32),
                    prompt_metadata=prompt.metadata,
                    completion_tokens=batch.completion_tokens[begin:end].astype(np.uint32),
                    completion_text=(
                        batch.completion_texts[row]
                        if self._store_text and batch.completion_texts is not None
                        else None
                    ),
                    finish_reason=int(batch.finish_reasons[row]),
                    round=batch.round,
                    chunk=batch.chunk,
                    policy_step=batch.policy_step,
                    reward_token=int(batch.reward_tokens[row]),
                    settings=batch.settings,
                    seed=int(batch.seeds[row]),
                    logprob_policy=float(batch.logprob_policy[row]),
                    logprob_reference=float(batch.logprob_reference[row]),
                    logprob_sampled=float(batch.logprob_sampled[row]),
                    scores={name: float(values[row]) for name, values in batch.scores.items()},
                )
            )
        for name, values in batch.scores.items():
            column = self._columns.setdefault(name, [])
            column += [math.nan] * (first - len(column)) + [float(v) for v in values]
            self._add_run(self._runs.setdefault(name, []), column, ids)
        self._keys[batch.key] = ids
        self._hash.update(batch.key.encode())
        return ids

    def find(self, key: str) -> range | None:
        """Ids that were appended under ``key``, removed ones included; None for an unknown key."""
        return self._keys.get(key)

    def draft_end(self, name: str) -> int | None:
        """The length of a draft, removed samples included; None without a draft."""
        return len(self._drafts[name]) if name in self._drafts else None

    def draft_source(self, name: str) -> str | None:
        """The ``source`` that a draft was begun with; None without a draft."""
        return self._sources.get(name)

    def draft_scores(
        self, name: str, first: int, scores: NDArray[np.float32], *, source: str = "{}"
    ) -> None:
        """Append scores [M] to a draft. Raises ValueError for a gap, an overlap or another source."""
        end = len(self._drafts.get(name, self._blank))
        if first != end or not 0 < len(scores) <= len(self) - first:
            raise ValueError(f"the draft of {name!r} goes on at {end}")
        if self._sources.setdefault(name, source) != source:
            raise ValueError(f"the draft of {name!r} is made by {self._sources[name]}")
        draft = self._drafts.setdefault(name, self._blank)
        draft += [float(score) for score in scores]
        ids = range(first, first + len(scores))
        self._add_run(self._draft_runs.setdefault(name, []), draft, ids)
        self._changed("draft", name)

    def publish_scores(self, name: str) -> None:
        """Turn a draft into a score column. Raises ValueError unless it covers every sample."""
        if self.draft_end(name) != len(self):
            raise ValueError(f"the draft of {name!r} does not cover every sample")
        self._columns[name] = self._drafts.pop(name)
        self._runs[name] = self._draft_runs.pop(name)
        del self._sources[name]
        self._samples = [
            replace(sample, scores={**sample.scores, name: self._columns[name][sample.id]})
            for sample in self._samples
        ]
        self._changed("publish", name)

    def discard_scores(self, name: str) -> None:
        """Delete a draft. Raises ValueError if there is none."""
        if name not in self._drafts:
            raise ValueError(f"there is no draft of {name!r}")
        del self._drafts[name], self._draft_runs[name], self._sources[name]
        self._changed("discard", name)

    def retain(
        self,
        *,
        max_samples: int | None = None,
        max_rounds: int | None = None,
        before_round: int | None = None,
        dry_run: bool = False,
    ) -> Retained:
        """Remove the oldest appends that exceed a limit. Raises ValueError without a limit, or for a maximum of 0."""
        if max_samples is None and max_rounds is None and before_round is None:
            raise ValueError("nothing says what is to stay")
        if max_samples == 0 or max_rounds == 0:
            raise ValueError("something has to stay")
        appends = [ids for ids in self._keys.values() if ids.start >= self._num_removed]
        rounds = [self._samples[ids.start].round for ids in appends]
        oldest_round = before_round or 0
        if max_rounds is not None and rounds:
            oldest_round = max(oldest_round, sorted(set(rounds))[-max_rounds:][0])
        num_old = len(list(itertools.takewhile(lambda round: round < oldest_round, rounds[:-1])))
        limit = len(self) if max_samples is None else max_samples
        num_many = sum(len(self) - ids.start > limit for ids in appends[:-1])
        gone = appends[: max(num_old, num_many)]
        end = gone[-1].stop if gone else self._num_removed
        retained = Retained(num_appends=len(gone), num_samples=sum(map(len, gone)), num_removed=end)
        if gone and not dry_run:
            self._remove_before(end)
        return retained

    def _remove_before(self, end: int) -> None:
        self._num_removed = end
        for column in (*self._columns.values(), *self._drafts.values()):
            column[:end] = self._blank
        for of_column in (self._runs, self._draft_runs):
            for name, runs in of_column.items():
                left = [(level, [id for id in ids if id >= end]) for level, ids in runs]
                of_column[name] = [(level, ids) for level, ids in left if ids]
        self._num_changes += 1
        self._hash.update(f"retain {end}".encode())

    @property
    def _blank(self) -> list[float]:
        """Scores of what was removed."""
        return [math.nan] * self._num_removed

    def refresh(self) -> Snapshot:
        """Return the current snapshot; there is no newer commit to move to."""
        return self.snapshot

    def quantize(
        self,
        num_quantiles: int,
        *,
        score: Score = REWARD_COLUMN,
        scope: Scope | None = None,
        ties: TieRule = TieRule.HASH,
        remainder: RemainderRule = RemainderRule.SPREAD,
    ) -> MemoryQuantization:
        """Rank the samples and cut the ranking into ``num_quantiles``. Raises KeyError and ValueError."""
        if num_quantiles < 1:
            raise ValueError(f"num_quantiles is {num_quantiles}; at least 1 is needed")
        for name in [score] if isinstance(score, str) else score.columns:
            if name not in self._columns:
                raise KeyError(name)
        scope = scope or Scope()
        refuse_remainder(scope, remainder)
        values = [float(value) for value in values_of(self, score, scope)]
        runs = None
        if isinstance(score, str) and scope.is_everything:
            runs = [list(ids) for _, ids in self._runs[score]]
        groups = [sample.prompt_id for sample in self._samples] if scope.per_prompt else None
        return MemoryQuantization(self, num_quantiles, values, runs, groups, ties, remainder)

    def column(self, name: str) -> NDArray[Any]:
        """[N] a provenance column in id order, with blanks for removed samples. Raises KeyError."""
        if name not in PROVENANCE_COLUMNS:
            raise KeyError(name)
        dtypes = {
            "finish_reason": np.uint8,
            "reward_token": np.int16,
            "seed": np.uint64,
        } | dict.fromkeys(LOGPROB_COLUMNS, np.float32)
        values = [getattr(sample, name) for sample in self._samples[self._num_removed :]]
        blanks = {"reward_token": -1} | dict.fromkeys(LOGPROB_COLUMNS, math.nan)
        blank = [blanks.get(name, 0)] * self._num_removed
        return np.array(blank + values, dtype=dtypes.get(name, np.uint32))

    def scores(self, name: str) -> NDArray[np.float32]:
        """[N] a score column in id order, NaN where a sample has no score. Raises KeyError."""
        column = self._columns[name]
        return np.array(column + [math.nan] * (len(self) - len(column)), dtype=np.float32)

    def samples(self, ids: Sequence[int]) -> list[Sample]:
        """The samples with these ids, in the order given. Raises IndexError for an unknown or removed id."""
        if any(not self._num_removed <= id < len(self) for id in ids):
            raise IndexError(f"the pool holds the samples {self._num_removed} to {len(self) - 1}")
        return [self._samples[id] for id in ids]

    def gather(
        self, ids: NDArray[np.uint64], *, pad_id: int, out: BatchBuffers | None = None
    ) -> PoolBatch:
        """The samples with these ids as a padded batch, without quantiles and scores. Raises IndexError."""
        samples = self.samples([int(id) for id in ids])
        prompts = [s.prompt_tokens for s in samples]
        completions = [s.completion_tokens for s in samples]
        prompt_width = max((len(tokens) for tokens in prompts), default=0)
        completion_width = max((len(tokens) for tokens in completions), default=0)
        prompt_tokens = np.full((len(ids), prompt_width), pad_id, np.int64)
        completion_tokens = np.full((len(ids), completion_width), pad_id, np.int64)
        for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            prompt_tokens[i, prompt_tokens.shape[1] - len(prompt) :] = prompt
            completion_tokens[i, : len(completion)] = completion
        batch = PoolBatch(
            ids=np.asarray(ids, dtype=np.uint64),
            quantiles=np.full(len(ids), -1, dtype=np.int16),
            prompt_tokens=prompt_tokens,
            prompt_lengths=np.array([len(p) for p in prompts], dtype=np.int32),
            completion_tokens=completion_tokens,
            completion_lengths=np.array([len(c) for c in completions], dtype=np.int32),
            scores=np.full(len(ids), math.nan, dtype=np.float32),
        )
        return batch if out is None else out.copied(batch)

    def gather_packed(
        self, ids: NDArray[np.uint64], *, out: BatchBuffers | None = None
    ) -> PackedBatch:
        """The samples with these ids as flat arrays with offsets. Raises IndexError."""
        samples = self.samples([int(id) for id in ids])
        prompts = [s.prompt_tokens for s in samples]
        completions = [s.completion_tokens for s in samples]
        batch = PackedBatch(
            ids=np.asarray(ids, dtype=np.uint64),
            quantiles=np.full(len(ids), -1, dtype=np.int16),
            prompt_tokens=np.concatenate([np.empty(0, np.int64), *prompts], dtype=np.int64),
            prompt_offsets=np.cumsum([0, *map(len, prompts)], dtype=np.int64),
            completion_tokens=np.concatenate([np.empty(0, np.int64), *completions], dtype=np.int64),
            completion_offsets=np.cumsum([0, *map(len, completions)], dtype=np.int64),
            scores=np.full(len(ids), math.nan, dtype=np.float32),
        )
        return batch if out is None else out.copied(batch)

    def close(self) -> None:
        """Do nothing: there is no file or lock to give back."""
        pass

    def _changed(self, what: str, name: str) -> None:
        self._num_changes += 1
        self._hash.update(f"{what} {name} {self.draft_end(name)}".encode())

    def _add_run(
        self, runs: list[tuple[int, list[int]]], column: list[float], ids: Iterable[int]
    ) -> None:
        run = self._ranked(column, [id for id in ids if not math.isnan(column[id])])
        if run:
            runs.append((0, run))
        while len(runs) >= _TIER and len({level for level, _ in runs[-_TIER:]}) == 1:
            level = runs[-1][0] + 1
            members = [id for _, ids_of in runs[-_TIER:] for id in ids_of]
            runs[-_TIER:] = [(level, self._ranked(column, members))]

    def _ranked(self, column: list[float], ids: Sequence[int]) -> list[int]:
        # -0.0 == 0.0 already; the hash is bijective in the id, so the order is total.
        return sorted(ids, key=lambda id: (-column[id], scramble(self.tie_seed, id)))

    def _check(self, batch: SampleBatch) -> None:
        count = len(batch.prompt_index)
        offsets = batch.completion_offsets
        if count == 0:
            raise ValueError("a batch holds at least one sample")
        if len(offsets) != count + 1 or offsets[0] != 0 or (np.diff(offsets) < 0).any():
            raise ValueError("completion_offsets does not fit the batch")
        if offsets[-1] != len(batch.completion_tokens):
            raise ValueError("completion_offsets does not end where the tokens do")
        per_sample: dict[str, Sized] = {
            "finish_reasons": batch.finish_reasons,
            "reward_tokens": batch.reward_tokens,
            "seeds": batch.seeds,
            "logprob_policy": batch.logprob_policy,
            "logprob_reference": batch.logprob_reference,
            "logprob_sampled": batch.logprob_sampled,
            **{f"scores[{name!r}]": values for name, values in batch.scores.items()},
        }
        for name, values in per_sample.items():
            if len(values) != count:
                raise ValueError(f"{name} has {len(values)} entries for {count} samples")
        tokens = [batch.completion_tokens, *(p.token_ids for p in batch.prompts)]
        if any(len(t) and int(t.max()) >= self._vocab_size for t in tokens):
            raise ValueError(f"a token id is outside the vocabulary of {self._vocab_size}")
        if (batch.finish_reasons > max(FinishReason)).any():
            raise ValueError("finish_reasons are 0 (unknown), 1 (stop) and 2 (length)")
        if (batch.reward_tokens < -1).any():
            raise ValueError("reward_tokens are -1 (none) or quantiles")
        if (batch.prompt_index >= len(batch.prompts)).any():
            raise ValueError("prompt_index names a prompt that the batch does not have")


class MemoryQuantization:
    """The ranking of a ``MemoryPool``, cut."""

    def __init__(
        self,
        pool: MemoryPool,
        num_quantiles: int,
        values: list[float],
        runs: list[list[int]] | None,
        groups: list[int] | None,
        ties: TieRule,
        remainder: RemainderRule,
    ) -> None:
        """``runs`` number the members of a quantile; without runs their ids do. ``groups`` are ranked apart."""
        self._pool = pool
        self._num_quantiles = num_quantiles
        self._values = values
        self._snapshot = pool.snapshot
        self._num_removed = pool.num_removed
        ranked = [id for id, value in enumerate(values) if not math.isnan(value)]

        def worst_first(id: int) -> tuple[float, int]:
            tie = -id if ties is TieRule.OLDER_FIRST else -scramble(pool.tie_seed, id)
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
                # The block that the boundary cuts goes up as a whole.
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
        """Members of a quantile as samplers number them: blocks cut by age first, then run by run."""
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


class MemoryWalk:
    """``members`` without replacement, epoch by epoch."""

    def __init__(self, key: int, members: Sequence[int]) -> None:
        self._key = key
        self._members = members

    @property
    def size(self) -> int:
        """Turns of an epoch."""
        return len(self._members)

    def at(self, turn: int) -> int:
        """The sample of a turn."""
        epoch, place = divmod(turn, self.size)
        return self._members[permute(self.size, scramble(self._key, epoch), place)]


class AgedWalk(MemoryWalk):
    """Epochs that take a quota of each round; see ``quark.pool.base.Sampler``."""

    def __init__(
        self, key: int, round_key: int, samples: Sequence[Sample], weights: list[int]
    ) -> None:
        rounds = sorted({sample.round for sample in samples}, reverse=True)
        weight = 0
        turns: list[tuple[int, int]] = []  # of an epoch: which round, and how many of it before
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
        """Id of the sample at ``turn``: the quotas choose its round, the round's own walk the sample."""
        number, taken = self._turns[super().at(turn)]
        epoch = turn // self.size
        return self._rounds[number].at(epoch * self._quotas[number] + taken)


class MemorySampler:
    """Batch t takes the slots t B .. (t + 1) B - 1 of an endless sequence."""

    def __init__(
        self,
        pool: MemoryPool,
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
        """Ids of a batch, after those of its window were dealt by length."""
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
            # Round by round of turns, while quantiles drop out.
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
    """Batches in turn, made when they are asked for."""

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
