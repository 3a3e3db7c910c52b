from __future__ import annotations

import math

import numpy as np
import pytest

from quark.pool.statistics import HistogramBin, RoundMean, describe, histogram, round_means

INF, NAN = math.inf, math.nan


def float32(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float32)


def test_statistics_leave_out_what_is_not_scored() -> None:
    found = describe(float32(1.0, 3.0, NAN, 3.0, 5.0))
    assert (found.num_samples, found.num_unscored, found.num_infinite) == (5, 1, 0)
    assert (found.mean, found.min, found.median, found.max) == (3.0, 1.0, 3.0, 5.0)
    assert found.std == pytest.approx(math.sqrt(2))
    assert found.repeated_share == 0.5


def test_infinite_scores_are_counted_and_leave_no_spread() -> None:
    found = describe(float32(-INF, 0.0, INF))
    assert (found.num_infinite, found.min, found.median, found.max) == (2, -INF, 0.0, INF)
    assert math.isnan(found.mean)
    assert math.isnan(found.std)


@pytest.mark.parametrize("scores", [float32(), float32(NAN, NAN)])
def test_statistics_of_no_scores_are_not_numbers(scores: np.ndarray) -> None:
    found = describe(scores)
    assert (found.num_samples, found.num_unscored) == (len(scores), len(scores))
    assert (found.num_infinite, found.repeated_share) == (0, 0.0)
    assert all(map(math.isnan, (found.mean, found.std, found.min, found.median, found.max)))


def test_a_histogram_has_equal_bins_over_the_finite_scores() -> None:
    found = histogram(float32(0.0, 1.0, 2.0, 4.0, NAN, INF), 2)
    assert found == (
        HistogramBin(low=0.0, high=2.0, num_samples=2),
        HistogramBin(low=2.0, high=4.0, num_samples=2),
    )
    assert [each.num_samples for each in histogram(float32(7.0, 7.0))] == [2]
    assert histogram(float32(NAN, INF)) == ()


def test_means_come_round_by_round() -> None:
    rounds = np.array([2, 0, 0, 2, 5, 7, 7], dtype=np.uint32)
    found = round_means(rounds, float32(1.0, 2.0, NAN, 3.0, NAN, INF, -INF))
    assert found[:2] == (
        RoundMean(round=0, num_samples=2, mean=2.0),
        RoundMean(round=2, num_samples=2, mean=2.0),
    )
    assert [(each.round, each.num_samples) for each in found[2:]] == [(5, 1), (7, 2)]
    assert all(math.isnan(each.mean) for each in found[2:])
