"""Whether a model listens to its reward tokens: the mutual information between the token and what is written after it.

With K tokens, k uniform and y written under r_k, I(K; Y | x) is the mean of log pi(y | x, r_k) - log((1/K) sum_j
pi(y | x, r_j)): log K plus the logarithm of the label's own posterior. It lies between 0, where all tokens write the same,
and log K, where every text gives its token away. It is exact for completions of the policy itself. For guided or
truncated ones, it is a lower bound of the information in them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from quark.evaluation.evaluator import Evaluation, completion_batch
from quark.evaluation.figures import mean
from quark.evaluation.frontier import Interval
from quark.evaluation.information import information_of_each, rank_correlation, token_logprobs
from quark.evaluation.metrics import Direction
from quark.models.policy import Policy

COLLAPSED_BELOW = 0.02
"""Share of log K below which the tokens count as ignored."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditioning:
    """Figures of completions under each of K reward tokens."""

    information: Interval
    """I(K; Y | x) in nats a completion, with an interval over prompts; at most log K."""
    label_accuracy: Interval
    """Share of the completions that are most likely under their own token; 1 / K is chance."""
    rank_correlation: float
    """Spearman's, of the quantile that was asked for and the reward; NaN without scores."""
    num_quantiles: int

    @classmethod
    def of(
        cls, logprobs: NDArray[np.float64], rewards: NDArray[np.float32], *, per_prompt: int
    ) -> Conditioning:
        """Of completions of P prompts under each token.

        Args:
            logprobs: [K, P * per_prompt, K] log pi(y | x, r_j) in nats, first by the token that y was written under.
            rewards: [K, P * per_prompt]; NaN = not scored.
            per_prompt: completions of each prompt under one token, which stand together.
        """
        num_quantiles, size, _ = logprobs.shape
        labels = np.repeat(np.arange(num_quantiles, dtype=np.int16), size)
        flat = logprobs.reshape(-1, num_quantiles)

        def by_prompt(values: NDArray[np.float64]) -> NDArray[np.float64]:
            rows = values.reshape(num_quantiles, -1, per_prompt)
            return rows.transpose(1, 0, 2).reshape(rows.shape[1], -1)

        gains = by_prompt(information_of_each(flat, labels))
        hits = by_prompt((flat.argmax(axis=1) == labels).astype(np.float64))
        scored = ~np.isnan(rewards.ravel())
        return cls(
            information=mean("information", Direction.NEITHER, gains).interval,
            label_accuracy=mean("label_accuracy", Direction.NEITHER, hits).interval,
            rank_correlation=rank_correlation(
                labels[scored].astype(np.float64), rewards.ravel()[scored]
            )
            if scored.any()
            else math.nan,
            num_quantiles=num_quantiles,
        )

    @property
    def has_collapsed(self) -> bool:
        """Whether the tokens are ignored: less than 2 % of the information that they could carry."""
        return self.information.mean < COLLAPSED_BELOW * math.log(self.num_quantiles)


def measure_conditioning(
    policy: Policy, evaluations: Sequence[Evaluation], *, per_prompt: int, batch_size: int
) -> Conditioning:
    """The figures of one evaluation under each token, in order: K passes over the completions of each.

    Args:
        policy: with K reward tokens.
        evaluations: of quantiles 0 .. K - 1, on the same prompts.
        per_prompt: completions of each prompt in an evaluation.
        batch_size: completions in one pass.
    """
    columns = []
    width = policy.reward_tokens.base_vocab_size
    for evaluation in evaluations:
        parts = []
        for start in range(0, len(evaluation.completions), batch_size):
            part = evaluation.completions[start : start + batch_size]
            batch = completion_batch(part, policy, quantile=0)
            given = [
                token_logprobs(
                    policy,
                    replace(batch, reward_tokens=torch.full_like(batch.reward_tokens, token)),
                    base_vocab_size=width,
                )
                for token in policy.reward_tokens.ids
            ]
            parts.append(torch.stack(given, dim=1).cpu().double().numpy())
        columns.append(np.concatenate(parts))
    rewards = np.stack([evaluation.rewards for evaluation in evaluations])
    return Conditioning.of(np.stack(columns), rewards, per_prompt=per_prompt)
