"""Best-of-n estimates, fits of both forms, and peaks: exact weights, recovered coefficients, honest extrapolation."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from numpy.typing import NDArray

from quark.evaluation.overoptimization import (
    CurvePoint,
    Form,
    best_of_n,
    best_of_n_curve,
    best_of_n_kl,
    best_of_n_weights,
    effective_samples,
    training_curve,
)


@pytest.mark.parametrize("num_samples", [1, 2, 5, 9])
def test_the_weights_are_those_of_the_exact_binomials(num_samples: int) -> None:
    for n in range(1, num_samples + 1):
        exact = [
            Fraction(math.comb(i - 1, n - 1), math.comb(num_samples, n))
            for i in range(1, num_samples + 1)
        ]
        assert sum(exact) == 1
        assert best_of_n_weights(num_samples, n) == pytest.approx([float(w) for w in exact])


def test_the_estimate_is_the_mean_over_all_subsets() -> None:
    random = np.random.default_rng(0)
    proxy, gold = random.normal(size=7), random.normal(size=7)
    for n in range(1, 8):
        chosen = [gold[max(s, key=lambda i: proxy[i])] for s in itertools.combinations(range(7), n)]
        assert best_of_n(proxy, gold, n) == pytest.approx(np.mean(chosen))


def test_the_order_of_samples_with_one_proxy_score_does_not_matter() -> None:
    proxy = np.array([1.0, 1.0, 0.0, 1.0])
    gold = np.array([5.0, 1.0, 0.0, 3.0])
    values = {
        round(best_of_n(proxy[list(order)], gold[list(order)], 2), 9)
        for order in itertools.permutations(range(4))
    }
    assert values == {3.0}  # of two samples at least one has proxy 1, whose mean gold is 3


def test_gold_goes_with_its_sample() -> None:
    proxy = np.array([3.0, 1.0, 2.0, 0.0])
    assert best_of_n(proxy, np.array([9.0, 0.0, 0.0, 0.0]), 4) == 9.0
    assert best_of_n(proxy, np.array([0.0, 0.0, 0.0, 9.0]), 4) == 0.0


def test_the_kl_of_best_of_n() -> None:
    said = {1: 0.0, 2: 0.193, 16: 1.835, 64: 3.175, 1000: 5.909, 12500: 8.434, 60000: 10.002}
    for n, kl in said.items():
        assert best_of_n_kl(n) == pytest.approx(kl, abs=5e-4)


def test_a_best_of_all_rests_on_one_sample() -> None:
    assert effective_samples(100, 100) == pytest.approx(1.0)
    assert effective_samples(100, 1) == pytest.approx(100.0)


def planted(
    form: Form, alpha: float, beta: float, distances: NDArray[np.float64]
) -> list[CurvePoint]:
    second = distances if form is Form.BEST_OF_N else np.log(distances)
    gains = distances * (alpha - beta * second)
    return [
        CurvePoint(
            label=i,
            kl=float(d * d),
            distance=float(d),
            proxy=float(d),
            gold=1 + float(g),
            effective=math.nan,
        )
        for i, (d, g) in enumerate(zip(distances, gains, strict=True))
    ]


def test_a_planted_training_curve_is_recovered_with_its_peak() -> None:
    curve = training_curve(planted(Form.TRAINING, 0.9, 0.5, np.linspace(0.5, 4, 12)), 1.0)
    fit = curve.fit
    assert fit is not None
    assert fit.peak_distance is not None
    assert fit.peak_gain is not None
    assert (fit.alpha.value, fit.beta.value) == (pytest.approx(0.9), pytest.approx(0.5))
    distance = math.exp(0.9 / 0.5 - 1)
    assert fit.peak_distance.value == pytest.approx(distance)
    assert fit.peak_gain.value == pytest.approx(0.5 * distance)
    assert not fit.is_extrapolated
    assert curve.is_past_its_peak
    assert fit.extrapolation_error == pytest.approx(0.0, abs=1e-9)
    assert abs(curve.best.distance - distance) < 0.4


def test_a_peak_that_was_not_reached_is_no_fact() -> None:
    curve = training_curve(planted(Form.TRAINING, 0.9, 0.5, np.linspace(0.5, 1.5, 8)), 1.0)
    assert curve.fit is not None
    assert curve.fit.is_extrapolated
    assert not curve.is_past_its_peak


def test_points_too_near_to_the_original_are_not_fitted() -> None:
    points = planted(Form.TRAINING, 0.9, 0.5, np.linspace(0.01, 0.29, 8))
    assert training_curve(points, 1.0).fit is None


def pool_of(
    gold_of: str, num_prompts: int, num_samples: int
) -> list[tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """Samples whose proxy is normal; the gold one is a function of its quantile, or the proxy less noise."""
    random = np.random.default_rng(5)
    prompts = []
    for _ in range(num_prompts):
        quality, noise = random.normal(size=(2, num_samples))
        if gold_of == "noise":
            prompts.append((quality + noise, quality))
        else:
            prompts.append((quality, -np.square(quality - 1.0)))
    return prompts


def test_a_proxy_that_is_gold_plus_noise_does_not_over_optimize() -> None:
    curve = best_of_n_curve(pool_of("noise", 60, 64), num_resamples=200)
    golds = [point.gold for point in curve.points]
    assert [point.label for point in curve.points] == [1, 2, 4, 8, 16, 32]
    assert golds == sorted(golds)
    # Half of the variance is noise: gold gains the share 1 / sqrt(2) of what the proxy's quantiles gain.
    assert golds[-1] - golds[0] == pytest.approx(2.07 / math.sqrt(2), abs=0.25)
    assert not curve.is_past_its_peak


def test_a_gold_reward_that_falls_beyond_a_point_has_its_peak_there() -> None:
    curve = best_of_n_curve(pool_of("peak", 60, 128), num_resamples=200)
    fit = curve.fit
    assert fit is not None
    assert fit.peak_distance is not None
    assert not fit.is_extrapolated
    assert fit.peak_distance.low <= fit.peak_distance.value <= fit.peak_distance.high
    assert curve.is_past_its_peak
    assert curve.best.label in (2, 4, 8)
    assert curve.base_gold == pytest.approx(-2.0, abs=0.3)


def test_the_fit_recovers_alpha_and_beta_through_noise() -> None:
    distances = np.linspace(0.3, 3, 20)
    random = np.random.default_rng(1)
    points = planted(Form.TRAINING, 0.35, 0.12, distances)
    noisy = [
        CurvePoint(
            label=p.label,
            kl=p.kl,
            distance=p.distance,
            proxy=p.proxy,
            gold=p.gold + 0.01 * random.normal(),
            effective=p.effective,
        )
        for p in points
    ]
    fit = training_curve(noisy, 1.0, num_resamples=300).fit
    assert fit is not None
    assert fit.alpha.low < 0.35 < fit.alpha.high
    assert fit.beta.low < 0.12 < fit.beta.high
    assert fit.alpha.high - fit.alpha.low < 0.05


@pytest.mark.parametrize("num_samples", [0, 3])
def test_too_few_samples_are_refused(num_samples: int) -> None:
    prompts = pool_of("noise", 1, num_samples) if num_samples else []
    with pytest.raises(ValueError, match="at least 4 samples"):
        best_of_n_curve(prompts)
