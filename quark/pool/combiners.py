"""One score out of an ensemble's: how the members' scores of a sample become what is ranked.

    mean        mean of z_i
    worst       min of z_i                                (WCO of Coste et al. 2024)
    uwo         mean of z_i - penalty * variance of z_i   (UWO of Coste et al. 2024, population variance)
    robust      -softness * log(mean of exp(-z_i / softness))
    quantile    a quantile of the z_i
    rank_mean   mean over the members of the share of samples that score lower
    rank_min    the lowest of these shares

with z_i = (score_i - mean_i) / deviation_i. The means and deviations are those of the first exploration, so that a
sample's value does not depend on what is explored later. ``robust`` is the mean for a large softness and the worst
for a small one, and to second order ``uwo`` with penalty 1 / (2 softness).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from quark.pool.rank_shares import rank_share
from quark.settings import Settings

Rule = Literal["mean", "worst", "uwo", "robust", "quantile", "rank_mean", "rank_min"]


class CombinerConfig(Settings):
    """How the scores of an ensemble's members are combined into what is ranked."""

    rule: Rule = "mean"
    """``mean``; ``worst`` (WCO); ``uwo``: the mean less ``penalty`` times the variance; ``robust``:
    between the mean and the worst, by ``softness``; ``quantile``: the members' quantile
    ``quantile``; ``rank_mean`` and ``rank_min``: mean and lowest of the members' rankings."""
    penalty: float = Field(0.5, ge=0.0)
    """Weight of the variance in ``uwo``."""
    softness: float = Field(1.0, gt=0.0)
    """The ``robust`` rule tends to the mean for large values and to the worst member for small
    ones, in standard deviations of a member's scores."""
    quantile: float = Field(0.25, ge=0.0, le=1.0)
    """Of the ``quantile`` rule: 0 is the worst member, 0.5 the median."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Standard:
    """The scale of one member's scores."""

    mean: float
    deviation: float
    """1 where all scores are equal, so that the member has no say."""


def standard_of(scores: NDArray[np.float32]) -> Standard:
    """Mean and standard deviation (population) of the scores that are there; 0 and 1 without any."""
    known = scores[np.isfinite(scores)].astype(np.float64)
    if not known.size:
        return Standard(mean=0.0, deviation=1.0)
    return Standard(mean=float(known.mean()), deviation=float(known.std()) or 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ensemble:
    """The combination of the columns of an ensemble's members; a ``Combination`` of ``quark.pool.scope``."""

    columns: tuple[str, ...]
    standards: tuple[Standard, ...]
    """By member."""
    combiner: CombinerConfig

    def standardized(self, scores: Sequence[NDArray[np.float32]]) -> NDArray[np.float64]:
        """[k, N] every member's scores in standard deviations from its mean."""
        return np.stack(
            [
                (column.astype(np.float64) - standard.mean) / standard.deviation
                for column, standard in zip(scores, self.standards, strict=True)
            ]
        )

    def combine(self, scores: Sequence[NDArray[np.float32]]) -> NDArray[np.float64]:
        """[N] the combined values; NaN where any member has no score, never a mean over fewer."""
        if self.combiner.rule in ("rank_mean", "rank_min"):
            shares = np.stack([rank_share(column) for column in scores])
            mean_or_min = shares.mean(0) if self.combiner.rule == "rank_mean" else shares.min(0)
            return np.asarray(mean_or_min, dtype=np.float64)
        return combined(self.standardized(scores), self.combiner)


def combined(z: NDArray[np.float64], combiner: CombinerConfig) -> NDArray[np.float64]:
    """[N] one value for each sample from its members' standardized scores [k, N]; NaN where one of them is NaN.

    Raises:
        ValueError: a rule that ranks has no use for standardized scores.
    """
    match combiner.rule:
        case "mean":
            values = z.mean(0)
        case "worst":
            values = z.min(0)
        case "uwo":
            values = z.mean(0) - combiner.penalty * z.var(0)
        case "robust":
            # With the minimum taken out, no exponential overflows and one of them is 1.
            lowest = z.min(0)
            above = np.exp(-(z - lowest) / combiner.softness).mean(0)
            values = lowest - combiner.softness * np.log(above)
        case "quantile":
            values = np.quantile(z, combiner.quantile, axis=0)
        case _:
            raise ValueError(f"the rule {combiner.rule} combines ranks")
    return np.asarray(values, dtype=np.float64)
