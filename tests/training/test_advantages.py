"""Rank advantages against their definition, one sample at a time."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from quark.objectives.advantages import COLUMNS, Advantages, standardized_ranks
from quark.objectives.config import AdvantageScope
from quark.training.loop.draws import columns_of
from tests.pool.batches import filled_alike, make_batch

SCORES = st.sampled_from([0.0, -0.0, 0.5, 1.0, -2.0, 7.0, math.nan])


@given(st.lists(st.tuples(SCORES, st.integers(0, 3)), max_size=40))
def test_ranks_are_those_of_the_definition(samples):
    scores = np.array([score for score, _ in samples], dtype=np.float32)
    groups = np.array([group for _, group in samples], dtype=np.int64)
    found = standardized_ranks(scores, groups)
    for i, (score, group) in enumerate(samples):
        rivals = [s for s, g in samples if g == group and not math.isnan(s)]
        if math.isnan(score):
            assert found[i] == 0
            continue

        def rank(x, rivals=rivals):
            return sum(y < x for y in rivals) + (sum(y == x for y in rivals) - 1) / 2

        ranks = [rank(y) for y in rivals]
        mean = sum(ranks) / len(ranks)
        deviation = math.sqrt(sum((r - mean) ** 2 for r in ranks) / len(ranks))
        expected = (rank(score) - mean) / deviation if deviation else 0.0
        assert math.isclose(found[i], expected, rel_tol=1e-5, abs_tol=1e-6)


def test_a_pool_s_samples_compete_within_their_prompt_and_round_or_within_their_round(tmp_path):
    scores = np.random.default_rng(0).integers(0, 9, (4, 30)).astype(np.float64)
    batches = [make_batch(str(i), {"reward": row}, content=i) for i, row in enumerate(scores)]
    pool, spec = filled_alike(tmp_path / "pool", batches)
    rounds, prompts = spec.column("round"), spec.column("prompt_id")
    for scope in AdvantageScope:
        ours, theirs = (
            Advantages.of(columns_of(pool, COLUMNS), scope),
            Advantages.of(columns_of(spec, COLUMNS), scope),
        )
        np.testing.assert_array_equal(ours.values, theirs.values)
        names = rounds if scope is AdvantageScope.ROUND else list(zip(rounds, prompts, strict=True))
        numbers = {name: i for i, name in enumerate(map(str, names))}
        groups = np.array([numbers[str(name)] for name in names], dtype=np.int64)
        expected = standardized_ranks(spec.scores("reward"), groups)
        np.testing.assert_array_equal(ours.values, expected)
        some = np.array([7, 0, 99], dtype=np.uint64)
        np.testing.assert_array_equal(ours.rows(some).values, ours.values[[7, 0, 99]])
        drawn, policy = spec.column("logprob_sampled"), spec.column("logprob_policy")
        expected = np.array([p if math.isnan(d) else d for d, p in zip(drawn, policy, strict=True)])
        assert 0 < np.isnan(drawn).sum() < len(drawn)
        np.testing.assert_array_equal(ours.sampled_logprobs, expected)
        assert ours.sampled_logprobs.dtype == np.float32
        np.testing.assert_array_equal(
            ours.rows(some).sampled_logprobs, ours.sampled_logprobs[[7, 0, 99]]
        )
