"""Rank advantages: how good each sample is among those it competes with, on a scale that no reward's scale enters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from quark.objectives.base import Columns
from quark.objectives.config import AdvantageScope

COLUMNS = ("reward", "round", "prompt_id", "logprob_sampled", "logprob_policy")
"""Columns of a pool that advantages are made of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Advantages:
    """Advantages of a pool's samples, and the log-probabilities that they were sampled with; by id."""

    values: NDArray[np.float32]
    """[N] mean 0 and variance 1 within each group; 0 where there is no score or nothing to compare with."""
    sampled_logprobs: NDArray[np.float32]
    """[N] in nats under the distribution that was drawn from; where that is not known, under the policy."""

    @classmethod
    def of(cls, columns: Columns, scope: AdvantageScope) -> Self:
        """Those of every sample of a pool, ranked by its reward within its prompt and round or its round.

        Args:
            columns: ``COLUMNS`` of the pool.
            scope: among which samples one is ranked.
        """
        groups = columns["round"].astype(np.int64)
        if scope is AdvantageScope.PROMPT:
            # One number for each pair: prompts are numbered from 0.
            prompts = columns["prompt_id"].astype(np.int64)
            groups = groups * (int(prompts.max(initial=0)) + 1) + prompts
        sampled = columns["logprob_sampled"]
        return cls(
            values=standardized_ranks(columns["reward"], groups),
            sampled_logprobs=np.where(np.isfinite(sampled), sampled, columns["logprob_policy"]),
        )

    def rows(self, ids: NDArray[np.uint64]) -> Self:
        """Those of some samples, in the order of ``ids``."""
        places = ids.astype(np.int64)
        return type(self)(
            values=self.values[places], sampled_logprobs=self.sampled_logprobs[places]
        )


def standardized_ranks(
    scores: NDArray[np.float32], groups: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Ranks of ``scores`` [N] within groups of equal number in ``groups`` [N], with mean 0 and variance 1 in each.

    Equal scores share the mean of their ranks. NaN is not ranked and gets 0, as does a group whose scores are all
    the same.
    """
    result = np.zeros(len(scores), dtype=np.float32)
    scored = np.flatnonzero(~np.isnan(scores))
    order = scored[np.lexsort((scores[scored], groups[scored]))]
    if not len(order):
        return result
    values, members = scores[order], groups[order]
    begins_group = np.r_[True, members[1:] != members[:-1]]
    begins_tie = begins_group | np.r_[True, values[1:] != values[:-1]]
    ranks = _mean_within(np.cumsum(begins_tie) - 1, np.arange(len(order), dtype=np.float64))
    group = np.cumsum(begins_group) - 1
    centered = ranks - _mean_within(group, ranks)
    deviation = np.sqrt(_mean_within(group, centered**2))
    np.divide(centered, deviation, out=centered, where=deviation > 0)
    result[order] = centered
    return result


def _mean_within(group: NDArray[np.int64], values: NDArray[np.float64]) -> NDArray[np.float64]:
    """For each element the mean of its group's ``values``; groups are numbered 0, 1, ... in order."""
    means: NDArray[np.float64] = (np.bincount(group, values) / np.bincount(group))[group]
    return means
