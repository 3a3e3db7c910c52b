"""Learning from a pool that is there: what is measured, what is said of it, and what is refused."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from quark.evaluation.frontier import Interval
from quark.evaluation.information import Information, interval_over_groups
from quark.training.fit import Fit, FitPoint, least_correlation


def point(step: int, information: float, low: float, correlation: float = 0.0) -> FitPoint:
    return FitPoint(
        step=step,
        train_information=math.nan,
        held_out=Information(
            num_samples=100,
            contrast_loss=math.log(3) - information,
            information=information,
            error=0.1,
            label_accuracy=0.5,
            rank_correlation=correlation,
            ratio_std=1.0,
        ),
        interval=Interval(mean=information, low=low, high=information + 0.1),
        drift=0.1,
    )


def fit_of(*points: FitPoint, prompts: int = 50) -> Fit:
    return Fit(
        num_quantiles=3,
        num_train=400,
        num_held_out=100,
        num_held_out_prompts=prompts,
        learning_rate=1e-4,
        points=points,
    )


@pytest.mark.parametrize(
    ("result", "begins", "holds"),
    [
        (
            fit_of(point(0, -0.1, -0.2), point(8, 0.3, 0.2), point(16, 0.1, 0.0)),
            "Yes",
            "after 8 steps",
        ),
        (fit_of(point(0, -0.1, -0.2), point(8, 0.3, 0.2)), "Yes", "more --steps"),
        (
            fit_of(point(0, 0.2, 0.1), point(1, 0.1, 0.0), prompts=9),
            "Not known",
            "9 held-out prompts",
        ),
        (fit_of(point(8, 0.05, -0.1, 0.6)), "In part", "rank correlation 0.60"),
        (fit_of(point(8, -0.5, -0.6, 0.6)), "In part", "too sure"),
        (fit_of(point(8, 0.05, -0.1)), "Not shown", "may be chance"),
        (fit_of(point(0, -0.05, -0.1), point(8, -0.3, -0.5)), "No, ", "never tell more"),
        (fit_of(point(0, math.nan, math.nan, math.nan)), "No, ", "never tell more"),
    ],
)
def test_the_verdict_is_what_the_figures_say(result: Fit, begins: str, holds: str) -> None:
    assert result.verdict.startswith(begins)
    assert holds in result.verdict
    assert result.is_learned == begins.startswith("Yes")


def test_the_best_point_is_where_the_tokens_say_most() -> None:
    points = (point(0, math.nan, math.nan), point(8, 0.1, 0.0), point(16, 0.05, 0.0))
    assert fit_of(*points).best.step == 8
    assert dataclasses.replace(fit_of(), points=points[:1]).best.step == 0


def test_a_rank_correlation_needs_groups_to_be_clear() -> None:
    assert least_correlation(0.5, 100) == pytest.approx(0.336, abs=0.002)
    assert least_correlation(0.5, 10) < 0
    assert math.isnan(least_correlation(0.5, 3))
    assert math.isnan(least_correlation(math.nan, 100))
    assert 0.9 < least_correlation(1.0, 100) < 1.0


def test_an_interval_over_groups_is_wider_than_over_samples() -> None:
    chance = np.random.default_rng(0)
    groups = np.repeat(np.arange(40), 10)
    values = chance.normal(size=40)[groups] + 0.1 * chance.normal(size=400)
    apart, together = (
        interval_over_groups(values, numbers) for numbers in (np.arange(400), groups)
    )
    assert apart.mean == together.mean == pytest.approx(values.mean())
    assert together.high - together.low > 2 * (apart.high - apart.low)
    assert together.low < together.mean < together.high


def test_an_interval_over_groups_of_different_sizes_weighs_samples() -> None:
    found = interval_over_groups(np.array([0.0, 1.0, 1.0, 1.0]), np.array([7, 9, 9, 9]))
    assert found.mean == 0.75
    assert (found.low, found.high) == (0.0, 1.0)
