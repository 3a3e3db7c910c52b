"""One optimizer step: loss and gradient of a batch, part by part, and the update of the weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, replace

import numpy as np
import torch

from quark.config.schema import RunConfig
from quark.data.collate import collate
from quark.models.batch import TrainingBatch
from quark.models.policy import Policy
from quark.models.token_critic import TokenCritic, strengths_of
from quark.objectives.base import Loss, Objective
from quark.objectives.tilt import TokenTilt
from quark.pool.base import PoolBatch, Quantization, SamplePool
from quark.pool.columns import REWARD_COLUMN
from quark.pool.scope import Score
from quark.reference.base import ReferencePolicy
from quark.training.loop.alerts import Alert
from quark.training.loop.critic import fit_critic
from quark.training.loop.draws import columns_of, trained_part
from quark.training.loop.guards import count_skipped_step, is_finite_step
from quark.training.loop.optimization import learning_rate, make_optimizer
from quark.training.loop.settling import settle_reward_tokens
from quark.training.position import Position
from quark.training.processes.memory import memory_needed_for
from quark.training.processes.process_group import ProcessGroup
from quark.training.processes.weights import Weights
from quark.training.seeds import derive_seed


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One optimizer step, in nats per completion token."""

    metrics: dict[str, float]
    is_finite: bool
    """False where the step was skipped."""
    num_tokens: int
    micro_batch_size: int
    """Sequences that were run at once, at most."""


