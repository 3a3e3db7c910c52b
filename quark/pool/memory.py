"""The pool in plain Python, the executable specification of the Rust pool.

It is slow and keeps everything in memory. Its answers define those of the durable pool, including the ids that
samplers draw. Property tests run the same operations on both. ``memory_quantization`` ranks and labels its samples,
``memory_sampler`` draws batches.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterable, Sequence, Sized
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quark.pool.base import RemainderRule, Retained, Sample, SampleBatch, Snapshot, TieRule
from quark.pool.batch import BatchBuffers, PackedBatch, PoolBatch
from quark.pool.columns import REWARD_COLUMN
from quark.pool.memory_quantization import MemoryQuantization
from quark.pool.sample_columns import BATCH_COLUMNS, NUMBER_COLUMNS
from quark.pool.scope import Scope, Score, refuse_remainder, values_of
from quark.pool.scrambling import scramble
from quark.types import FinishReason

_TIER = 8
"""This many runs of one size are merged into a larger one."""


class MemoryPool:
    """A ``SamplePool`` in lists.

    Args:
        vocab_size: token ids are below this.
        store_text: whether to store the text of each completion.
        tie_seed: seed of the hash that orders equal scores.
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
        numbers = {
            column.name: np.asarray(column.values(batch, count), column.dtype)
            for column in BATCH_COLUMNS
        }
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
                    round=batch.round,
                    chunk=batch.chunk,
                    policy_step=batch.policy_step,
                    settings=batch.settings,
                    scores={name: float(values[row]) for name, values in batch.scores.items()},
                    **{name: values[row].item() for name, values in numbers.items()},
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
        """Ids that were appended under ``key``, including removed ones; None for an unknown key."""
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
        """Scores of removed samples."""
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
        return MemoryQuantization(
            self,
            num_quantiles,
            values,
            runs=runs,
            groups=groups,
            tie_seed=self.tie_seed,
            ties=ties,
            remainder=remainder,
        )

    def column(self, name: str) -> NDArray[Any]:
        """[N] a provenance column in id order, with blanks for removed samples. Raises KeyError."""
        column = next((column for column in NUMBER_COLUMNS if column.name == name), None)
        if column is None:
            raise KeyError(name)
        values = [getattr(sample, name) for sample in self._samples[self._num_removed :]]
        return np.array([column.blank] * self._num_removed + values, dtype=column.dtype)

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
            **{column.given: column.values(batch, count) for column in BATCH_COLUMNS},
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
