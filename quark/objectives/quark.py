"""Quark's objective: reward-conditioned likelihood with an exact KL penalty to the reference.

Section 2 of Lu et al. 2022: maximize, over samples (x, y) of quantile k,
log pi(y | x, r_k) - kl_coef * sum_t KL(p0(. | y_<t, x) || pi(. | y_<t, x, r_k)).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Self

from pydantic import Field, model_validator
from torch import Tensor

from quark.models.batch import TrainingBatch
from quark.models.causal import CompletionModel
from quark.models.logprobs import LossWeights, weighted_loss
from quark.models.policy import Policy
from quark.objectives.controllers import AdaptiveCoefficient, Coefficient, FixedCoefficient
from quark.settings import Settings


class KLDirection(StrEnum):
    """Which divergence is penalized."""

    REFERENCE_TO_POLICY = "kl_reference_to_policy"
    """KL(p0 || pi), the paper's: mass-covering."""
    POLICY_TO_REFERENCE = "kl_policy_to_reference"
    """KL(pi || p0), the published code's: mode-seeking."""


class Reduction(StrEnum):
    """How token losses become one number."""

    SEQUENCE_SUM = "sequence_sum"
    """Sum over each sequence, mean over sequences (the paper)."""
    TOKEN_MEAN = "token_mean"
    """Mean over all completion tokens (the published code): long completions weigh more."""


class LMSoftmax(StrEnum):
    """Over which columns the likelihood is normalized."""

    BASE = "base"
    """The base vocabulary: the distribution that is sampled from."""
    ENLARGED = "enlarged"
    """All columns, reward tokens included (the published code)."""


class QuarkObjectiveConfig(Settings):
    """The terms of the loss."""

    kl_coef: float = Field(0.05, ge=0.0)
    """Weight of the KL penalty; the first value where ``kl_target`` is set."""
    kl_direction: KLDirection = KLDirection.REFERENCE_TO_POLICY
    """Which divergence is penalized; both are always reported."""
    kl_target: float | None = Field(None, gt=0.0)
    """Adapt ``kl_coef``, which then begins above 0, so that the penalized KL becomes this many nats a sequence; unset keeps it fixed."""
    kl_horizon: float = Field(2500.0, gt=0.0)
    """Slowness of that adaptation, in sequences."""
    entropy_coef: float = Field(0.0, ge=0.0)
    """Weight of the entropy bonus (the published code: 0.06)."""
    entropy_target: float | None = Field(None, gt=0.0)
    """Adapt ``entropy_coef``, which then begins above 0, so that the entropy becomes this many nats a sequence; unset keeps it fixed."""
    entropy_horizon: float = Field(2500.0, gt=0.0)
    """Slowness of that adaptation, in sequences."""
    reduction: Reduction = Reduction.SEQUENCE_SUM
    """How token losses become one number."""
    lm_softmax: LMSoftmax = LMSoftmax.BASE
    """Over which columns the likelihood is normalized. KL and entropy are over the base vocabulary."""
    length_groups: int = Field(3, ge=1)
    """Run a batch in at least this many parts of similar length, so that less padding is computed and less memory
    taken. The loss is the same. A batch without padding is not divided for it."""

    @model_validator(mode="after")
    def _targets_can_be_reached(self) -> Self:
        for name in ("kl", "entropy"):
            if getattr(self, f"{name}_target") is not None and not getattr(self, f"{name}_coef"):
                raise ValueError(
                    f"{name}_target adapts {name}_coef by factors, and {name}_coef is 0: give it a first value above "
                    f"0, or leave {name}_target out"
                )
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class LossOutput:
    """The loss of one (micro-)batch and what it is made of."""

    loss: Tensor
    """Scalar with gradient; micro-batch losses add up to the whole batch's."""
    lm_loss: float
    """Sum of -log pi over the tokens, in nats."""
    kl_reference_to_policy: float
    """Sum of KL(p0 || pi) over the tokens, in nats."""
    kl_policy_to_reference: float
    """Sum of KL(pi || p0) over the tokens, in nats."""
    entropy: float
    """Sum of H(pi) over the tokens, in nats."""
    num_tokens: int
    """Tokens in these sums."""


