"""Quark's objective: reward-conditioned likelihood, a contrast between reward tokens, and an exact KL penalty.

Section 2 of Lu et al. 2022: maximize, over samples (x, y) of quantile k,
log pi(y | x, r_k) - kl_coef * sum_t KL(p0(. | y_<t, x) || pi(. | y_<t, x, r_k)).

Two further terms are not in the paper. The contrast minimizes -log P(k | x, y), where P(j | x, y) is
proportional to pi(y | x, r_j) ** (1 / contrast_temperature) over the own token and some others: the
label that the policy itself would give the sample (compare GeDi, Krause et al. 2020). log(1 +
contrast_tokens) minus it is the InfoNCE bound on the mutual information between reward token and
completion, in nats. Its gradient scales the likelihood's, sequence by sequence: by 1 - P(k) under
the own token and by -P(j) under another. The quantile advantage weighs log pi(y | x, r_best) by the
sample's standardized rank, with a clipped importance ratio where that is negative.

The unlikelihood (Welleck et al. 2020), which the paper adds for the repetition task, minimizes
sum_t sum_c -log(1 - pi(c | y_<t, x, r_k)) over the tokens c != y_t of prompt and completion before y_t.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quark.models.batch import TrainingBatch
from quark.models.causal import CompletionModel
from quark.models.logprobs import LossWeights, Tilt, token_nll, weighted_loss
from quark.models.policy import Policy
from quark.objectives.advantages import COLUMNS, Advantages
from quark.objectives.base import Columns, Objective
from quark.objectives.config import (
    KLDirection,
    KLTokens,
    LMSoftmax,
    QuarkObjectiveConfig,
    Reduction,
)
from quark.objectives.controllers import AdaptiveCoefficient, Coefficient, FixedCoefficient
from quark.objectives.tilt import TokenTilt


@dataclass(frozen=True, slots=True, kw_only=True)
class LossOutput:
    """The loss of one (micro-)batch and its parts."""

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
    unlikelihood_loss: float
    """Sum of -log(1 - pi) of earlier tokens, over the tokens, in nats; 0 without it."""
    tilt_loss: float
    """Sum of KL(q || pi) over the tokens, in nats; 0 without a tilt."""
    num_tokens: int
    """Tokens in these sums."""
    contrast_loss: float
    """Sum of -log P(k | x, y) over the sequences, in nats; 0 without a contrast."""
    advantage_loss: float
    """Sum of -advantage * log pi(y | x, best token) over the sequences, clipped ratios included; 0 without it."""

    @property
    def sums(self) -> dict[str, float]:
        """All that are sums over tokens or sequences, by name."""
        return {name: getattr(self, name) for name in (*_TOKEN_SUMS, *_SEQUENCE_SUMS)}


_ALWAYS = ("lm_loss", "kl_reference_to_policy", "kl_policy_to_reference", "entropy")
_TOKEN_SUMS = (*_ALWAYS, "unlikelihood_loss", "tilt_loss")
"""Figures of a ``LossOutput`` that are sums over its tokens, and those that every step reports."""
_SEQUENCE_SUMS = ("contrast_loss", "advantage_loss")
"""Figures that are sums over its sequences."""


class QuarkObjective(Objective):
    """Computes the loss; holds the coefficients if they adapt."""

    def __init__(self, config: QuarkObjectiveConfig) -> None:
        self.config = config
        self._advantages: Advantages | None = None
        self._tilt: TokenTilt | None = None
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
            lm=self.config.lm_coef * scale,
            kl_reference_to_policy=kl if forward else 0.0,
            kl_policy_to_reference=0.0 if forward else kl,
            entropy=self.entropy_coefficient.value * scale,
            unlikelihood=self.config.unlikelihood_coef * scale,
            tilt=self.config.tilt_coef * scale,
        )
        base_vocab_size = policy.reward_tokens.base_vocab_size
        contrast = advantage = 0.0
        compares = batch.other_tokens is not None or batch.advantages is not None
        if weights.tilt and not (self.config.lm_coef or compares):
            loss, sums = self._tilted(policy, reference, batch, weights)
        else:
            rest = replace(weights, tilt=0.0)
            if compares:
                loss, sums, contrast, advantage = self._under_several_tokens(
                    policy, reference, batch, rest, 1.0 / num_sequences
                )
            else:
                loss, sums = weighted_loss(
                    policy.completion_rows(batch),
                    reference.completion_rows(batch),
                    batch.targets,
                    rest,
                    base_vocab_size=base_vocab_size,
                    lm_uses_all_columns=self.config.lm_softmax is LMSoftmax.ENLARGED,
                    earlier=batch.earlier_tokens() if weights.unlikelihood else None,
                )
            if weights.tilt:
                alone = LossWeights(
                    lm=0.0,
                    kl_reference_to_policy=0.0,
                    kl_policy_to_reference=0.0,
                    entropy=0.0,
                    tilt=weights.tilt,
                )
                tilt_loss, tilt_sums = self._tilted(policy, reference, batch, alone)
                loss, sums = loss + tilt_loss, torch.cat([sums[:5], tilt_sums[5:]])
        lm_loss, kl_forward, kl_backward, entropy, unlikelihood, tilt = sums.tolist()
        return LossOutput(
            loss=loss,
            lm_loss=lm_loss,
            kl_reference_to_policy=kl_forward,
            kl_policy_to_reference=kl_backward,
            entropy=entropy,
            unlikelihood_loss=unlikelihood,
            tilt_loss=tilt,
            num_tokens=batch.num_tokens,
            contrast_loss=contrast,
            advantage_loss=advantage,
        )

    def _tilted(
        self,
        policy: Policy,
        reference: CompletionModel,
        batch: TrainingBatch,
        weights: LossWeights,
    ) -> tuple[Tensor, Tensor]:
        """The loss of every sequence under the token whose tilt it learns, and its sums [6]."""
        assert self._tilt is not None, "a round begins with it"
        assert batch.tilt_tokens is not None, "they come with it"
        ids = torch.tensor(policy.reward_tokens.ids, device=batch.targets.device)
        quantiles = torch.searchsorted(ids, batch.tilt_tokens)
        row_of_token = batch.token_index // batch.completion_tokens.shape[1]
        return weighted_loss(
            policy.completion_rows(replace(batch, reward_tokens=batch.tilt_tokens)),
            reference.completion_rows(batch),
            batch.targets,
            weights,
            base_vocab_size=policy.reward_tokens.base_vocab_size,
            earlier=batch.earlier_tokens() if weights.unlikelihood else None,
            tilt=Tilt(
                scores=torch.from_numpy(self._tilt.scores).to(ids.device),
                strengths=torch.from_numpy(self._tilt.strengths).to(ids.device)[quantiles][
                    row_of_token
                ],
            ),
        )

    def _under_several_tokens(
        self,
        policy: Policy,
        reference: CompletionModel,
        batch: TrainingBatch,
        weights: LossWeights,
        scale: float,
    ) -> tuple[Tensor, Tensor, float, float]:
        """The loss with contrast and advantage, the sums [6] under the first token, and these two terms' own sums.

        One pass of the policy over every sequence under each of its tokens: its own, the best, and
        the others. Contrast and advantage depend on the completion's log-probabilities S alone, and
        d loss / d S is known from the values of S. So their gradient reaches the logits as a weight
        of each sequence's likelihood.
        """
        config, base_vocab_size = self.config, policy.reward_tokens.base_vocab_size
        tokens = []
        has_own = config.lm_coef > 0.0 or batch.other_tokens is not None
        if has_own:
            tokens.append(batch.reward_tokens)
        if batch.advantages is not None:
            tokens.append(torch.full_like(batch.reward_tokens, policy.reward_tokens.best))
        num_learnt = len(tokens)
        if batch.other_tokens is not None:
            tokens += batch.other_tokens.T
        everything = batch.under(torch.stack(tokens))
        rows = policy.completion_rows(everything)
        nll = token_nll(rows, everything.targets, base_vocab_size=base_vocab_size)
        # Else autocast, before torch 2.11 or so, gives the head's weights again as it cast them here: without gradient.
        torch.clear_autocast_cache()
        losses = torch.stack([batch.sum_by_sequence(part) for part in nll.view(len(tokens), -1)])
        pull = torch.zeros_like(losses)  # the weight of each sequence's -log pi
        value = losses.new_zeros(())
        contrast = advantage = 0.0
        if has_own:
            pull[0] += weights.lm
            value = value + (weights.lm * losses[0]).sum()
        if batch.other_tokens is not None:
            rivals = [0, *range(num_learnt, len(tokens))]
            log_posterior = torch.log_softmax(-losses[rivals] / config.contrast_temperature, dim=0)
            factor = -log_posterior.exp()
            factor[0] += 1.0
            pull[rivals] += config.contrast_coef * scale / config.contrast_temperature * factor
            terms = -log_posterior[0].sum()
            value = value + config.contrast_coef * scale * terms
            contrast = float(terms)
        if batch.advantages is not None:
            assert batch.sampled_logprobs is not None, "they come together"
            best = num_learnt - 1
            ratio = torch.exp(-losses[best] - batch.sampled_logprobs).clamp(max=config.ratio_clip)
            ratio = ratio.nan_to_num(nan=1.0)  # imported samples may not say how likely they were
            kept = batch.advantages * torch.where(batch.advantages < 0.0, ratio, 1.0)
            pull[best] += config.advantage_coef * scale * kept
            terms = (kept * losses[best]).sum()
            value = value + config.advantage_coef * scale * terms
            advantage = float(terms)
        original = reference.completion_rows(batch)
        earlier = batch.earlier_tokens() if weights.unlikelihood else None
        row_of_token = batch.token_index // batch.completion_tokens.shape[1]
        gradient: Tensor | float = 0.0
        first = losses.new_zeros(6)
        for i in range(len(tokens)):
            is_learnt = i < num_learnt
            has_kl = is_learnt or config.kl_tokens is KLTokens.ALL
            loss, sums = weighted_loss(
                rows.part(slice(i * batch.num_tokens, (i + 1) * batch.num_tokens)),
                original if has_kl else None,
                batch.targets,
                replace(
                    weights,
                    lm=pull[i][row_of_token],
                    entropy=weights.entropy if is_learnt else 0.0,
                    unlikelihood=weights.unlikelihood if is_learnt else 0.0,
                ),
                base_vocab_size=base_vocab_size,
                earlier=earlier,
            )
            gradient = gradient + loss
            value = value + (
                weights.kl_reference_to_policy * sums[1]
                + weights.kl_policy_to_reference * sums[2]
                - (weights.entropy if is_learnt else 0.0) * sums[3]
                + weights.unlikelihood * sums[4]
            )
            if i == 0:
                first = sums
        assert isinstance(gradient, Tensor), "there is a token at least"
        return gradient + (value - gradient).detach(), first, contrast, advantage

    def other_quantiles(
        self, quantiles: NDArray[np.int16], *, num_quantiles: int, seed: int
    ) -> NDArray[np.int16] | None:
        """The quantiles whose tokens each sample is contrasted with, drawn without replacement; None for no contrast.

        Args:
            quantiles: [B] the samples' own.
            num_quantiles: K.
            seed: of this step's draws. They depend on it and on the rows' order alone.

        Returns:
            [B, n] with n the lesser of ``contrast_tokens`` and K - 1.
        """
        if not self.config.contrast_coef or num_quantiles == 1:
            return None
        distances = np.tile(np.arange(1, num_quantiles, dtype=np.int16), (len(quantiles), 1))
        distances = np.random.default_rng(seed).permuted(distances, axis=1)
        chosen = distances[:, : self.config.contrast_tokens]
        return (quantiles[:, None] + chosen) % num_quantiles

    @property
    def pool_columns(self) -> tuple[str, ...]:
        """The columns that advantages are computed from; empty if the loss has no advantage term."""
        return COLUMNS if self.config.advantage_coef else ()

    @property
    def batch_fields(self) -> tuple[str, ...]:
        """The fields that the contrast and advantage terms add; empty if the loss has neither."""
        contrast = ("other_tokens",) if self.config.contrast_coef else ()
        advantage = ("advantages", "sampled_logprobs") if self.config.advantage_coef else ()
        tilt = ("tilt_tokens",) if self.config.tilt_coef else ()
        return (*contrast, *advantage, *tilt)

    @property
    def tilt_strength(self) -> float | None:
        """That of the best token's tilt; None for no tilt."""
        return self.config.tilt_strength if self.config.tilt_coef else None

    def take_tilt(self, tilt: TokenTilt) -> None:
        """Tilt the reference by these scores from here on."""
        self._tilt = tilt

    def begin_round(self, columns: Columns) -> None:
        """Compute the advantages of the snapshot's samples if the loss has an advantage term."""
        if self.config.advantage_coef:
            self._advantages = Advantages.of(columns, self.config.advantage_scope)

    def fields(
        self,
        ids: NDArray[Any],
        quantiles: NDArray[Any],
        *,
        reward_tokens: Sequence[int],
        seed: int,
    ) -> dict[str, NDArray[Any]]:
        """Other tokens [B, n], advantages [B], sampled log-probabilities [B] and tilt tokens [B], where the loss uses them."""
        fields: dict[str, NDArray[Any]] = {}
        others = self.other_quantiles(quantiles, num_quantiles=len(reward_tokens), seed=seed)
        if others is not None:
            fields["other_tokens"] = np.array(reward_tokens, dtype=np.int64)[others]
        if self._advantages is not None:
            rows = self._advantages.rows(ids)
            fields["advantages"] = rows.values
            fields["sampled_logprobs"] = rows.sampled_logprobs
        if self.config.tilt_coef:
            tokens = np.array(reward_tokens, dtype=np.int64)
            draws = np.random.default_rng([seed, 1]).random(len(quantiles))
            is_best = draws < self.config.tilt_best_share
            fields["tilt_tokens"] = np.where(is_best, tokens[-1], tokens[quantiles])
        return fields

    def micro_batches(self, batch: TrainingBatch, number: int) -> list[TrainingBatch]:
        """Split ``batch`` into ``number`` parts at most, or ``length_groups`` if that is more and rows are padded."""
        groups = self.config.length_groups if batch.has_padding else 1
        return batch.split(max(number, groups))

    def figures(
        self, sums: Mapping[str, float], *, num_sequences: int, num_tokens: int, num_quantiles: int
    ) -> dict[str, float]:
        """Means over tokens; of the terms that compare sequences, means over these, where the loss has them."""
        figures = {name: sums[name] / num_tokens for name in _ALWAYS}
        if self.config.unlikelihood_coef:
            figures["unlikelihood_loss"] = sums["unlikelihood_loss"] / num_tokens
        if self.config.contrast_coef and num_quantiles > 1:
            contrast_loss = sums["contrast_loss"] / num_sequences
            num_others = min(self.config.contrast_tokens, num_quantiles - 1)
            figures["contrast_loss"] = contrast_loss
            figures["information"] = math.log(1 + num_others) - contrast_loss
        if self.config.tilt_coef:
            figures["tilt_loss"] = sums["tilt_loss"] / num_tokens
        if self.config.advantage_coef:
            figures["advantage_loss"] = sums["advantage_loss"] / num_sequences
        return figures

    def after_step(self, sums: Mapping[str, float], *, num_sequences: int) -> None:
        """Let the coefficients adapt to the step's sums over its tokens, in nats."""
        forward = self.config.kl_direction is KLDirection.REFERENCE_TO_POLICY
        kl = sums["kl_reference_to_policy" if forward else "kl_policy_to_reference"]
        self.kl_coefficient.update(kl / num_sequences, num_sequences=num_sequences)
        self.entropy_coefficient.update(
            sums["entropy"] / num_sequences, num_sequences=num_sequences
        )

    def state_dict(self) -> dict[str, float]:
        """The coefficients, as plain numbers."""
        return {
            "kl_coef": self.kl_coefficient.value,
            "entropy_coef": self.entropy_coefficient.value,
        }

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Restore the KL and entropy coefficients."""
        self.kl_coefficient.load_state_dict({"value": state["kl_coef"]})
        self.entropy_coefficient.load_state_dict({"value": state["entropy_coef"]})
