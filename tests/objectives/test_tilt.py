"""The token critic: the regression against a plain one, and what it finds in planted rewards."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from quark.models.token_critic import strengths_of
from quark.objectives.advantages import standardized_ranks
from quark.objectives.tilt import ridge


def plain_ridge(
    features: NDArray[np.float64], targets: NDArray[np.float64], shrinkage: float
) -> NDArray[np.float64]:
    """The prediction of each sample by a regression on all others, one at a time."""
    predicted = np.empty(len(targets))
    for i in range(len(targets)):
        others = np.arange(len(targets)) != i
        center, mean = features.mean(axis=0), targets.mean()
        # As in the closed form, the means are those of all samples but for the intercept's own leverage.
        x = np.c_[np.ones(len(targets)), features - center][others]
        penalty = shrinkage * np.eye(x.shape[1])
        penalty[0, 0] = 0.0
        weights = np.linalg.solve(x.T @ x + penalty, x.T @ (targets[others] - mean))
        predicted[i] = mean + np.r_[1.0, features[i] - center] @ weights
    return predicted


@pytest.mark.parametrize(("num_samples", "width"), [(40, 7), (12, 30)])
def test_the_regression_is_the_best_of_plain_ones_by_leaving_each_sample_out(
    num_samples: int, width: int
) -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(num_samples, width)) + 2.0
    targets = features[:, :3].sum(axis=1) + rng.normal(size=num_samples) + 5.0
    found = ridge(features, targets)
    centered = features - features.mean(axis=0)
    total = ((targets - targets.mean()) ** 2).sum()
    scale = np.square(centered).sum() / num_samples
    shares = {}
    for shrinkage in np.logspace(-4.0, 4.0, 33) * scale:
        errors = targets - plain_ridge(features, targets, shrinkage)
        shares[shrinkage] = 1.0 - errors @ errors / total
    best = max(shares, key=lambda key: shares[key])
    assert found.explained == pytest.approx(shares[best], abs=1e-9)
    gram = centered.T @ centered + best * np.eye(width)
    expected = np.linalg.solve(gram, centered.T @ (targets - targets.mean()))
    assert np.allclose(found.weights, expected)


def test_noise_explains_nothing_and_gives_no_weight() -> None:
    explained = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        found = ridge(rng.normal(size=(60, 40)), rng.normal(size=60))
        explained.append(found.explained)
        assert (found.explained == 0.0) == (not found.weights.any())
    assert np.mean(explained) < 0.03


@pytest.mark.parametrize(
    "targets", [np.zeros(5), np.ones(2), np.zeros(0)], ids=["constant", "two samples", "none"]
)
def test_nothing_to_explain_gives_no_weight(targets: NDArray[np.float64]) -> None:
    found = ridge(np.ones((len(targets), 3)) if len(targets) else np.zeros((0, 3)), targets)
    assert found.explained == 0.0
    assert not found.weights.any()


def test_ranks_that_are_one_token_are_explained_by_it() -> None:
    rng = np.random.default_rng(1)
    features = rng.normal(size=(200, 8))
    found = ridge(features, standardized_ranks(features[:, 2], np.zeros(200, dtype=np.int64)))
    assert found.explained > 0.9
    assert np.abs(found.weights).argmax() == 2


def test_strengths_are_symmetric_and_as_far_apart_as_a_normal_distribution_is() -> None:
    assert strengths_of(3.0, 2).tolist() == [-3.0, 3.0]
    assert strengths_of(2.0, 1).tolist() == [2.0]
    five = strengths_of(2.0, 5)
    assert five[0] == -2.0
    assert five[4] == 2.0
    assert five[2] == pytest.approx(0.0, abs=1e-6)
    assert five[3] == pytest.approx(2.0 * 0.5244 / 1.2816, abs=1e-3)
