"""The information of reward tokens, and best-of-n, against cases computed by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from quark.evaluation.best_of_n import best_of_n, best_of_n_kl, best_of_n_weights
from quark.evaluation.conditioning import Conditioning, measure_conditioning
from tests.evaluation.test_evaluator import evaluate
from tests.tiny import tiny_policy


def test_tokens_that_all_write_the_same_carry_nothing() -> None:
    found = Conditioning.of(
        np.full((3, 4, 3), -7.0), np.arange(12, dtype=np.float32).reshape(3, 4), per_prompt=2
    )
    assert found.information.mean == 0.0
    assert found.label_accuracy.mean == pytest.approx(1 / 3)
    assert found.rank_correlation > 0.9
    assert found.has_collapsed


def test_tokens_that_each_write_their_own_text_carry_everything() -> None:
    logprobs = np.full((3, 4, 3), -900.0)
    for k in range(3):
        logprobs[k, :, k] = -1.0
    found = Conditioning.of(logprobs, np.full((3, 4), np.nan, dtype=np.float32), per_prompt=1)
    assert found.information.mean == pytest.approx(math.log(3))
    assert found.label_accuracy.mean == 1.0
    assert math.isnan(found.rank_correlation)
    assert not found.has_collapsed


def test_information_by_hand() -> None:
    """p(y | r_0) = (0.9, 0.1) and p(y | r_1) = (0.4, 0.6), with each text as often as it is written."""
    first, second = np.log([0.9, 0.4]), np.log([0.1, 0.6])  # of text 0 and 1, under both tokens
    logprobs = np.array([[first] * 9 + [second], [first] * 4 + [second] * 6])
    found = Conditioning.of(logprobs, np.zeros((2, 10), dtype=np.float32), per_prompt=1)
    mixture = np.array([0.65, 0.35])
    expected = 0.5 * sum(
        p * math.log(p / m)
        for row in ((0.9, 0.1), (0.4, 0.6))
        for p, m in zip(row, mixture, strict=True)
    )
    assert found.information.mean == pytest.approx(expected)


def test_it_is_measured_on_the_completions_of_every_token() -> None:
    """Equal tokens carry nothing; tokens that differ are told apart in their own completions."""
    policy = tiny_policy()
    evaluations = [evaluate(k) for k in range(5)]
    found = measure_conditioning(policy, evaluations, per_prompt=2, batch_size=4)
    assert 0.0 < found.information.mean <= math.log(5)
    with torch.no_grad():
        policy.reward_vectors[:] = policy.reward_vectors[0].clone()
    same = measure_conditioning(policy, evaluations, per_prompt=2, batch_size=64)
    assert same.information.mean == pytest.approx(0.0, abs=1e-5)


def test_best_of_n_is_the_mean_over_all_subsets() -> None:
    rng = np.random.default_rng(0)
    scores, gold = rng.normal(size=(2, 6)), rng.normal(size=(2, 6))
    scores[1, 3] = scores[1, 5]  # a tie, whose two samples share their mean
    gold[1, [3, 5]] = gold[1, [3, 5]].mean()
    for n in (1, 2, 4, 6):
        expected = [
            np.mean(
                [g[max(part, key=s.__getitem__)] for part in itertools.combinations(range(6), n)]
            )
            for s, g in zip(scores, gold, strict=True)
        ]
        assert best_of_n(scores, gold, n) == pytest.approx(expected)
        assert best_of_n_weights(6, n).sum() == pytest.approx(1.0)


def test_the_divergence_of_best_of_n() -> None:
    assert [best_of_n_kl(n) for n in (1, 2, 16, 1000)] == pytest.approx(
        [0.0, 0.193, 1.835, 5.909], abs=1e-3
    )
    with pytest.raises(ValueError, match="best of 3 needs at least 3 samples of a prompt, not 2"):
        best_of_n_weights(2, 3)
