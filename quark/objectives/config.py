"""The configuration of the objective. Imports no torch, so reading a configuration stays fast."""

from __future__ import annotations

from enum import StrEnum
from typing import Self

from pydantic import Field, model_validator

from quark.settings import Settings


class AdvantageScope(StrEnum):
    """Among which samples the advantage ranks."""

    PROMPT = "prompt"
    """The completions of one prompt in one round."""
    ROUND = "round"
    """All samples of one round."""


class KLDirection(StrEnum):
    """The divergence that is penalized."""

    REFERENCE_TO_POLICY = "kl_reference_to_policy"
    """KL(p0 || pi), the paper's: mass-covering."""
    POLICY_TO_REFERENCE = "kl_policy_to_reference"
    """KL(pi || p0), the published code's: mode-seeking."""


class Reduction(StrEnum):
    """How token losses are reduced to one number."""

    SEQUENCE_SUM = "sequence_sum"
    """Sum over each sequence, mean over sequences (the paper)."""
    TOKEN_MEAN = "token_mean"
    """Mean over all completion tokens (the published code): long completions weigh more."""


class LMSoftmax(StrEnum):
    """The columns over which the likelihood is normalized."""

    BASE = "base"
    """The base vocabulary: the distribution that is sampled from."""
    ENLARGED = "enlarged"
    """All columns, reward tokens included (the published code)."""


class KLTokens(StrEnum):
    """Reward tokens under which a sample's KL is penalized."""

    OWN = "own"
    """Those that it learns under: the token of its quantile, and with an advantage the best one."""
    ALL = "all"
    """Those that it is contrasted with, too."""


class QuarkObjectiveConfig(Settings):
    """The terms of the loss."""

    lm_coef: float = Field(1.0, ge=0.0)
    """Weight of the conditioned likelihood. 1 is the paper."""
    contrast_coef: float = Field(0.0, ge=0.0)
    """Weight of the contrast between each sample's own reward token and others. 0 is the paper."""
    contrast_tokens: int = Field(1, ge=1)
    """Number of other tokens that each sample is contrasted with, drawn again in every step; at
    most K - 1."""
    contrast_temperature: float = Field(1.0, gt=0.0)
    """Divides the log-probabilities of sequences in the contrast."""
    kl_tokens: KLTokens = KLTokens.OWN
    """Reward tokens under which the KL is penalized: ``own`` are those that a sample trains under,
    ``all`` also those that it is contrasted with."""
    advantage_coef: float = Field(0.0, ge=0.0)
    """Weight of the quantile advantage: the sample's rank, standardized, times its log-probability under the best
    token. 0 is the paper."""
    advantage_scope: AdvantageScope = AdvantageScope.PROMPT
    """Samples among which the advantage ranks: ``prompt``, the completions of one prompt in one
    round, or ``round``, all samples of one round."""
    ratio_clip: float = Field(1.0, gt=0.0)
    """A sample with a negative advantage is weighted by pi(y) over its sampling probability, at
    most this. A sample that the policy no longer writes then stops contributing (TOPR, Le Roux et
    al. 2025)."""
    unlikelihood_coef: float = Field(0.0, ge=0.0)
    """Weight of the token-level unlikelihood of tokens that came earlier in prompt or completion
    (Welleck et al. 2020), under the tokens that a sample learns under. 1 is the paper's "Quark +
    unlikelihood", 0 leaves it out."""
    tilt_coef: float = Field(0.0, ge=0.0)
    """Weight of KL(q || pi), where q is the original model tilted along the token critic: a ridge
    regression of the samples' ranks on their tokens, which every round fits to the pool. 0 is the
    paper."""
    tilt_strength: float = Field(3.0, gt=0.0)
    """Tilt of the best token: the nats that a vocabulary entry's log-probability gains for each
    standard deviation of rank that the critic expects of it. The worst token gets its negative, the
    others lie between."""
    tilt_best_share: float = Field(0.5, ge=0.0, le=1.0)
    """Share of a minibatch's samples that learn the best token's tilt. The others learn that of
    their own quantile's token."""
    kl_coef: float = Field(0.05, ge=0.0)
    """Weight of the KL penalty; the initial value if ``kl_target`` is set."""
    kl_direction: KLDirection = KLDirection.REFERENCE_TO_POLICY
    """The divergence that is penalized; both are always reported."""
    kl_target: float | None = Field(None, gt=0.0)
    """Adapt ``kl_coef``, which must then start above 0, so that the penalized KL reaches this many
    nats per sequence; unset keeps it fixed."""
    kl_horizon: float = Field(2500.0, gt=0.0)
    """Slowness of that adaptation, in sequences."""
    entropy_coef: float = Field(0.0, ge=0.0)
    """Weight of the entropy bonus (the published code: 0.06)."""
    entropy_target: float | None = Field(None, gt=0.0)
    """Adapt ``entropy_coef``, which must then start above 0, so that the entropy reaches this many
    nats per sequence; unset keeps it fixed."""
    entropy_horizon: float = Field(2500.0, gt=0.0)
    """Slowness of that adaptation, in sequences."""
    reduction: Reduction = Reduction.SEQUENCE_SUM
    """How token losses are reduced to one number."""
    lm_softmax: LMSoftmax = LMSoftmax.BASE
    """The columns over which the likelihood is normalized. KL and entropy are over the base
    vocabulary."""
    length_groups: int = Field(3, ge=1)
    """Run a batch in at least this many parts of similar length, to save padding and memory. The
    loss is the same. A batch without padding is not divided."""

    @property
    def learns_rewards(self) -> bool:
        """Whether a term depends on the rewards."""
        return bool(self.lm_coef or self.contrast_coef or self.advantage_coef or self.tilt_coef)

    @model_validator(mode="after")
    def _has_base_likelihoods(self) -> Self:
        if self.lm_softmax is LMSoftmax.ENLARGED and (self.contrast_coef or self.advantage_coef):
            raise ValueError(
                "contrast_coef and advantage_coef weigh the distributions that are sampled from: leave "
                'lm_softmax at "base"'
            )
        return self

    @model_validator(mode="after")
    def _targets_can_be_reached(self) -> Self:
        for name in ("kl", "entropy"):
            if getattr(self, f"{name}_target") is not None and not getattr(self, f"{name}_coef"):
                raise ValueError(
                    f"{name}_target adapts {name}_coef by factors, and {name}_coef is 0: give it a first value above "
                    f"0, or leave {name}_target out"
                )
        return self
