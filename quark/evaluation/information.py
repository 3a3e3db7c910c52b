"""How well the reward tokens distinguish samples: the label that a policy gives a sample against its actual label.

By Bayes' rule a policy that is steered by its token gives a sample (x, y) the label k with the
probability P(k | x, y) = pi(y | x, r_k) / sum_j pi(y | x, r_j). On samples that it was not trained
on, this shows whether it has learned the meaning of the tokens or only the samples. No completion
is generated and no reward asked.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quark.data.collate import collate
from quark.evaluation.frontier import NUM_RESAMPLES, Interval
from quark.models.batch import TrainingBatch
from quark.models.logprobs import token_nll, token_statistics
from quark.models.policy import Policy
from quark.pool.base import SamplePool
from quark.reference.base import ReferencePolicy

_SEED = 20221129
_ROUNDING = 1e-9
"""Nats of information that count as none: tokens with the same vector differ by the rounding of a logarithm."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledSamples:
    """N samples of a pool that have a quantile, in any order."""

    pool: SamplePool
    ids: NDArray[np.uint64]
    """[N]"""
    labels: NDArray[np.int16]
    """[N] quantiles."""
    rewards: NDArray[np.float32]
    """[N] the scores that the quantiles were cut by."""

    def __len__(self) -> int:
        return len(self.ids)

    def batches(self, policy: Policy, *, size: int) -> Iterator[TrainingBatch]:
        """At most ``size`` samples at a time, in order, each under the token of its quantile."""
        for start in range(0, len(self), size):
            part = slice(start, start + size)
            rows = self.pool.gather(self.ids[part], pad_id=policy.pad_id)
            yield collate(
                replace(rows, quantiles=self.labels[part]),
                policy.reward_tokens.ids,
                policy.pad_id,
                policy.device,
                sample_ids=rows.ids,
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Information:
    """Figures of N samples under K reward tokens."""

    num_samples: int
    contrast_loss: float
    """Mean of -log P(k | x, y) over all K tokens, in nats per completion; log K is chance."""
    information: float
    """log K minus it: a lower bound, in nats, of the mutual information between token and completion."""
    error: float
    """Standard error of both; NaN for one sample."""
    label_accuracy: float
    """Share of the samples whose own label is the most likely one; 1 / K is chance."""
    rank_correlation: float
    """Spearman's, of the reward and log pi(y | x, r_best) - log pi(y | x, r_worst); NaN where one of them is
    constant."""
    ratio_std: float
    """Standard deviation of that ratio, in nats."""

    @classmethod
    def of(
        cls,
        logprobs: NDArray[np.float64],
        labels: NDArray[np.int16],
        rewards: NDArray[np.float32],
        *,
        temperature: float = 1.0,
    ) -> Self:
        """The figures of at least one sample.

        Args:
            logprobs: [N, K] log pi(y | x, r_j) in nats.
            labels: [N] quantiles in 0 .. K-1.
            rewards: [N] finite.
            temperature: divides ``logprobs`` in the posterior, as ``objective.contrast_temperature`` does.
        """
        gains = information_of_each(logprobs, labels, temperature=temperature)
        size, num_quantiles = logprobs.shape
        ratio = logprobs[:, -1] - logprobs[:, 0]
        information = float(gains.mean())
        return cls(
            num_samples=size,
            contrast_loss=math.log(num_quantiles) - information,
            information=information,
            error=float(gains.std(ddof=1)) / math.sqrt(size) if size > 1 else math.nan,
            label_accuracy=float((logprobs.argmax(axis=1) == labels).mean()),
            rank_correlation=rank_correlation(ratio, rewards),
            ratio_std=float(ratio.std()),
        )


def contrast_losses(
    logprobs: NDArray[np.float64], labels: NDArray[np.int16], *, temperature: float = 1.0
) -> NDArray[np.float64]:
    """[N] -log P(k | x, y) in nats; arguments as those of ``Information.of``."""
    scaled = logprobs / temperature
    highest = scaled.max(axis=1)
    norm = highest + np.log(np.exp(scaled - highest[:, None]).sum(axis=1))
    losses: NDArray[np.float64] = norm - scaled[np.arange(len(labels)), labels]
    return losses


def information_of_each(
    logprobs: NDArray[np.float64], labels: NDArray[np.int16], *, temperature: float = 1.0
) -> NDArray[np.float64]:
    """[N] log K + log P(k | x, y) in nats, exactly 0 if the tokens do not differ.

    Arguments as ``Information.of``'s.
    """
    gains = math.log(logprobs.shape[1]) - contrast_losses(logprobs, labels, temperature=temperature)
    gains[np.abs(gains) < _ROUNDING] = 0.0
    return gains


def rank_correlation(first: NDArray[np.floating[Any]], second: NDArray[np.floating[Any]]) -> float:
    """Spearman's correlation of two vectors [N], equal values sharing a rank; NaN if one of them is constant."""
    a, b = _centered_ranks(first), _centered_ranks(second)
    scale = math.sqrt(float((a * a).sum()) * float((b * b).sum()))
    return float((a * b).sum()) / scale if scale > 0.0 else math.nan


def interval_over_groups(values: NDArray[np.float64], groups: NDArray[np.integer[Any]]) -> Interval:
    """The mean of ``values`` [N] and its 95 % bootstrap interval; a group is resampled as a whole."""
    _, place = np.unique(groups, return_inverse=True)
    sums, sizes = np.bincount(place, values), np.bincount(place)
    chosen = np.random.default_rng(_SEED).integers(0, len(sums), (NUM_RESAMPLES, len(sums)))
    low, high = np.quantile(sums[chosen].sum(1) / sizes[chosen].sum(1), [0.025, 0.975])
    return Interval(mean=float(values.mean()), low=float(low), high=float(high))


def completion_logprobs(
    policy: Policy, samples: LabelledSamples, *, batch_size: int
) -> NDArray[np.float64]:
    """[N, K] log pi(y | x, r_j) of each sample under every reward token, in nats, by forward passes only.

    Args:
        policy: with K reward tokens.
        samples: N of them.
        batch_size: samples in one pass.
    """
    tokens = policy.reward_tokens
    parts = []
    for batch in samples.batches(policy, size=batch_size):
        columns = [
            token_logprobs(
                policy,
                replace(batch, reward_tokens=torch.full_like(batch.reward_tokens, token)),
                base_vocab_size=tokens.base_vocab_size,
            )
            for token in tokens.ids
        ]
        parts.append(torch.stack(columns, dim=1).cpu().double().numpy())
    if not parts:
        return np.empty((0, tokens.num_quantiles))
    return np.concatenate(parts)


def drift_per_token(
    policy: Policy, reference: ReferencePolicy, samples: LabelledSamples, *, batch_size: int
) -> float:
    """KL(pi || p0) in nats a token under the best reward token, along the samples' completions."""
    base_vocab_size = policy.reward_tokens.base_vocab_size
    total, num_tokens = 0.0, 0
    for batch in samples.batches(policy, size=batch_size):
        best = replace(
            batch, reward_tokens=torch.full_like(batch.reward_tokens, policy.reward_tokens.best)
        )
        with torch.no_grad():
            statistics = token_statistics(
                policy.completion_rows(best),
                reference.completion_rows(best),
                best.targets,
                base_vocab_size=base_vocab_size,
            )
        total += float(statistics.kl_policy_to_reference.cpu().double().sum())
        num_tokens += best.num_tokens
    return total / num_tokens if num_tokens else math.nan


@torch.no_grad()
def token_logprobs(policy: Policy, batch: TrainingBatch, *, base_vocab_size: int) -> Tensor:
    """[B] log pi(y | x, r) of each sequence of ``batch`` under its reward token, without gradient."""
    rows = policy.completion_rows(batch)
    return -batch.sum_by_sequence(token_nll(rows, batch.targets, base_vocab_size=base_vocab_size))


def _centered_ranks(values: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    _, block, sizes = np.unique(values, return_inverse=True, return_counts=True)
    ranks: NDArray[np.float64] = (np.cumsum(sizes) - (sizes + 1) / 2)[block]
    return ranks - (len(ranks) - 1) / 2
