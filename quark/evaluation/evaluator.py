"""Measures a model on held-out prompts: reward, judges that it was never trained on, KL, fluency, diversity."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quark.data.collate import collate
from quark.evaluation.metrics import any_above, expected_maximum, text_metrics
from quark.generation.base import Generator, SamplingConfig
from quark.generation.distribution import (
    allowed_logits,
    divergence,
    guiding_tilt,
    is_guided_away,
    probabilities_of,
)
from quark.models.batch import TrainingBatch
from quark.models.causal import CompletionModel, CompletionRows
from quark.models.logprobs import base_logits, token_statistics
from quark.models.policy import Policy, stop_ids
from quark.reference.base import ReferencePolicy
from quark.rewards.base import RewardFunction
from quark.rewards.scoring import score
from quark.types import Completion, Prompt

_BY_COMPLETION = (
    "drift",
    "reference_nll",
    "kl_policy_to_reference",
    "kl_reference_to_policy",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Likelihoods:
    """Figures of two models for some completions."""

    metrics: Mapping[str, float]
    """Means over all tokens or completions, named as in docs/metrics.md."""
    by_completion: Mapping[str, NDArray[np.float64]]
    """[N] each, sums over the tokens of each completion in nats: ``drift`` as ``Evaluation.drifts``,
    ``reference_nll``, and ``kl_policy_to_reference`` and ``kl_reference_to_policy``, 0 for the original model."""

    @classmethod
    def unknown(cls, size: int) -> Self:
        """Of ``size`` completions whose tokens are not those of the reference: all NaN."""
        return cls(
            metrics={}, by_completion={name: np.full(size, math.nan) for name in _BY_COMPLETION}
        )

    @property
    def drifts(self) -> NDArray[np.float64]:
        """[N] as ``Evaluation.drifts``."""
        return self.by_completion["drift"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """The figures of one model under one token."""

    quantile: int | None
    """Quantile whose token was given; None without a token."""
    rewards: NDArray[np.float32]
    """[N] NaN = not scored."""
    completions: Sequence[Completion]
    """N completions, the prompts in order, all completions of a prompt together."""
    metrics: Mapping[str, float]
    """``reward_mean``, ``kl_policy_to_reference`` ... named as in docs/metrics.md."""
    judges: Mapping[str, float]
    """Mean score by judge."""
    judge_scores: Mapping[str, NDArray[np.float32]]
    """[N] by judge; NaN = not scored."""
    likelihoods: Likelihoods
    """Of both models, by completion."""
    failures: Sequence[str] = ()
    """Number of completions without a score, by the reward or by a judge, and the reason; empty if
    all have one."""

    @property
    def drifts(self) -> NDArray[np.float64]:
        """[N] KL(q || p0) along each completion, in nats, of the distribution q that it was sampled from."""
        return self.likelihoods.drifts


class Evaluator:
    """Samples completions of the held-out prompts and measures them.

    Args:
        prompts: held out.
        reference: for KL and perplexity.
        reward: the reward that is trained on.
        judges: rewards that are not, by name.
        completions_per_prompt: as configured.
        sampling: the sampling settings of the measured generators.
        retries: how often a call of the reward or a judge is repeated if it raises.
        seed: derived; the same for every model, so that models are compared on equal draws.
    """

    def __init__(
        self,
        *,
        prompts: Sequence[Prompt],
        reference: ReferencePolicy,
        reward: RewardFunction,
        judges: Mapping[str, RewardFunction],
        completions_per_prompt: int,
        sampling: SamplingConfig,
        seed: int,
        retries: int = 0,
    ) -> None:
        self._prompts = [p for p in prompts for _ in range(completions_per_prompt)]
        self._per_prompt = completions_per_prompt
        self._reference = reference
        self._reward = reward
        self._judges = judges
        self._sampling = sampling
        self._seed = seed
        self._retries = retries

    def evaluate(
        self,
        generator: Generator,
        policy: Policy,
        *,
        quantile: int | None,
        plain: CompletionModel | None = None,
    ) -> Evaluation:
        """Measure the completions of ``generator`` under the token of ``quantile``.

        Args:
            generator: samples from the policy, or from the model without a token if ``quantile`` is None.
            policy: its KL to the reference is measured if a token is given.
            quantile: None measures a model without a token.
            plain: that model; None is the original one.
        """
        completions = self.sample(generator, quantile=quantile)
        likelihoods = self.likelihoods(completions, policy, quantile=quantile, plain=plain)
        return self.measure(completions, likelihoods, quantile=quantile)

    def sample(self, generator: Generator, *, quantile: int | None) -> list[Completion]:
        """The completions of the held-out prompts."""
        return generator.generate(self._prompts, quantile=quantile, seed=self._seed)

    def measure(
        self,
        completions: Sequence[Completion],
        likelihoods: Likelihoods,
        *,
        quantile: int | None,
    ) -> Evaluation:
        """The figures of completions from ``sample``, including those from ``likelihoods``."""
        texts = [c.text for c in completions]
        prompts = [c.prompt.text for c in completions]
        rows = [c.prompt.metadata for c in completions]
        outcome, *others = (
            score(scorer, prompts, texts, on_error="nan", retries=self._retries, rows=rows)
            for scorer in (self._reward, *self._judges.values())
        )
        judged = dict(zip(self._judges, others, strict=True))
        rewards = outcome.scores
        metrics: dict[str, float] = {
            "reward_mean": _mean(rewards),
            "reward_std": _std(rewards),
            "failed_scores": float(np.isnan(rewards).sum()),
            "completion_length_mean": float(np.mean([len(c.token_ids) for c in completions])),
            **text_metrics(texts, group_size=self._per_prompt),
        }
        if self._per_prompt > 1:
            metrics["reward_minimum_mean"] = -expected_maximum(-rewards, self._per_prompt)
            metrics["reward_below_half_probability"] = any_above(
                -rewards, self._per_prompt, threshold=-0.5
            )
        metrics |= likelihoods.metrics
        return Evaluation(
            quantile=quantile,
            rewards=rewards,
            completions=completions,
            metrics=metrics,
            judges={name: _mean(scored.scores) for name, scored in judged.items()},
            judge_scores={name: scored.scores for name, scored in judged.items()},
            likelihoods=likelihoods,
            failures=[
                f"{scored.num_failed} of {len(texts)} held-out completions got no score{whose} "
                f"({'; '.join(scored.messages[:3])})"
                for whose, scored in (
                    ("", outcome),
                    *((f" of the judge {name}", scored) for name, scored in judged.items()),
                )
                if scored.num_failed
            ],
        )

    def likelihoods(
        self,
        completions: Sequence[Completion],
        policy: Policy,
        *,
        quantile: int | None,
        plain: CompletionModel | None = None,
    ) -> Likelihoods:
        """Exact KL in both directions and the reference's perplexity, in nats per completion token.

        ``kl_sampled_to_reference`` is KL(q || p0) of the sampled distribution q, with its guidance,
        temperature and truncation, and ``kl_sampled_per_completion`` its sum over a completion: the
        drift of the texts that a user gets. Both are means over the completions, each term exact
        over the vocabulary.

        Arguments as those of ``evaluate``; no reward is asked.
        """
        forward = backward = reference_nll = 0.0
        num_tokens = 0
        sums: dict[str, list[NDArray[np.float64]]] = {name: [] for name in _BY_COMPLETION}
        base_vocab_size = policy.reward_tokens.base_vocab_size
        size = self._sampling.batch_size
        for start in range(0, len(completions), size):
            batch = completion_batch(
                completions[start : start + size],
                policy,
                quantile=policy.reward_tokens.num_quantiles - 1 if quantile is None else quantile,
            )
            num_tokens += batch.num_tokens
            with torch.no_grad():
                original = self._reference.completion_rows(batch)
                # A policy that nothing trains is the original model: one pass is enough.
                model = plain if quantile is None else None if policy.is_frozen else policy
                rows = original if model is None else model.completion_rows(batch)
                statistics = token_statistics(
                    rows, original, batch.targets, base_vocab_size=base_vocab_size
                )
                drift = statistics.kl_policy_to_reference
                if not self._sampling.is_plain:
                    away = None
                    if is_guided_away(self._sampling, quantile):
                        worst = torch.full_like(batch.reward_tokens, policy.reward_tokens.ids[0])
                        away = policy.completion_rows(replace(batch, reward_tokens=worst))
                    drift = self._drift(rows, original, away, batch, policy, quantile)
            reference_nll += float(statistics.reference_nll.cpu().double().sum())
            row = (batch.token_index // batch.completion_tokens.shape[1]).cpu().numpy()
            for name, values in zip(
                _BY_COMPLETION,
                (
                    drift,
                    statistics.reference_nll,
                    statistics.kl_policy_to_reference,
                    statistics.kl_reference_to_policy,
                ),
                strict=True,
            ):
                # On the CPU: some devices lack float64.
                totals = np.bincount(row, values.cpu().double().numpy(), batch.num_sequences)
                sums[name].append(totals.astype(np.float64))
            if model is not None:
                forward += float(statistics.kl_reference_to_policy.cpu().double().sum())
                backward += float(statistics.kl_policy_to_reference.cpu().double().sum())
        by_completion = {name: np.concatenate(parts) for name, parts in sums.items()}
        drifts = by_completion["drift"]
        metrics = {
            "kl_reference_to_policy": forward / num_tokens,
            "kl_policy_to_reference": backward / num_tokens,
            "kl_sampled_to_reference": float(drifts.sum()) / num_tokens,
            "kl_sampled_per_completion": float(drifts.mean()),
            "perplexity_reference": math.exp(min(reference_nll / num_tokens, 700.0)),
        }
        return Likelihoods(metrics=metrics, by_completion=by_completion)

    def _drift(
        self,
        rows: CompletionRows,
        original: CompletionRows,
        away: CompletionRows | None,
        batch: TrainingBatch,
        policy: Policy,
        quantile: int | None,
    ) -> Tensor:
        """KL(q || p0) [M] at every completion token, for the sampled distribution q."""
        models = [rows, original] if away is None else [rows, original, away]
        width = policy.reward_tokens.base_vocab_size
        stops = torch.tensor(
            [i for i in stop_ids(policy.model, policy.tokenizer) if i < width],
            dtype=torch.int64,
            device=policy.device,
        )
        steps = batch.token_index % batch.completion_tokens.shape[1]
        may_not_stop = steps < self._sampling.min_new_tokens
        drift = torch.empty(batch.num_tokens)
        tilt = guiding_tilt(
            self._sampling,
            policy.critics.critic,
            quantile=quantile,
            num_quantiles=policy.reward_tokens.num_quantiles,
            device=policy.device,
        )
        for places, (logits, reference_logits, *rest) in base_logits(models, base_vocab_size=width):
            forbidden = torch.zeros_like(logits, dtype=torch.bool)
            forbidden[:, stops] = may_not_stop[places].unsqueeze(1)
            allowed = allowed_logits(
                logits,
                self._sampling,
                away=rest[0] if rest else None,
                tilt=tilt,
                forbidden=forbidden,
            )
            log_reference = torch.log_softmax(reference_logits, -1)
            probabilities = probabilities_of(allowed, self._sampling)
            drift[places] = divergence(probabilities, log_reference).cpu()
        return drift


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rows:
    """Completions, padded as the pool pads its samples."""

    quantiles: NDArray[np.int16]
    prompt_tokens: NDArray[np.int64]
    prompt_lengths: NDArray[np.int32]
    completion_tokens: NDArray[np.int64]
    completion_lengths: NDArray[np.int32]


def completion_batch(
    completions: Sequence[Completion], policy: Policy, *, quantile: int
) -> TrainingBatch:
    """Completions as a training batch, all under one quantile's token, in their order."""
    prompt_lengths = np.array([len(c.prompt.token_ids) for c in completions], dtype=np.int32)
    completion_lengths = np.array([len(c.token_ids) for c in completions], dtype=np.int32)
    prompts = np.full((len(completions), prompt_lengths.max()), policy.pad_id, dtype=np.int64)
    tokens = np.full((len(completions), completion_lengths.max()), policy.pad_id, dtype=np.int64)
    for i, completion in enumerate(completions):
        prompts[i, prompts.shape[1] - prompt_lengths[i] :] = completion.prompt.token_ids
        tokens[i, : completion_lengths[i]] = completion.token_ids
    rows = _Rows(
        quantiles=np.full(len(completions), quantile, dtype=np.int16),
        prompt_tokens=prompts,
        prompt_lengths=prompt_lengths,
        completion_tokens=tokens,
        completion_lengths=completion_lengths,
    )
    return collate(rows, policy.reward_tokens.ids, policy.pad_id, policy.device)


def _mean(values: NDArray[np.float32]) -> float:
    # In float64: a sum of few large scores is beyond float32.
    return float(np.nanmean(values, dtype=np.float64)) if np.isfinite(values).any() else math.nan


def _std(values: NDArray[np.float32]) -> float:
    return float(np.nanstd(values, dtype=np.float64)) if np.isfinite(values).any() else math.nan
