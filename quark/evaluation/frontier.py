"""Reward against drift of one trained model, from no guidance to strong guidance.

Guidance moves a model away from what its worst token would write. Stronger guidance brings more
reward and more drift from the original model, so one run has a whole curve of trade-offs, and the
user can choose one afterwards. Pure functions over evaluations; the command that makes them is
`quark frontier`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from quark.evaluation.evaluator import Evaluation

NUM_RESAMPLES = 2000
"""Bootstrap samples of an interval."""
_SEED = 20220526


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A mean over prompts and its 95 % bootstrap interval; all NaN if nothing was scored."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: NDArray[np.floating[Any]], *, per_prompt: int) -> Self:
        """The mean and interval of one value per completion.

        Args:
            values: [N] the completions of a prompt together; NaN does not count.
            per_prompt: completions of each prompt. Prompts are resampled whole: their completions are alike.
        """
        rows = np.asarray(values, dtype=np.float64).reshape(-1, per_prompt)
        rows = rows[~np.isnan(rows).all(axis=1)]
        if not len(rows):
            return cls(mean=math.nan, low=math.nan, high=math.nan)
        means = np.nanmean(rows, axis=1)
        chosen = np.random.default_rng(_SEED).integers(0, len(means), (NUM_RESAMPLES, len(means)))
        low, high = np.quantile(means[chosen].mean(axis=1), [0.025, 0.975])
        return cls(mean=float(means.mean()), low=float(low), high=float(high))


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One place on the curve."""

    quantile: int | None
    """Quantile whose token was given; None for the original model."""
    guidance: float
    reward: Interval
    drift: Interval
    """KL(q || p0) in nats per completion, of the sampled distribution q."""
    drift_per_token: float
    judges: dict[str, Interval]
    distinct_2: float
    length: float
    """Mean tokens of a completion."""
    perplexity: float
    """Under the original model."""

    @classmethod
    def of(cls, evaluation: Evaluation, *, guidance: float, per_prompt: int) -> Self:
        """The figures of an evaluation, with intervals over its prompts."""
        metrics = evaluation.metrics
        return cls(
            quantile=evaluation.quantile,
            guidance=guidance,
            reward=Interval.of(evaluation.rewards, per_prompt=per_prompt),
            drift=Interval.of(evaluation.drifts, per_prompt=per_prompt),
            drift_per_token=metrics["kl_sampled_to_reference"],
            judges={
                name: Interval.of(scores, per_prompt=per_prompt)
                for name, scores in evaluation.judge_scores.items()
            },
            distinct_2=metrics["distinct_2"],
            length=metrics["completion_length_mean"],
            perplexity=metrics["perplexity_reference"],
        )


def best_within(points: Sequence[Point], *, most_drift: float) -> Point | None:
    """The point of highest mean reward among those that drift by at most ``most_drift`` nats per completion.

    None if all drift farther. The original model is excluded.
    """
    fitting = [
        point
        for point in points
        if point.quantile is not None
        and point.drift.mean <= most_drift
        and not math.isnan(point.reward.mean)
    ]
    return max(fitting, key=lambda point: point.reward.mean, default=None)
