"""Over-optimization: a gold reward against the distance from the original model (Gao, Schulman, Hilton 2023).

With d the root of KL(policy || original) in nats, and R the gold reward less that of the original model:

    best-of-n:     R = d (alpha - beta d)        peak at d = alpha / (2 beta)
    training:      R = d (alpha - beta log d)    peak at d = exp(alpha / beta - 1)

Both are linear in alpha and beta, so they are fitted by least squares.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


class Form(StrEnum):
    """How the gold reward depends on the distance."""

    BEST_OF_N = "best_of_n"
    TRAINING = "training"


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """An estimate with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CurvePoint:
    """One point of a curve; rewards are absolute."""

    label: int
    """n of best-of-n, or the optimizer step."""
    kl: float
    """Nats per completion."""
    distance: float
    """Its root."""
    proxy: float
    gold: float
    effective: float
    """Samples of a prompt that the estimate rests on; NaN where that has no meaning."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """A fitted form."""

    form: Form
    alpha: Interval
    beta: Interval
    peak_distance: Interval | None
    """None where the fitted curve has no peak."""
    peak_gain: Interval | None
    """Gold reward at the peak less the original model's."""
    is_extrapolated: bool
    """The peak lies outside the distances that were observed, so it is a guess."""
    extrapolation_error: float
    """Root mean square error on the upper half of the distances of a fit to the lower half; NaN for few points."""

    def gain(self, distance: Floats) -> Floats:
        """Gold reward at some distances less the original model's."""
        found: Floats = _terms(distance, self.form) @ np.array([self.alpha.value, self.beta.value])
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """A curve and what was fitted to it."""

    form: Form
    points: tuple[CurvePoint, ...]
    base_gold: float
    """Gold reward of the original model."""
    fit: Fit | None
    """None where there are too few points."""

    @property
    def best(self) -> CurvePoint:
        """The point with the highest gold reward."""
        return max(self.points, key=lambda point: point.gold)

    @property
    def is_past_its_peak(self) -> bool:
        """Whether the farthest point is beyond a peak that was observed."""
        fit = self.fit
        if fit is None or fit.peak_distance is None or fit.is_extrapolated:
            return False
        return max(point.distance for point in self.points) > fit.peak_distance.value


def best_of_n_kl(n: int) -> float:
    """KL(best-of-n || original) in nats: log n - (n - 1) / n. Exact without ties, else an upper bound."""
    return math.log(n) - (n - 1) / n


def best_of_n_weights(num_samples: int, n: int) -> Floats:
    """[N] weight of each sample, sorted by reward with the lowest first, in the unbiased estimate of best-of-n.

    The weight of the i-th is C(i - 1, n - 1) / C(N, n), the chance that it is the best of n drawn without replacement.

    Raises:
        ValueError: n is not between 1 and N.
    """
    if not 1 <= n <= num_samples:
        raise ValueError(f"best-of-{n} of {num_samples} samples")
    weights = np.zeros(num_samples)
    weights[-1] = n / num_samples
    for i in range(num_samples, n, -1):  # w[i-1] = w[i] (i - n) / (i - 1), places counted from 1
        weights[i - 2] = weights[i - 1] * (i - n) / (i - 1)
    return weights


def effective_samples(num_samples: int, n: int) -> float:
    """Samples that an estimate of best-of-n rests on: one over the sum of squared weights."""
    return float(1.0 / np.square(best_of_n_weights(num_samples, n)).sum())


def best_of_n(proxy: Floats, gold: Floats, n: int) -> float:
    """Unbiased estimate of the mean gold reward of the best of n samples by the proxy.

    Args:
        proxy: [N] scores of one prompt's samples, which choose.
        gold: [N] scores of the same samples, whose mean is estimated.
        n: at most N.
    """
    order = np.argsort(proxy, kind="stable")
    _, block, sizes = np.unique(proxy[order], return_inverse=True, return_counts=True)
    # Which of several samples with one proxy score comes first is no choice of the proxy's.
    means = np.bincount(block, weights=gold[order]) / sizes
    return float(best_of_n_weights(len(proxy), n) @ means[block])


def best_of_n_curve(
    prompts: Sequence[tuple[Floats, Floats]], *, num_resamples: int = 1000, seed: int = 0
) -> Curve:
    """The best-of-n curve of some prompts' samples, for n = 1, 2, 4 ... up to half of the smallest number of samples.

    Args:
        prompts: proxy and gold scores [N] of each prompt's samples, all drawn from the original model.
        num_resamples: of the bootstrap over prompts.
        seed: of the bootstrap.

    Raises:
        ValueError: there is no prompt, or one with fewer than 4 samples.
    """
    smallest = min((len(proxy) for proxy, _ in prompts), default=0)
    if smallest < 4:
        raise ValueError("best-of-n needs prompts with at least 4 samples")
    numbers = [2**power for power in range(smallest.bit_length()) if 2 ** (power + 1) <= smallest]
    proxies = np.array([[best_of_n(p, p, n) for n in numbers] for p, _ in prompts])
    golds = np.array([[best_of_n(p, g, n) for n in numbers] for p, g in prompts])
    distances = np.sqrt([best_of_n_kl(n) for n in numbers])
    points = tuple(
        CurvePoint(
            label=n,
            kl=best_of_n_kl(n),
            distance=float(distances[i]),
            proxy=float(proxies[:, i].mean()),
            gold=float(golds[:, i].mean()),
            effective=effective_samples(smallest, n),
        )
        for i, n in enumerate(numbers)
    )
    random = np.random.default_rng(seed)
    resampled = golds[random.integers(len(golds), size=(num_resamples, len(golds)))].mean(1)
    gains = resampled - resampled[:, :1]
    deviations = gains[:, 1:].std(0)
    fitted = None
    if len(numbers) >= 3:
        gain = golds.mean(0) - golds[:, 0].mean()
        fitted = fit(
            distances[1:],
            gain[1:],
            Form.BEST_OF_N,
            resampled=[(distances[1:], one[1:]) for one in gains],
            deviations=deviations if (deviations > 0).all() else None,
        )
    return Curve(
        form=Form.BEST_OF_N, points=points, base_gold=float(golds[:, 0].mean()), fit=fitted
    )


