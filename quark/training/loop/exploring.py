"""The first phase of a round: the pool is brought to where the round's learning begins."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from quark.config.schema import PoolSection, RunSection
from quark.generation.base import Generator
from quark.pool.native import NativePool
from quark.rewards.scoring import merged_message
from quark.training.loop.exploration import Exploration, Explorer
from quark.training.loop.frozen_standards import FrozenStandards
from quark.training.loop.journal import Journal
from quark.training.loop.round_samples import RoundSamples, reward_version
from quark.training.position import Position
from quark.training.processes.memory import memory_needed_for


@dataclass(frozen=True, slots=True, kw_only=True)
class Exploring:
    """The pool and what fills it."""

    pool: NativePool
    """Opened for writing by process 0, for reading by the other processes."""
    explorer: Explorer
    original: Generator
    """Samples from p0 without a token, in round 0."""
    policy: Generator
    """Samples from the policy under the best token."""
    run: RunSection
    ranking: PoolSection
    standards: FrozenStandards
    journal: Journal

    def explore(self, position: Position, should_stop: Callable[[], bool]) -> Exploration:
        """Explore this round; chunks that are committed already are replayed.

        Args:
            position: where the run is.
            should_stop: asked between chunks.

        Raises:
            RewardError: the reward failed and ``reward.on_error`` is ``fail``.
            TrainingError: memory does not suffice.
        """
        is_first = position.round == 0
        begin = time.monotonic()
        tokens = 0.0

        def on_chunk(done: int, total: int, figures: Mapping[str, float]) -> None:
            nonlocal tokens
            tokens += figures.get("tokens", 0.0)
            shown = {k: v for k, v in figures.items() if k != "tokens"}
            elapsed = time.monotonic() - begin
            if tokens and elapsed > 0:
                shown["tokens_per_s"] = tokens / elapsed
            self.journal.progress("exploring", done=done, total=total, metrics=shown)

        with memory_needed_for("sampling", setting="sampling.batch_size"):
            exploration = self.explorer.explore(
                self.original if is_first else self.policy,
                round=position.round,
                num_prompts=self.run.prompts_first_round
                if is_first
                else self.run.prompts_per_round,
                quantile=None if is_first else self.ranking.num_quantiles - 1,
                policy_step=position.step - position.step_in_round,
                on_chunk=on_chunk,
                should_stop=should_stop,
            )
        self._tell(exploration)
        return exploration

    def rank(self, exploration: Exploration) -> RoundSamples:
        """What the round learns from.

        Raises:
            TrainingError: the pool lacks the snapshot, or nothing in it can be ranked.
        """
        samples = RoundSamples.of(
            self.pool.path,
            exploration.ids,
            self.ranking,
            ensemble_of=self.standards.ensemble_of,
        )
        if samples.reward_version != reward_version(self.pool):
            self.journal.warn(
                f"round {self.journal.round} learns by the scores that its samples had when it began; later rounds "
                "learn by those that were made since"
            )
        return samples

    def _tell(self, exploration: Exploration) -> None:
        journal, generated = self.journal, exploration.num_generated
        which = f"round {journal.round}"
        if exploration.num_replayed and generated:
            journal.say(
                f"{which}: {exploration.num_replayed} samples were in the pool already, {generated} were generated"
            )
        detail = "; ".join(exploration.messages[:3])
        retried = exploration.num_retried
        if retried:
            journal.warn(
                f"{which}: the reward raised and was called again "
                f"{'once' if retried == 1 else f'{retried} times'} ({detail})"
            )
        if exploration.num_failed:
            journal.warn(
                f"{which}: {exploration.num_failed} of {generated} samples got no score and are kept unranked ({detail})"
            )
        merged = merged_message(
            exploration.num_merged, generated - exploration.num_failed, exploration.merged
        )
        if merged is not None:
            journal.warn_once("merged scores", f"{which}: {merged}")
        for name, num_failed in exploration.num_failed_extra.items():
            journal.warn(
                f"{which}: {num_failed} of {generated} samples got no score {name!r} ({detail})"
            )
