"""The second phase of a round: optimizer steps on minibatches of the ranked pool."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass

from quark.config.schema import RunConfig
from quark.evaluation.information import LabelledSamples
from quark.models.policy import Policy
from quark.objectives.base import Objective
from quark.training.loop.brake import is_due, take_note
from quark.training.loop.critic import weakness_of
from quark.training.loop.draws import round_sampler
from quark.training.loop.hooks import WeightHooks
from quark.training.loop.information import InformationMeter
from quark.training.loop.journal import Journal
from quark.training.loop.learner import Learner
from quark.training.loop.round_samples import RoundSamples
from quark.training.position import Position
from quark.training.processes.weights import Weights


@dataclass(frozen=True, slots=True, kw_only=True)
class Learning:
    """The policy and what trains it."""

    policy: Policy
    weights: Weights
    """Where the policy's lie among the processes."""
    objective: Objective
    learner: Learner
    hooks: WeightHooks
    """What else may change or pass on the weights."""
    meter: InformationMeter
    config: RunConfig
    journal: Journal

    def is_done(self, position: Position) -> bool:
        """Whether this round's steps are done, except for those that are left out."""
        return position.step_in_round + position.steps_braked >= self.config.run.steps_per_round

    def learn(
        self,
        samples: RoundSamples,
        held_out: LabelledSamples | None,
        position: Position,
        should_stop: Callable[[], bool],
    ) -> None:
        """Take the rest of this round's optimizer steps.

        Args:
            samples: what the round learns from.
            held_out: what the brake measures; None where nothing is held out.
            position: where the run is; moved on by each step.
            should_stop: asked before every step.

        Raises:
            TrainingError: too many steps in a row were not finite, or memory does not suffice for one sequence.
        """
        here, journal = position, self.journal
        self.hooks.start(samples)
        critic = self.learner.begin_round(samples.pool, samples.quantization, score=samples.score)
        if critic is not None and here.step_in_round == 0:
            journal.write(
                "critic",
                time_s=journal.elapsed(),
                explained=critic.explained,
                num_samples=critic.num_samples,
            )
            is_last = here.round == self.config.run.num_rounds - 1
            weakness = weakness_of(critic, is_last_round=is_last)
            if weakness is not None and self.config.sampling.guide == "critic":
                journal.say(f"round {here.round}: {weakness}")
        if not self.config.trains_weights:
            here.count_idle_steps(self.config.run.steps_per_round)
            return
        sampler = round_sampler(samples.pool, samples.quantization, self.config, here.round)
        if here.step_in_round == 0:
            self._brake(held_out, here)
        while not self.is_done(here) and not should_stop():
            begin = time.monotonic()
            batch = sampler.batch(here.step_in_round, pad_id=self.policy.pad_id)
            step = self.learner.step(batch, here)
            metrics = step.metrics | {
                "tokens_per_s": step.num_tokens / max(time.monotonic() - begin, 1e-9)
            }
            journal.write(
                "step",
                time_s=journal.elapsed(),
                **metrics,
                micro_batch_size=step.micro_batch_size,
                is_skipped=not step.is_finite,
            )
            self.hooks.after_step(here.step)
            here.step += 1
            here.step_in_round += 1
            if step.is_finite:
                here.add(metrics)
            journal.progress(
                "learning",
                done=here.step_in_round,
                total=self.config.run.steps_per_round,
                metrics=metrics,
            )
            self._brake(held_out, here)
        self.weights.require_equal(step=here.step)

    def _brake(self, held_out: LabelledSamples | None, here: Position) -> None:
        """Measure the held-out samples where that is due, and leave steps out where they say so."""
        section = self.config.run
        every, num_steps = section.brake_every_steps, section.steps_per_round
        if every is None or held_out is None or not is_due(here, every=every, num_steps=num_steps):
            return
        figures = self.meter.measure(held_out)
        if figures is None:
            return
        take_note(here, figures.contrast_loss, num_steps=num_steps)
        self.journal.write(
            "held_out", **dataclasses.asdict(figures), steps_braked=here.steps_braked
        )
        if here.steps_braked:
            self.journal.say(
                f"round {here.round}: what the tokens say of held-out samples got worse twice in a row, so the last "
                f"{here.steps_braked} of {num_steps} steps are left out"
            )
