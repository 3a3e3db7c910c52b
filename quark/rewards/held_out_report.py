"""How well a trained scorer agrees with the targets of held-out texts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOutReport:
    """The result of a training. The figures are for the held-out texts."""

    folder: Path
    num_train: int
    num_held_out: int
    positive_share: float
    """Share of held-out targets of at least 0.5."""
    auc: float
    """Area under the ROC curve for ``target >= 0.5``; NaN if the held-out texts have one class only."""
    accuracy: float
    """Share of held-out texts on the right side of 0.5."""
    pearson: float
    spearman: float
    """Rank correlation, ties at their mean rank."""


class HeldOutFigures(TypedDict):
    """The figures of a ``HeldOutReport``."""

    num_held_out: int
    positive_share: float
    auc: float
    accuracy: float
    pearson: float
    spearman: float


def held_out_figures(scores: NDArray[np.float64], targets: NDArray[np.float64]) -> HeldOutFigures:
    """The figures for scores [N] against targets [N], both in [0, 1]."""
    return HeldOutFigures(
        num_held_out=len(targets),
        positive_share=float(np.mean(targets >= 0.5)),
        auc=area_under_roc(scores, targets >= 0.5),
        accuracy=float(np.mean((scores >= 0.5) == (targets >= 0.5))),
        pearson=correlation(scores, targets),
        spearman=correlation(mean_ranks(scores), mean_ranks(targets)),
    )


def area_under_roc(scores: NDArray[np.float64], is_positive: NDArray[np.bool_]) -> float:
    """Chance that a positive scores above a negative, ties counting half; NaN with one class only."""
    num_positive = int(is_positive.sum())
    num_negative = len(scores) - num_positive
    if not num_positive or not num_negative:
        return math.nan
    rank_sum = mean_ranks(scores)[is_positive].sum()
    return float((rank_sum - num_positive * (num_positive + 1) / 2) / (num_positive * num_negative))


def mean_ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ranks from 1, equal values at the mean of their ranks."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    ranks: NDArray[np.float64] = (ends - (counts - 1) / 2)[inverse]
    return ranks


def correlation(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Pearson correlation; NaN if either is constant."""
    if not a.std() or not b.std():
        return math.nan
    return float(np.corrcoef(a, b)[0, 1])