class QuarkObjective:
    """Computes the loss; holds the coefficients where they adapt."""

    def __init__(self, config: QuarkObjectiveConfig) -> None:
        self.config = config
        self.kl_coefficient: Coefficient = FixedCoefficient(config.kl_coef)
        if config.kl_target is not None:
            self.kl_coefficient = AdaptiveCoefficient(
                config.kl_coef, target=config.kl_target, horizon=config.kl_horizon
            )
        self.entropy_coefficient: Coefficient = FixedCoefficient(config.entropy_coef)
        if config.entropy_target is not None:
            self.entropy_coefficient = AdaptiveCoefficient(
                config.entropy_coef,
                target=config.entropy_target,
                horizon=config.entropy_horizon,
                grows_when="below",
            )

    def __call__(
        self,
        policy: Policy,
        reference: CompletionModel,
        batch: TrainingBatch,
        *,
        num_sequences: int,
        num_tokens: int,
    ) -> LossOutput:
        """The loss of ``batch``, a part of an effective batch of the given size.

        Args:
            policy: gradients reach it alone.
            reference: p0.
            batch: a (micro-)batch.
            num_sequences: sequences in the whole effective batch, over all micro-batches and workers.
            num_tokens: completion tokens in it.
        """
        scale = 1.0 / (
            num_sequences if self.config.reduction is Reduction.SEQUENCE_SUM else num_tokens
        )
        kl = self.kl_coefficient.value * scale
        forward = self.config.kl_direction is KLDirection.REFERENCE_TO_POLICY
        weights = LossWeights(
            lm=scale,
            kl_reference_to_policy=kl if forward else 0.0,
            kl_policy_to_reference=0.0 if forward else kl,
            entropy=self.entropy_coefficient.value * scale,
        )
        loss, sums = weighted_loss(
            policy.completion_rows(batch),
            reference.completion_rows(batch),
            batch.targets,
            weights,
            base_vocab_size=policy.reward_tokens.base_vocab_size,
            lm_uses_all_columns=self.config.lm_softmax is LMSoftmax.ENLARGED,
        )
        lm_loss, kl_forward, kl_backward, entropy = sums.tolist()
        return LossOutput(
            loss=loss,
            lm_loss=lm_loss,
            kl_reference_to_policy=kl_forward,
            kl_policy_to_reference=kl_backward,
            entropy=entropy,
            num_tokens=batch.num_tokens,
        )

    def parts(self, batch: TrainingBatch, num_parts: int) -> list[TrainingBatch]:
        """``batch`` in at least ``num_parts`` parts, for one call and one backward pass each."""
        groups = self.config.length_groups if batch.has_padding else 1
        return batch.split(max(num_parts, groups))

    def update_coefficients(
        self,
        *,
        kl_reference_to_policy: float,
        kl_policy_to_reference: float,
        entropy: float,
        num_sequences: int,
    ) -> None:
        """Let the coefficients adapt to one optimizer step.

        Args:
            kl_reference_to_policy: sum over the step's tokens, in nats, like the next two.
            kl_policy_to_reference: sum over the step's tokens.
            entropy: sum over the step's tokens.
            num_sequences: sequences of the step.
        """
        forward = self.config.kl_direction is KLDirection.REFERENCE_TO_POLICY
        kl = kl_reference_to_policy if forward else kl_policy_to_reference
        self.kl_coefficient.update(kl / num_sequences, num_sequences=num_sequences)
        self.entropy_coefficient.update(entropy / num_sequences, num_sequences=num_sequences)

    def state_dict(self) -> dict[str, float]:
        """The coefficients, as plain numbers."""
        return {
            "kl_coef": self.kl_coefficient.value,
            "entropy_coef": self.entropy_coefficient.value,
        }

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.kl_coefficient.load_state_dict({"value": state["kl_coef"]})
        self.entropy_coefficient.load_state_dict({"value": state["entropy_coef"]})
