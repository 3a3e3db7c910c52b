"""One optimizer step: loss and gradient of a batch, part by part, and the update of the weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields

import torch

from quark.config.schema import RunConfig
from quark.data.collate import collate
from quark.models.batch import TrainingBatch
from quark.models.policy import Policy
from quark.objectives.quark import LossOutput, QuarkObjective
from quark.pool.base import PoolBatch
from quark.reference.base import ReferencePolicy
from quark.training.alerts import Alert
from quark.training.distributed import Team
from quark.training.guards import (
    count_skipped_step,
    is_finite_step,
    memory_needed_for,
    run_within_memory,
)
from quark.training.optimization import learning_rate, make_optimizer
from quark.training.position import Position
from quark.training.seeds import derive_seed

_SUMS = ("lm_loss", "kl_reference_to_policy", "kl_policy_to_reference", "entropy")
"""Figures of a ``LossOutput`` that are sums over its tokens."""


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
        team: the processes that share every batch.
        on_warning: told of a step that is skipped.
        on_alert: told of memory that did not suffice.
    """

    def __init__(
        self,
        *,
        config: RunConfig,
        policy: Policy,
        reference: ReferencePolicy,
        objective: QuarkObjective,
        autocast: Callable[[], AbstractContextManager[object]],
        team: Team,
        on_warning: Callable[[str], None],
        on_alert: Callable[[Alert], None],
    ) -> None:
        self._section = config.optimizer
        self._seed = config.run.seed
        self._num_steps = config.run.num_rounds * config.run.steps_per_round
        self._policy = policy
        self._reference = reference
        self._objective = objective
        self._autocast = autocast
        self._team = team
        self._on_warning = on_warning
        self._on_alert = on_alert
        self.optimizer = make_optimizer(policy.model, config.optimizer)

    def step(self, samples: PoolBatch, position: Position) -> Step:
        """Train on one minibatch, or skip it where its loss or gradient is not finite.

        Args:
            samples: the whole minibatch, the same in every process.
            position: where the run is; skipped steps and a smaller micro-batch are recorded in it.

        Raises:
            TrainingError: too many skipped steps in a row, or too little memory for one sequence or the update.
        """
        section, policy, team = self._section, self._policy, self._team
        num_sequences, num_tokens = len(samples.ids), int(samples.completion_lengths.sum())
        # Any partition would do: the sum over the processes is the batch's.
        mine = _rows(samples, slice(team.rank, None, team.size))
        with memory_needed_for("running the original model", setting="sampling.max_new_tokens"):
            self._reference.prepare(samples.ids.tolist())
        batch = collate(
            mine, policy.reward_tokens.ids, policy.pad_id, policy.device, sample_ids=mine.ids
        )
        outputs, micro = self._gradient(batch, position, num_sequences, num_tokens)
        sums = team.sums(
            {
                "loss": sum(float(output.loss.detach()) for output in outputs),
                **{name: sum(getattr(output, name) for output in outputs) for name in _SUMS},
            }
        )
        loss = sums.pop("loss")
        # Its copies of gradients come after the parts' memory was given back; it is not redone.
        with memory_needed_for("summing the gradients", setting="model"):
            team.sum_gradients([p for p in policy.model.parameters() if p.requires_grad])
        parameters = [p for p in policy.model.parameters() if p.grad is not None]
        bound = section.max_grad_norm or math.inf
        grad_norm = float(torch.nn.utils.clip_grad_norm_(parameters, bound))
        rate = learning_rate(section, position.step, self._num_steps)
        coefficients = self._objective.state_dict()
        is_finite = is_finite_step(loss, grad_norm)
        if is_finite:
            position.skipped_in_a_row = 0
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            # It cannot be redone: some weights may have been changed already.
            with memory_needed_for("the optimizer's moments", setting="model"):
                self._update()
            self._objective.update_coefficients(
                kl_reference_to_policy=sums["kl_reference_to_policy"],
                kl_policy_to_reference=sums["kl_policy_to_reference"],
                entropy=sums["entropy"],
                num_sequences=num_sequences,
            )
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
        return Step(
            metrics={
                "loss": loss,
                **{name: value / num_tokens for name, value in sums.items()},
                "grad_norm": grad_norm,
                "learning_rate": rate,
                **coefficients,
            },
            is_finite=is_finite,
            num_tokens=num_tokens,
            micro_batch_size=micro,
        )

    def _gradient(
        self, batch: TrainingBatch, position: Position, num_sequences: int, num_tokens: int
    ) -> tuple[list[LossOutput], int]:
        """Losses of the parts of ``batch``, their gradients added up, and the size of the parts.

        ``num_sequences`` and ``num_tokens`` are those of all processes' batches together. They have the
        same size of parts, so that they run out of memory and go on as one.
        """
        largest = math.ceil(num_sequences / self._team.size)
        size = min(position.micro_batch_size or self._section.micro_batch_size or largest, largest)

        def attempt(size: int) -> list[LossOutput]:
            self.optimizer.zero_grad(set_to_none=True)
            with self._policy.dropping(
                derive_seed(self._seed, "dropout", position.step, self._team.rank)
            ):
                return [
                    self._backward(part, num_sequences, num_tokens)
                    for part in self._objective.parts(batch, math.ceil(batch.num_sequences / size))
                ]

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

        def agree(reason: str | None) -> str | None:
            return next((r for r in self._team.gather(reason) if r is not None), None)

        return run_within_memory(attempt, size, on_smaller=on_smaller, agree=agree)

    def _backward(self, part: TrainingBatch, num_sequences: int, num_tokens: int) -> LossOutput:
        with self._autocast():
            output = self._objective(
                self._policy,
                self._reference,
                part,
                num_sequences=num_sequences,
                num_tokens=num_tokens,
            )
        output.loss.backward()  # type: ignore[no-untyped-call]
        return output

    def _update(self) -> None:
        """The optimizer's step, lengthened for the reward tokens' vectors.

        Adam's step does not depend on the gradient's scale, so a longer step is a larger learning rate.
        """
        scale = self._section.reward_token_lr_scale
        if scale == 1.0:
            self.optimizer.step()
            return
        vectors = self._policy.reward_vectors
        before = vectors.clone()
        self.optimizer.step()
        vectors.copy_(before + scale * (vectors - before))


def _rows(samples: PoolBatch, rows: slice) -> PoolBatch:
    """Some rows of a minibatch."""
    return PoolBatch(**{f.name: getattr(samples, f.name)[rows] for f in fields(PoolBatch)})
