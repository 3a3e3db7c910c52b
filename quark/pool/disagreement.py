"""How far the members of an ensemble agree, where they differ, and what each way to combine them would choose."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quark.pool.base import SamplePool
from quark.pool.combiners import CombinerConfig, Ensemble, combined

_MOST_FOR_TAU = 512
"""Samples whose pairs are compared: the newest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Disagreement:
    """Figures of an ensemble of k members; NaN where nothing is scored."""

    means: list[float]
    """[k] of each member's scores of the new samples."""
    deviations: list[float]
    """[k] their standard deviations."""
    by_quantile: list[float]
    """[K] mean over a quantile's samples of the standard deviation between the members' standardized scores."""
    lowest_share: list[float]
    """[k] share of the new samples for which this member is the lowest; the first of equal ones."""
    kendall_tau: float
    """Mean over the pairs of members of Kendall's tau-b on the newest samples; NaN for one member."""
    top_overlap: dict[str, float]
    """By rule, the share that the best 1/K of all samples by that rule has in common with the best by the mean."""


def disagreement(
    pool: SamplePool,
    ensemble: Ensemble,
    labels: NDArray[np.int16],
    *,
    num_quantiles: int,
    new: range,
) -> Disagreement:
    """Measure an ensemble on a snapshot.

    Args:
        pool: the snapshot.
        ensemble: combines columns of it.
        labels: [N] the quantile of each sample, -1 for unranked ones.
        num_quantiles: K.
        new: ids of the samples that are new.
    """
    scores = [pool.scores(name) for name in ensemble.columns]
    z = ensemble.standardized(scores)
    is_known = np.isfinite(z).all(0)
    spread = z.std(0)
    newest = np.zeros(len(labels), dtype=np.bool_)
    newest[new.start : new.stop] = True
    newest &= is_known
    raw = np.stack(scores)[:, newest].astype(np.float64)
    num_members, num_new = raw.shape
    lowest = np.bincount(z[:, newest].argmin(0), minlength=num_members) if num_new else None
    return Disagreement(
        means=[float(v) for v in raw.mean(1)] if num_new else [math.nan] * num_members,
        deviations=[float(v) for v in raw.std(1)] if num_new else [math.nan] * num_members,
        by_quantile=[_mean(spread[(labels == k) & is_known]) for k in range(num_quantiles)],
        lowest_share=[math.nan] * num_members
        if lowest is None
        else [float(count / num_new) for count in lowest],
        kendall_tau=_mean_tau(raw[:, -_MOST_FOR_TAU:]),
        top_overlap=_top_overlap(z[:, is_known], ensemble.combiner, num_quantiles),
    )


def kendall_tau(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Kendall's tau-b of two arrays [N]; NaN where one of them is constant. Compares all pairs."""
    first = np.sign(a[:, None] - a[None, :])
    second = np.sign(b[:, None] - b[None, :])
    pairs = math.sqrt(float(np.abs(first).sum()) * float(np.abs(second).sum()))
    return float((first * second).sum() / pairs) if pairs else math.nan


def _mean_tau(scores: NDArray[np.float64]) -> float:
    taus = [
        kendall_tau(scores[i], scores[j])
        for i in range(len(scores))
        for j in range(i + 1, len(scores))
    ]
    return _mean(np.array(taus, dtype=np.float64))


def _top_overlap(
    z: NDArray[np.float64], combiner: CombinerConfig, num_quantiles: int
) -> dict[str, float]:
    size = z.shape[1] // num_quantiles
    if not size:
        return {"worst": math.nan, "uwo": math.nan}
    by_mean = set(np.argsort(-z.mean(0), kind="stable")[:size].tolist())
    found = {}
    for rule in ("worst", "uwo"):
        values = combined(z, combiner.model_copy(update={"rule": rule}))
        best = np.argsort(-values, kind="stable")[:size].tolist()
        found[rule] = len(by_mean.intersection(best)) / size
    return found


def _mean(values: NDArray[np.float64]) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if known.size else math.nan