def training_curve(
    points: Sequence[CurvePoint],
    base_gold: float,
    *,
    min_distance: float = 0.3,
    num_resamples: int = 1000,
    seed: int = 0,
) -> Curve:
    """The curve of a run's checkpoints.

    Args:
        points: of the checkpoints.
        base_gold: gold reward of the original model.
        min_distance: points nearer than this are not fitted, since the form has an infinite slope at 0.
        num_resamples: of the bootstrap over the points.
        seed: of the bootstrap.
    """
    kept = [point for point in points if point.distance >= min_distance]
    fitted = None
    if len(kept) >= 4:
        distances = np.array([point.distance for point in kept])
        gains = np.array([point.gold - base_gold for point in kept])
        random = np.random.default_rng(seed)
        chosen = random.integers(len(kept), size=(num_resamples, len(kept)))
        resampled = [
            (distances[places], gains[places])
            for places in chosen
            if len(np.unique(distances[places])) >= 3
        ]
        fitted = fit(distances, gains, Form.TRAINING, resampled=resampled)
    return Curve(form=Form.TRAINING, points=tuple(points), base_gold=base_gold, fit=fitted)


def fit(
    distances: Floats,
    gains: Floats,
    form: Form,
    *,
    resampled: Sequence[tuple[Floats, Floats]],
    deviations: Floats | None = None,
) -> Fit:
    """Fit a form by weighted least squares.

    Args:
        distances: [M] roots of the KL, above 0.
        gains: [M] gold rewards less the original model's.
        form: what is fitted.
        resampled: distances and gains of the bootstrap's resamples.
        deviations: [M] standard errors of the gains; None weights all alike.
    """
    found = _solved(distances, gains, form, deviations)
    resamples = np.array([_solved(d, g, form, deviations) for d, g in resampled])
    peak = _peak(found, form)
    peaks = np.array([_peak(one, form) or (math.inf, math.inf) for one in resamples])
    half = np.median(distances)
    low = distances <= half
    error = math.nan
    if low.sum() >= 2 and (~low).any():
        early = _solved(
            distances[low], gains[low], form, None if deviations is None else deviations[low]
        )
        missed = _terms(distances[~low], form) @ early - gains[~low]
        error = float(np.sqrt(np.square(missed).mean()))
    return Fit(
        form=form,
        alpha=_interval(float(found[0]), resamples[:, 0]),
        beta=_interval(float(found[1]), resamples[:, 1]),
        peak_distance=None if peak is None else _interval(peak[0], peaks[:, 0]),
        peak_gain=None if peak is None else _interval(peak[1], peaks[:, 1]),
        is_extrapolated=peak is not None
        and not float(distances.min()) <= peak[0] <= float(distances.max()),
        extrapolation_error=error,
    )


def _terms(distances: Floats, form: Form) -> Floats:
    """[M, 2] what alpha and beta are multiplied with."""
    second = distances if form is Form.BEST_OF_N else np.log(np.maximum(distances, 1e-12))
    return np.stack([distances, -distances * second], axis=1)


def _solved(distances: Floats, gains: Floats, form: Form, deviations: Floats | None) -> Floats:
    terms, values = _terms(distances, form), gains
    if deviations is not None:
        terms, values = terms / deviations[:, None], values / deviations
    return np.asarray(np.linalg.lstsq(terms, values, rcond=None)[0], dtype=np.float64)


def _peak(coefficients: Floats, form: Form) -> tuple[float, float] | None:
    """Distance and gain of the maximum; None where there is none at a positive distance."""
    alpha, beta = float(coefficients[0]), float(coefficients[1])
    if beta <= 0 or (form is Form.BEST_OF_N and alpha <= 0):
        return None
    if form is Form.BEST_OF_N:
        return alpha / (2 * beta), alpha**2 / (4 * beta)
    exponent = alpha / beta - 1
    if exponent > 50:  # farther than any policy goes
        return None
    distance = math.exp(exponent)
    return distance, beta * distance


def _interval(value: float, resamples: Floats) -> Interval:
    if not len(resamples):
        return Interval(value=value, low=math.nan, high=math.nan)
    ordered = np.sort(resamples)
    low, high = (ordered[round(share * (len(ordered) - 1))] for share in (0.025, 0.975))
    return Interval(value=value, low=float(low), high=float(high))
