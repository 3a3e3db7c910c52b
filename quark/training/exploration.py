"""Exploration: prompts to completions to scores to one durable commit per chunk.

A chunk that the pool already has is not generated again: it is the log that a resumed run replays.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quark.errors import TrainingError
from quark.evaluation.evaluator import completion_batch
from quark.generation.base import Generator, SamplingConfig
from quark.models.policy import Policy
from quark.pool.base import PromptRecord, SampleBatch, SamplePool
from quark.reference.base import ReferencePolicy
from quark.rewards.base import RewardFunction
from quark.rewards.build import reward_provenance
from quark.rewards.config import RewardConfig
from quark.rewards.scoring import ScoreOutcome, score
from quark.training.distributed import Team
from quark.training.draws import REWARD_COLUMN, chunk_key
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
    seconds_scoring: float
    is_complete: bool
    """False where the run was asked to stop between chunks."""


class Explorer:
    """Fills the pool, chunk by chunk.

    Args:
        run_id: first part of every chunk's key.
        seed: the run's.
        prompts: the training prompts.
        pool: opened for writing by the lead, for reading by the other processes.
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
        team: the processes; the lead alone scores and commits.
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
        team: Team,
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
                "sampling": sampling.model_dump(mode="json"),
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
        self._team = team

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
        begin: int | None = None
        end = replayed = generated = failed = retried = 0
        seconds_scoring = 0.0
        failed_extra: Counter[str] = Counter()
        messages: dict[str, None] = {}
        is_complete = True
        for chunk, start in enumerate(range(0, len(prompts), self._chunk_size)):
            if should_stop():
                is_complete = False
                break
            part = prompts[start : start + self._chunk_size]
            key = chunk_key(self._run_id, round, chunk)
            figures: dict[str, float] = {}
            ids = self._pool.find(key)
            if ids is not None:
                replayed += len(ids)
            else:
                completions = self._generate(generator, part, round, chunk, quantile)
                scoring = time.monotonic()
                outcomes = self._score(completions)
                seconds_scoring += time.monotonic() - scoring
                scores = {name: outcome.scores for name, outcome in outcomes.items()}
                batch = self._batch(key, completions, scores, round, chunk, policy_step)
                ids = self._append(batch)
                rewards = scores[REWARD_COLUMN]
                failed += outcomes[REWARD_COLUMN].num_failed
                retried += outcomes[REWARD_COLUMN].num_retried
                failed_extra += Counter(
                    {n: o.num_failed for n, o in outcomes.items() if n != REWARD_COLUMN}
                )
                for outcome in outcomes.values():
                    messages.update(dict.fromkeys(outcome.messages))
                generated += len(ids)
                if np.isfinite(rewards).any():
                    figures["reward_mean"] = float(np.nanmean(rewards))
                figures["tokens"] = float(sum(len(c.token_ids) for c in completions))
            begin = ids.start if begin is None else begin
            end = ids.stop
            on_chunk(min(start + self._chunk_size, len(prompts)), len(prompts), figures)
        return Exploration(
            ids=range(begin or 0, end),
            num_replayed=replayed,
            num_generated=generated,
            num_failed=failed,
            num_retried=retried,
            num_failed_extra=failed_extra,
            messages=tuple(messages),
            seconds_scoring=seconds_scoring,
            is_complete=is_complete,
        )

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

    def _append(self, batch: SampleBatch) -> range:
        """Commit in the lead; on return every process sees the samples.

        Raises:
            TrainingError: a process reads other files than the lead writes.
        """

        def commit() -> list[int]:
            ids = self._pool.append(batch)
            return [ids.start, ids.stop]

        ids = range(*self._team.from_lead(commit))
        if not self._team.is_lead:
            self._pool.refresh()
            if self._pool.find(batch.key) != ids:
                raise TrainingError(
                    f"process {self._team.rank} does not see in {self._pool.path} what process 0 has "
                    "written: the run directory has to be on a file system that all machines share"
                )
        return ids

    def _score(self, completions: Sequence[Completion]) -> dict[str, ScoreOutcome]:
        """All scores of a chunk by column, the reward first, the same in every process.

        The lead alone asks: a reward may be somebody's code that remembers what it saw, or a server
        that counts its calls, and is to be called as often and with the same batches as in one process.
        """

        def ask() -> dict[str, dict[str, Any]]:
            return {
                name: asdict(outcome) | {"scores": outcome.scores.tolist()}
                for name, outcome in self._ask_rewards(completions).items()
            }

        return {
            name: ScoreOutcome(**(plain | {"scores": np.array(plain["scores"], dtype=np.float32)}))
            for name, plain in self._team.from_lead(ask).items()
        }

    def _ask_rewards(self, completions: Sequence[Completion]) -> dict[str, ScoreOutcome]:
        prompts = [c.prompt.text for c in completions]
        texts = [c.text for c in completions]
        batch_size = self._reward_config.batch_size
        outcomes = {
            REWARD_COLUMN: score(
                self._reward,
                prompts,
                texts,
                on_error=self._reward_config.on_error,
                batch_size=batch_size,
                retries=self._reward_config.retries or 0,
            )
        }
        for name, extra in self._extra_rewards.items():
            outcomes[name] = score(extra, prompts, texts, on_error="nan", batch_size=batch_size)
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
            scores=scores,
        )

    def _reference_logprobs(self, completions: Sequence[Completion]) -> NDArray[np.float32]:
        """Under p0; where p0 itself sampled without truncation this equals ``logprob_policy``."""
        if all(c.reward_quantile is None for c in completions):
            return np.array([c.logprob_policy for c in completions], dtype=np.float32)
        size = REFERENCE_BLOCK
        starts = range(0, len(completions), size)
        parts: dict[int, list[float]] = {}
        for start in starts[self._team.rank :: self._team.size]:
            batch = completion_batch(completions[start : start + size], self._policy, quantile=0)
            with self._autocast():
                logprobs = self._reference.sequence_logprobs(
                    batch,
                    base_vocab_size=self._policy.reward_tokens.base_vocab_size,
                    is_block=True,
                )
            parts[start] = logprobs.float().cpu().tolist()
        shares = [dict(share) for share in self._team.gather(list(parts.items()))]
        found = {start: part for share in shares for start, part in share.items()}
        return np.array([value for start in starts for value in found[start]], dtype=np.float32)
