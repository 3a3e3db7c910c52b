"""Figures of a pool's scores: their spread, a histogram, means by round."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quark.pool.ties import repeated_share

HISTOGRAM_BINS = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreStatistics:
    """Spread of a score column over N samples. Scores have the reward's own unit."""

    num_samples: int
    """N, scored or not."""
    mean: float
    """NaN, as ``std``, where infinite scores leave it without a value. All five are NaN where nothing is scored."""
    std: float
    """Of the population."""
    min: float
    median: float
    max: float
    num_unscored: int
    num_infinite: int
    repeated_share: float
    """Share of the scored samples that have another sample's score, from 0 to 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HistogramBin:
    """The samples with scores from ``low`` up to ``high``. Only the last bin includes ``high``."""

    low: float
    high: float
    num_samples: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundMean:
    """The samples of one round of exploration."""

    round: int
    num_samples: int
    """Scored or not."""
    mean: float
    """Of their scores; NaN where nothing is scored or infinite scores cancel."""


def describe(scores: NDArray[np.float32]) -> ScoreStatistics:
    """Statistics of the scores [N], where NaN means not scored."""
    scored = scores[~np.isnan(scores)].astype(np.float64)
    if scored.size == 0:
        return ScoreStatistics(
            num_samples=len(scores),
            mean=math.nan,
            std=math.nan,
            min=math.nan,
            median=math.nan,
            max=math.nan,
            num_unscored=len(scores),
            num_infinite=0,
            repeated_share=0.0,
        )
    with np.errstate(invalid="ignore"):
        return ScoreStatistics(
            num_samples=len(scores),
            mean=float(scored.mean()),
            std=float(scored.std()),
            min=float(scored.min()),
            median=float(np.median(scored)),
            max=float(scored.max()),
            num_unscored=len(scores) - scored.size,
            num_infinite=int(np.isinf(scored).sum()),
            repeated_share=repeated_share(scores),
        )


def histogram(
    scores: NDArray[np.float32], num_bins: int = HISTOGRAM_BINS
) -> tuple[HistogramBin, ...]:
    """Equal bins over the finite scores of [N], in ascending order.

    There is one bin where all finite scores are equal, and none where there are no finite scores.
    """
    finite = scores[np.isfinite(scores)].astype(np.float64)
    if finite.size == 0:
        return ()
    counts, edges = np.histogram(finite, bins=1 if finite.min() == finite.max() else num_bins)
    return tuple(
        HistogramBin(low=float(low), high=float(high), num_samples=int(count))
        for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True)
    )


def round_means(rounds: NDArray[np.uint32], scores: NDArray[np.float32]) -> tuple[RoundMean, ...]:
    """The mean score of every round, in ascending order of rounds.

    Args:
        rounds: [N] the round of each sample.
        scores: [N] NaN = not scored.
    """
    means = []
    for index in np.unique(rounds).tolist():
        of_round = scores[rounds == index]
        scored = of_round[~np.isnan(of_round)].astype(np.float64)
        with np.errstate(invalid="ignore"):  # of both infinities there is no mean
            mean = float(scored.mean()) if scored.size else math.nan
        means.append(RoundMean(round=index, num_samples=len(of_round), mean=mean))
    return tuple(means)