class Learner:
    """Turns minibatches into optimizer steps.

    Args:
        config: the effective configuration.
        policy: is trained.
        reference: p0.
        objective: the loss.
        autocast: the context for forward passes.
        processes: the processes that share every batch.
        weights: where the policy's lie among them.
        on_warning: told of a step that is skipped.
        on_alert: told of memory that did not suffice.
    """

    def __init__(
        self,
        *,
        config: RunConfig,
        policy: Policy,
        reference: ReferencePolicy,
        objective: Objective,
        autocast: Callable[[], AbstractContextManager[object]],
        processes: ProcessGroup,
        weights: Weights,
        on_warning: Callable[[str], None],
        on_alert: Callable[[Alert], None],
    ) -> None:
        self._config = config
        self._section = config.optimizer
        self._seed = config.run.seed
        self._steps_per_round = config.run.steps_per_round
        self._num_steps = config.run.num_rounds * config.run.steps_per_round
        self._policy = policy
        self._reference = reference
        self._objective = objective
        self._autocast = autocast
        self._processes = processes
        self._weights = weights
        self._on_warning = on_warning
        self._on_alert = on_alert
        self.optimizer = make_optimizer(policy.model, config.optimizer)

    def begin_round(
        self, pool: SamplePool, quantization: Quantization, *, score: Score = REWARD_COLUMN
    ) -> TokenCritic | None:
        """Let the objective see the snapshot that the steps from here on learn from, and fit the critic to it.

        Args:
            pool: the snapshot.
            quantization: its ranking, of held-out samples too.
            score: what it is ranked by.

        Returns:
            The critic, which is the policy's from here on; None if neither the objective nor sampling wants one.
        """
        objective = self._objective
        objective.begin_round(columns_of(pool, objective.pool_columns, score=score))
        if not self._config.needs_critic:
            return None
        with self._reference.gathered():
            found = self._processes.from_main_process(
                lambda: fit_critic(
                    pool,
                    trained_part(pool, quantization, self._config),
                    self._reference.causal.model,
                    base_vocab_size=self._policy.reward_tokens.base_vocab_size,
                    within_prompts=self._config.pool.per_prompt,
                    score=score,
                ).as_lists()
            )
        critic = TokenCritic.from_lists(found)
        self._policy.critics.critic = critic
        if objective.tilt_strength is not None:
            strengths = strengths_of(objective.tilt_strength, quantization.num_quantiles)
            objective.take_tilt(TokenTilt(scores=critic.scores, strengths=strengths))
        return critic

    def step(self, samples: PoolBatch, position: Position) -> Step:
        """Train on one minibatch, or skip it where its loss or gradient is not finite.

        Args:
            samples: the whole minibatch, the same in every process.
            position: where the run is; skipped steps and a smaller micro-batch are recorded in it.

        Raises:
            TrainingError: too many skipped steps in a row, or too little memory for one sequence or the update.
        """
        section, policy, processes = self._section, self._policy, self._processes
        num_sequences, num_tokens = len(samples.ids), int(samples.completion_lengths.sum())
        # Any partition would do: the sum over the processes is the batch's.
        mine = _rows(samples, slice(processes.rank, None, processes.size))
        with memory_needed_for("running the original model", setting="sampling.max_new_tokens"):
            self._reference.prepare(samples.ids.tolist())
        batch = self._collated(samples, mine, position)
        outputs, micro = self._gradient(batch, position, num_sequences, num_tokens)
        names = outputs[0].sums.keys()
        sums = processes.sums(
            {
                "loss": sum(float(output.loss.detach()) for output in outputs),
                **{name: sum(output.sums[name] for output in outputs) for name in names},
            }
        )
        loss = sums.pop("loss")
        figures = self._objective.figures(
            sums,
            num_sequences=num_sequences,
            num_tokens=num_tokens,
            num_quantiles=policy.reward_tokens.num_quantiles,
        )
        self._weights.sum_gradients()
        grad_norm = self._weights.clip_gradients(section.max_grad_norm or math.inf)
        # Steps that rounds left out count: the schedule is that of the rounds.
        scheduled = position.round * self._steps_per_round + position.step_in_round
        rate = learning_rate(section, scheduled, self._num_steps)
        coefficients = self._objective.state_dict()
        is_finite = is_finite_step(loss, grad_norm)
        if is_finite:
            position.skipped_in_a_row = 0
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            # It cannot be redone: some weights may have been changed already.
            with memory_needed_for("the optimizer's moments", setting="model"):
                self._update()
            self._objective.after_step(sums, num_sequences=num_sequences)
        else:
            self.optimizer.zero_grad(set_to_none=True)
            self._on_warning(
                count_skipped_step(
                    position,
                    loss=loss,
                    grad_norm=grad_norm,
                    max_skipped_steps=section.max_skipped_steps,
                )
            )
        self._weights.release()
        return Step(
            metrics={
                "loss": loss,
                **figures,
                "grad_norm": grad_norm,
                "learning_rate": rate,
                **coefficients,
            },
            is_finite=is_finite,
            num_tokens=num_tokens,
            micro_batch_size=micro,
        )

    def _collated(self, samples: PoolBatch, mine: PoolBatch, position: Position) -> TrainingBatch:
        """This process's share of a minibatch as tensors, with the fields that the objective asks for."""
        policy, processes = self._policy, self._processes
        batch = collate(
            mine, policy.reward_tokens.ids, policy.pad_id, policy.device, sample_ids=mine.ids
        )
        fields = self._objective.fields(
            samples.ids,
            samples.quantiles,
            reward_tokens=policy.reward_tokens.ids,
            seed=derive_seed(self._seed, "contrast", position.step),
        )
        assert fields.keys() <= set(self._objective.batch_fields), "an objective names its fields"
        tensors = {
            name: torch.from_numpy(
                np.ascontiguousarray(values[processes.rank :: processes.size])
            ).to(policy.device)
            for name, values in fields.items()
        }
        return replace(batch, **tensors)

    def settle(self, batches: Sequence[PoolBatch], position: Position) -> list[float]:
        """Shift the reward tokens' vectors to where they cost least; see ``settle_reward_tokens``.

        Args:
            batches: samples of the original model, the same in every process.
            position: where the run is; its micro-batch size holds here, too.

        Returns:
            KL(p0 || pi) before each step, in nats a token.

        Raises:
            TrainingError: too little memory.
        """
        policy, section = self._policy, self._section
        sizes = position.micro_batch_size, section.micro_batch_size, section.batch_size
        size = min(size for size in sizes if size is not None)

        def shifted() -> tuple[list[float], list[list[float]]]:
            costs = settle_reward_tokens(
                policy,
                self._reference,
                [
                    collate(batch, policy.reward_tokens.ids, policy.pad_id, policy.device)
                    for batch in batches
                ],
                rate=section.settling_rate,
                micro_batches=lambda batch: self._objective.micro_batches(
                    batch, math.ceil(batch.num_sequences / size)
                ),
                autocast=self._autocast,
            )
            return costs, policy.reward_vectors.float().tolist()

        with memory_needed_for("settling the tokens", setting="optimizer.micro_batch_size"):
            costs, vectors = self._processes.from_main_process(shifted)
        found: list[float] = costs
        policy.reward_vectors.copy_(torch.tensor(vectors))
        return found

    def _gradient(
        self, batch: TrainingBatch, position: Position, num_sequences: int, num_tokens: int
    ) -> tuple[list[Loss], int]:
        """Losses of the parts of ``batch``, their gradients added up, and the size of the parts.

        ``num_sequences`` and ``num_tokens`` are those of all processes' batches together. They have the
        same size of parts, so that they run out of memory and go on as one.
        """
        largest = math.ceil(num_sequences / self._processes.size)
        wanted = position.micro_batch_size, self._section.micro_batch_size, largest
        size = min(size for size in wanted if size is not None)

        def attempt(size: int) -> list[Loss]:
            self.optimizer.zero_grad(set_to_none=True)
            parts = self._objective.micro_batches(batch, math.ceil(batch.num_sequences / size))
            num_passes = self._weights.num_passes(len(parts))
            if num_passes > len(parts):
                parts = batch.split(num_passes)
            with self._policy.dropping(
                derive_seed(self._seed, "dropout", position.step, self._processes.rank)
            ):
                outputs = [self._backward(part, num_sequences, num_tokens) for part in parts]
                # This process has fewer sequences than passes. The extra passes have weight zero and keep collectives aligned.
                for _ in range(num_passes - len(parts)):
                    self._backward(parts[0], num_sequences, num_tokens, share=0.0)
                return outputs

        def on_smaller(smaller: int, reason: str) -> None:
            # Kept for the rest of the run and in its checkpoints: a resumed run splits alike.
            position.micro_batch_size = smaller
            self._on_alert(
                Alert(
                    kind="out_of_memory",
                    text=f"step {position.step} ran out of memory ({reason}): it is run again and the run "
                    f"goes on with optimizer.micro_batch_size = {smaller}",
                    value=smaller,
                )
            )

        return self._weights.run(attempt, size, on_smaller=on_smaller)

    def _backward(
        self, part: TrainingBatch, num_sequences: int, num_tokens: int, *, share: float = 1.0
    ) -> Loss:
        with self._autocast():
            output = self._objective(
                self._policy,
                self._reference,
                part,
                num_sequences=num_sequences,
                num_tokens=num_tokens,
            )
        loss = output.loss if share == 1.0 else share * output.loss
        loss.backward()  # type: ignore[no-untyped-call]
        return output

    def _update(self) -> None:
        """The optimizer's step, lengthened for the reward tokens' vectors.

        Adam's step does not depend on the gradient's scale, so a longer step is a larger learning rate.
        """
        scale = self._section.reward_token_lr_scale
        if scale == 1.0:
            self.optimizer.step()
            return
        vectors = self._weights.reward_vectors
        before = vectors.clone()
        self.optimizer.step()
        vectors.copy_(before + scale * (vectors - before))


def _rows(samples: PoolBatch, rows: slice) -> PoolBatch:
    """Some rows of a minibatch."""
    return PoolBatch(**{f.name: getattr(samples, f.name)[rows] for f in fields(PoolBatch)})
