"""Exploration: prompts to completions to scores to one durable commit per chunk.

A chunk that the pool already has is not generated again: it is the log that a resumed run replays.

Where scoring overlaps, the rewards of a chunk are asked in a thread while this one generates the next chunk.
Everything else stays in this thread and in order: a chunk is committed after the one before it, by one
writer, with the same key and the same bytes.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quark.errors import TrainingError
from quark.evaluation.evaluator import completion_batch
from quark.generation.base import Generator, SamplingConfig
from quark.models.policy import Policy
from quark.pool.base import PromptRecord, SampleBatch, SamplePool
from quark.pool.columns import REWARD_COLUMN
from quark.reference.base import ReferencePolicy
from quark.rewards.base import RewardFunction
from quark.rewards.build import reward_provenance
from quark.rewards.config import RewardConfig
from quark.rewards.scoring import ScoreOutcome, score
from quark.training.loop.background import BackgroundCall
from quark.training.loop.draws import chunk_key
from quark.training.processes.process_group import ProcessGroup
from quark.training.seeds import derive_seed
from quark.types import Completion, Prompt

REFERENCE_BLOCK = 128
"""Samples of a chunk that the original model is run on together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Exploration:
    """What a round of exploration put into the pool."""

    ids: range
    num_replayed: int
    """Samples of it that were already there."""
    num_generated: int
    num_failed: int
    """Freshly scored samples without a score."""
    num_retried: int
    """Calls of the reward that were made again because the one before raised."""
    num_failed_extra: Mapping[str, int]
    """Freshly scored samples that lack a further score, by its column; without those that lack none."""
    messages: tuple[str, ...]
    """What failed scores said, without repetition."""
    num_merged: int
    """Freshly scored samples whose reward float32 does not tell from another one."""
    merged: tuple[float, float] | None
    """Two such rewards."""
    seconds_scoring: float
    """How long the run waited for scores; less than they took where scoring overlaps."""
    spans: tuple[ChunkSpans, ...]
    """Of the chunks that were generated."""
    is_complete: bool
    """False where the run was asked to stop between chunks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkSpans:
    """When a chunk was worked on: (begin, end) in seconds since its exploration began."""

    chunk: int
    generating: tuple[float, float]
    scoring: tuple[float, float]
    committing: tuple[float, float]
    """With the log-probabilities under the original model."""


class Explorer:
    """Fills the pool, chunk by chunk.

    Args:
        run_id: first part of every chunk's key.
        seed: the run's.
        prompts: the training prompts.
        pool: opened for writing by the main process, for reading by the other processes.
        reward: the column ``reward``.
        extra_rewards: further columns by name; a failure of theirs is NaN, never an error.
        reward_config: how failures are handled, and what goes into the provenance.
        sampling: goes into the provenance.
        policy: its tokens tell prompts and completions apart.
        reference: log-probabilities of the samples under the original model.
        stores_text: whether the pool keeps completions' texts.
        chunk_size: completions per commit.
        completions_per_prompt: of each prompt.
        autocast: the context for forward passes.
        overlaps_scoring: ask the rewards of a chunk while the next one is generated.
        processes: the processes; the main process alone scores and commits.
    """

    def __init__(
        self,
        *,
        run_id: str,
        seed: int,
        prompts: Sequence[Prompt],
        pool: SamplePool,
        reward: RewardFunction,
        extra_rewards: Mapping[str, RewardFunction],
        reward_config: RewardConfig,
        sampling: SamplingConfig,
        policy: Policy,
        reference: ReferencePolicy,
        stores_text: bool,
        chunk_size: int,
        completions_per_prompt: int,
        autocast: Callable[[], AbstractContextManager[object]],
        overlaps_scoring: bool,
        processes: ProcessGroup,
    ) -> None:
        self._run_id = run_id
        self._seed = seed
        self._prompts = prompts
        self._pool = pool
        self._reward = reward
        self._extra_rewards = extra_rewards
        self._reward_config = reward_config
        self._settings = json.dumps(
            {
                "sampling": sampling.provenance,
                "reward": dict(reward_provenance(reward)),
            },
            sort_keys=True,
        )
        self._policy = policy
        self._reference = reference
        self._stores_text = stores_text
        self._chunk_size = chunk_size
        self._per_prompt = completions_per_prompt
        self._autocast = autocast
        self._overlaps_scoring = overlaps_scoring
        self._processes = processes

    def explore(
        self,
        generator: Generator,
        *,
        round: int,
        num_prompts: int,
        quantile: int | None,
        policy_step: int,
        on_chunk: Callable[[int, int, Mapping[str, float]], None],
        should_stop: Callable[[], bool],
    ) -> Exploration:
        """Sample, score and commit one round.

        Args:
            generator: of the model that explores.
            round: number of the round.
            num_prompts: prompts to explore; they are walked in a seeded order and repeat if need be.
            quantile: whose token is given; None for none.
            policy_step: optimizer steps taken so far, for the provenance.
            on_chunk: called with (completions done, total, figures) after each commit.
            should_stop: asked between chunks.
        """
        prompts = [p for p in self._choose(round, num_prompts) for _ in range(self._per_prompt)]
        done = _Done()
        waiting: _Generated | None = None
        is_complete = True

        def tell(chunk: int, figures: Mapping[str, float]) -> None:
            on_chunk(min((chunk + 1) * self._chunk_size, len(prompts)), len(prompts), figures)

        def commit(generated: _Generated) -> None:
            tell(generated.chunk, self._commit(generated, done, round, policy_step))

        for chunk, start in enumerate(range(0, len(prompts), self._chunk_size)):
            if should_stop():
                is_complete = False
                break
            part = prompts[start : start + self._chunk_size]
            key = chunk_key(self._run_id, round, chunk)
            ids = self._pool.find(key)
            if ids is not None:
                done.replayed += len(ids)
                done.extend(ids)
                tell(chunk, {})
                continue
            begin = done.elapsed()
            try:
                completions = self._generate(generator, part, round, chunk, quantile)
            except Exception:
                # Commit the chunk that was generated before. Several processes cannot: the others do not
                # know of the failure and would take this exchange for theirs.
                if waiting is not None and self._processes.size == 1:
                    commit(waiting)
                raise
            span = (begin, done.elapsed())
            if waiting is not None:
                commit(waiting)
            waiting = _Generated(
                key=key,
                chunk=chunk,
                completions=completions,
                span=span,
                scoring=self._begin_scoring(completions, done),
            )
            if not self._overlaps_scoring:
                commit(waiting)
                waiting = None
        if waiting is not None:
            commit(waiting)
        return done.exploration(is_complete=is_complete)

    def _choose(self, round: int, count: int) -> list[Prompt]:
        """``count`` prompts: whole passes over all of them, each in its own seeded order."""
        chosen: list[Prompt] = []
        passes = 0
        while len(chosen) < count:
            random = np.random.default_rng(derive_seed(self._seed, "prompts", round, passes))
            order = random.permutation(len(self._prompts))[: count - len(chosen)]
            chosen += [self._prompts[i] for i in order]
            passes += 1
        return chosen

    def _generate(
        self,
        generator: Generator,
        prompts: Sequence[Prompt],
        round: int,
        chunk: int,
        quantile: int | None,
    ) -> list[Completion]:
        with self._autocast():
            return generator.generate(
                prompts, quantile=quantile, seed=derive_seed(self._seed, "explore", round, chunk)
            )

    def _begin_scoring(
        self, completions: Sequence[Completion], done: _Done
    ) -> Callable[[], _Scored]:
        """A call that returns the scores. Where scoring overlaps, it already runs in a thread of the main process."""

        def ask() -> _Scored:
            begin = done.elapsed()
            outcomes = self._ask_rewards(completions)
            return _Scored(outcomes=outcomes, span=(begin, done.elapsed()))

        if not self._overlaps_scoring or not self._processes.is_main_process:
            return ask
        return BackgroundCall(ask, name="scoring").result

    def _commit(
        self, generated: _Generated, done: _Done, round: int, policy_step: int
    ) -> dict[str, float]:
        """Wait for a chunk's scores and append it; returns its figures."""
        begin = done.elapsed()
        scored = self._share_scores(generated.scoring)
        committing = done.elapsed()
        done.seconds_scoring += committing - begin
        outcomes, completions = scored.outcomes, generated.completions
        scores = {name: outcome.scores for name, outcome in outcomes.items()}
        ids = self._append(
            self._batch(generated.key, completions, scores, round, generated.chunk, policy_step)
        )
        done.extend(ids)
        done.generated += len(ids)
        done.failed += outcomes[REWARD_COLUMN].num_failed
        done.retried += outcomes[REWARD_COLUMN].num_retried
        done.merged_count += outcomes[REWARD_COLUMN].num_merged
        done.merged = done.merged or outcomes[REWARD_COLUMN].merged
        done.failed_extra += Counter(
            {n: o.num_failed for n, o in outcomes.items() if n != REWARD_COLUMN}
        )
        for outcome in outcomes.values():
            done.messages.update(dict.fromkeys(outcome.messages))
        done.spans.append(
            ChunkSpans(
                chunk=generated.chunk,
                generating=generated.span,
                scoring=scored.span,
                committing=(committing, done.elapsed()),
            )
        )
        figures = {"tokens": float(sum(len(c.token_ids) for c in completions))}
        rewards = scores[REWARD_COLUMN]
        if np.isfinite(rewards).any():
            figures["reward_mean"] = float(np.nanmean(rewards, dtype=np.float64))
        return figures

    def _append(self, batch: SampleBatch) -> range:
        """Commit in the main process; on return every process sees the samples.

        Raises:
            TrainingError: a process reads other files than the main process writes.
        """

        def commit() -> list[int]:
            ids = self._pool.append(batch)
            return [ids.start, ids.stop]

        ids = range(*self._processes.from_main_process(commit))
        if not self._processes.is_main_process:
            self._pool.refresh()
            if self._pool.find(batch.key) != ids:
                raise TrainingError(
                    f"process {self._processes.rank} does not see in {self._pool.path} what process 0 has "
                    "written: the run directory has to be on a file system that all machines share"
                )
        return ids

    def _share_scores(self, scoring: Callable[[], _Scored]) -> _Scored:
        """All scores of a chunk by column, the reward first, the same in every process.

        The main process alone asks: a reward may be somebody's code that remembers what it saw, or a server
        that counts its calls, and is to be called as often and with the same batches as in one process.
        """

        def plain() -> dict[str, Any]:
            scored = scoring()
            outcomes = {
                name: asdict(outcome) | {"scores": outcome.scores.tolist()}
                for name, outcome in scored.outcomes.items()
            }
            return {"outcomes": outcomes, "span": scored.span}

        shared = self._processes.from_main_process(plain)
        return _Scored(
            outcomes={
                name: ScoreOutcome(
                    **(outcome | {"scores": np.array(outcome["scores"], dtype=np.float32)})
                )
                for name, outcome in shared["outcomes"].items()
            },
            span=tuple(shared["span"]),
        )

    def _ask_rewards(self, completions: Sequence[Completion]) -> dict[str, ScoreOutcome]:
        prompts = [c.prompt.text for c in completions]
        texts = [c.text for c in completions]
        rows = [c.prompt.metadata for c in completions]
        batch_size = self._reward_config.batch_size
        retries = self._reward_config.retries or 0
        outcomes = {
            REWARD_COLUMN: score(
                self._reward,
                prompts,
                texts,
                on_error=self._reward_config.on_error,
                batch_size=batch_size,
                retries=retries,
                rows=rows,
            )
        }
        for name, extra in self._extra_rewards.items():
            outcomes[name] = score(
                extra,
                prompts,
                texts,
                on_error="nan",
                batch_size=batch_size,
                retries=retries,
                rows=rows,
            )
        return outcomes

    def _batch(
        self,
        key: str,
        completions: Sequence[Completion],
        scores: Mapping[str, NDArray[np.float32]],
        round: int,
        chunk: int,
        policy_step: int,
    ) -> SampleBatch:
        records: dict[int, PromptRecord] = {}
        position: dict[int, int] = {}
        for completion in completions:
            prompt = completion.prompt
            if prompt.index not in position:
                position[prompt.index] = len(position)
                records[prompt.index] = PromptRecord(
                    token_ids=np.array(prompt.token_ids, dtype=np.uint32),
                    text=prompt.text,
                    metadata=json.dumps(dict(prompt.metadata), sort_keys=True),
                )
        lengths = [len(c.token_ids) for c in completions]
        return SampleBatch(
            key=key,
            prompts=list(records.values()),
            prompt_index=np.array([position[c.prompt.index] for c in completions], dtype=np.uint32),
            completion_tokens=np.concatenate([c.token_ids for c in completions]).astype(np.uint32),
            completion_offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            completion_texts=[c.text for c in completions] if self._stores_text else None,
            finish_reasons=np.array([int(c.finish_reason) for c in completions], dtype=np.uint8),
            round=round,
            chunk=chunk,
            policy_step=policy_step,
            reward_tokens=np.array(
                [-1 if c.reward_quantile is None else c.reward_quantile for c in completions],
                dtype=np.int16,
            ),
            settings=self._settings,
            seeds=np.array([c.seed for c in completions], dtype=np.uint64),
            logprob_policy=np.array([c.logprob_policy for c in completions], dtype=np.float32),
            logprob_reference=self._reference_logprobs(completions),
            logprob_sampled=self._sampled_logprobs(completions),
            scores=scores,
        )

    def _sampled_logprobs(self, completions: Sequence[Completion]) -> NDArray[np.float32]:
        """Under what they were drawn from; NaN in a pool of an older format, so that its run goes on as it began."""
        if not self._pool.has_sampled_logprobs:
            return np.full(len(completions), np.nan, dtype=np.float32)
        return np.array([c.logprob_sampled for c in completions], dtype=np.float32)

    def _reference_logprobs(self, completions: Sequence[Completion]) -> NDArray[np.float32]:
        """Under p0; this equals ``logprob_policy`` where p0 itself sampled, or the policy is p0."""
        if self._policy.is_frozen or all(c.reward_quantile is None for c in completions):
            return np.array([c.logprob_policy for c in completions], dtype=np.float32)
        size = REFERENCE_BLOCK
        starts = range(0, len(completions), size)
        parts: dict[int, list[float]] = {}
        with self._reference.gathered(), self._autocast():
            for start in starts[self._processes.rank :: self._processes.size]:
                batch = completion_batch(
                    completions[start : start + size], self._policy, quantile=0
                )
                logprobs = self._reference.sequence_logprobs(
                    batch,
                    base_vocab_size=self._policy.reward_tokens.base_vocab_size,
                    is_block=True,
                )
                parts[start] = logprobs.float().cpu().tolist()
        shares = [dict(share) for share in self._processes.gather(list(parts.items()))]
        found = {start: part for share in shares for start, part in share.items()}
        return np.array([value for start in starts for value in found[start]], dtype=np.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scored:
    outcomes: Mapping[str, ScoreOutcome]
    """By column, the reward first."""
    span: tuple[float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Generated:
    """A chunk that is not committed yet."""

    key: str
    chunk: int
    completions: list[Completion]
    span: tuple[float, float]
    scoring: Callable[[], _Scored]


@dataclass(slots=True, kw_only=True)
class _Done:
    """What a round's exploration has come to so far; the fields are those of ``Exploration``."""

    began: float = field(default_factory=time.monotonic)
    ids: range | None = None
    replayed: int = 0
    generated: int = 0
    failed: int = 0
    retried: int = 0
    failed_extra: Counter[str] = field(default_factory=Counter)
    messages: dict[str, None] = field(default_factory=dict)
    merged_count: int = 0
    merged: tuple[float, float] | None = None
    seconds_scoring: float = 0.0
    spans: list[ChunkSpans] = field(default_factory=list)

    def elapsed(self) -> float:
        return time.monotonic() - self.began

    def extend(self, ids: range) -> None:
        self.ids = range(ids.start if self.ids is None else self.ids.start, ids.stop)

    def exploration(self, *, is_complete: bool) -> Exploration:
        return Exploration(
            ids=self.ids or range(0),
            num_replayed=self.replayed,
            num_generated=self.generated,
            num_failed=self.failed,
            num_retried=self.retried,
            num_failed_extra=self.failed_extra,
            messages=tuple(self.messages),
            num_merged=self.merged_count,
            merged=self.merged,
            seconds_scoring=self.seconds_scoring,
            spans=tuple(self.spans),
            is_complete=is_complete,
        )
