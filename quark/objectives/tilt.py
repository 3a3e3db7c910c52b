"""The token critic: what each vocabulary entry adds to a sample's standing, learned from the whole pool in closed form.

A ridge regression predicts a sample's standardized rank g(y) from the sum of its tokens' output vectors, so that
g(y) = c + sum_t b[y_t] with one score b[v] for each vocabulary entry. The distribution that maximizes E[g] - KL(. || p0)
/ s over completions is p0(y) exp(s g(y)) / Z. With an additive g its next-token form, without the look ahead, is

    q(v | y_<t, x) proportional to p0(v | y_<t, x) exp(s b[v]):

the original model, tilted. Every reward token has a tilt of its own, from -s for the worst to s for the best.

The regression holds whichever distribution drew the samples, so the pool's oldest samples count as much as its newest.
It is shrunk by as much as leave-one-out cross-validation finds best: a reward that tokens do not explain gives scores near
0, and the tilt vanishes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_SHRINKAGES = np.logspace(-4.0, 4.0, 33)
"""Candidates, in multiples of the features' mean square."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Regression:
    """A ridge regression, its shrinkage chosen by leave-one-out cross-validation."""

    weights: NDArray[np.float64]
    """[D] of the features."""
    explained: float
    """Share of the targets' variance that it is estimated to explain in new samples; 0 for none."""
    num_samples: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenTilt:
    """A critic's scores, and how strongly each quantile's token is tilted along them."""

    scores: NDArray[np.float32]
    """[W] of the critic."""
    strengths: NDArray[np.float32]
    """[K] s of each quantile."""


def ridge(features: NDArray[np.float64], targets: NDArray[np.float64]) -> Regression:
    """The regression of ``targets`` [N] on ``features`` [N, D], both taken about their means.

    Works in the smaller of N and D dimensions. No weight at all (``explained`` is 0) where no shrinkage explains
    anything, and for fewer than three samples.
    """
    num_samples, width = features.shape
    nothing = Regression(weights=np.zeros(width), explained=0.0, num_samples=num_samples)
    if num_samples < 3:
        return nothing
    centered, wanted = features - features.mean(axis=0), targets - targets.mean()
    total = float(wanted @ wanted)
    if not total or not centered.any():
        return nothing
    is_wide = width > num_samples
    gram = centered @ centered.T if is_wide else centered.T @ centered
    values, vectors = np.linalg.eigh(gram)
    kept = values > 1e-10 * values[-1]
    values, vectors = values[kept], vectors[:, kept]
    left = vectors if is_wide else centered @ vectors / np.sqrt(values)  # [N, R] singular vectors
    projected = left.T @ wanted
    scale = float(values.sum()) / num_samples
    best = (0.0, 0.0)
    for shrinkage in _SHRINKAGES * scale:
        share = values / (values + shrinkage)
        leverage = 1.0 / num_samples + (left**2) @ share
        if leverage.max() > 1.0 - 1e-6:
            continue
        # What each sample's error would be without it among the others.
        errors = (wanted - left @ (share * projected)) / (1.0 - leverage)
        best = max(best, (1.0 - float(errors @ errors) / total, shrinkage))
    explained, shrinkage = best
    if explained <= 0.0:
        return nothing
    if is_wide:
        weights = centered.T @ (vectors @ (projected / (values + shrinkage)))
    else:
        weights = vectors @ (projected * np.sqrt(values) / (values + shrinkage))
    return Regression(weights=weights, explained=explained, num_samples=num_samples)
