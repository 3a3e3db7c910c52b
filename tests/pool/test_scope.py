"""What a ranking ranks: combinations of columns, parts of the pool, prompts apart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from quark.pool.base import RemainderRule
from quark.pool.memory import MemoryPool
from quark.pool.native import NativePool
from quark.pool.scope import (
    Lowest,
    MeanMinusVariance,
    RankMean,
    Scope,
    Score,
    WeightedSum,
    try_condition,
    values_of,
)
from quark.pool.scrambling import scramble
from tests.pool.batches import VOCAB_SIZE, make_batch

NAN = float("nan")
SCORES = st.lists(st.sampled_from([NAN, 0.0, 0.1, 0.5, 1.0]), min_size=1, max_size=12)


@pytest.fixture
def pool(tmp_path: Path) -> NativePool:
    pool = NativePool.create(tmp_path / "pool", vocab_size=VOCAB_SIZE)
    rng = np.random.default_rng(0)
    for i in range(6):
        scores = {"reward": rng.random(20).tolist(), "judge": rng.random(20).tolist()}
        pool.append(make_batch(f"run/{i}", scores, content=i))
    return pool


@pytest.mark.parametrize(
    ("score", "expected"),
    [
        (WeightedSum({"a": 2.0, "b": -1.0}), [-1.0, 1.5, NAN]),
        (Lowest(["a", "b"]), [1.0, 2.0, NAN]),
        (MeanMinusVariance(["a", "b"], 0.5), [2.0 - 0.5, 2.25 - 0.5 / 16, NAN]),
        (RankMean(["a", "b"]), [(1 / 4 + 5 / 6) / 2, (3 / 4 + 3 / 6) / 2, NAN]),
    ],
)
def test_a_combination_is_what_it_says(tmp_path: Path, score: Score, expected: list[float]) -> None:
    pool = NativePool.create(tmp_path / "pool", vocab_size=VOCAB_SIZE)
    pool.append(make_batch("run/0", {"a": [1.0, 2.0, NAN], "b": [3.0, 2.5, 1.0]}))
    np.testing.assert_allclose(values_of(pool, score, Scope()), np.array(expected, np.float32))


def test_ties_share_their_rank(tmp_path: Path) -> None:
    pool = NativePool.create(tmp_path / "pool", vocab_size=VOCAB_SIZE)
    pool.append(make_batch("run/0", {"a": [1.0, 1.0, 0.0, 5.0]}))
    shares = values_of(pool, RankMean(["a"]), Scope())
    np.testing.assert_allclose(shares, [0.5, 0.5, 0.125, 0.875])


def test_only_the_newest_rounds_are_ranked(pool: NativePool) -> None:
    rounds = pool.column("round")
    newest = np.unique(rounds)[-2:]
    labels = pool.quantize(3, scope=Scope(last_rounds=2)).labels()
    np.testing.assert_array_equal(labels >= 0, np.isin(rounds, newest))
    assert (pool.quantize(3, scope=Scope(last_rounds=99)).labels() >= 0).all()


def test_a_condition_chooses_samples(pool: NativePool) -> None:
    judge, tokens = pool.scores("judge"), pool.column("reward_token")
    scope = Scope(where="judge > 0.5 AND reward_token IN (1, 2)")
    quantization = pool.quantize(4, scope=scope)
    inside = (judge > 0.5) & np.isin(tokens, [1, 2])
    assert 0 < inside.sum() < len(pool)
    np.testing.assert_array_equal(quantization.labels() >= 0, inside)
    assert quantization.counts.max() - quantization.counts.min() <= 1
    ids, _ = quantization.sampler(batch_size=50, seed=0).draw(0)
    assert inside[ids].all()


def test_a_missing_score_holds_for_no_condition(tmp_path: Path) -> None:
    pool = NativePool.create(tmp_path / "pool", vocab_size=VOCAB_SIZE)
    pool.append(make_batch("run/0", {"a": [1.0, 2.0], "b": [NAN, 1.0]}))
    for where in ("b < 5", "NOT b > 5"):
        assert pool.quantize(1, score="a", scope=Scope(where=where)).labels().tolist() == [-1, 0]


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("-chunk < 0", [False, True, True]),
        ("chunk - 3 < -2", [True, False, False]),
        ("chunk * 1000000000 > 4500000000", [False, False, True]),
    ],
)
def test_a_condition_computes_beyond_the_types_of_the_columns(
    tmp_path: Path, where: str, expected: list[bool]
) -> None:
    pool = NativePool.create(tmp_path / "pool", vocab_size=VOCAB_SIZE)
    for chunk in (0, 1, 5):
        pool.append(replace(make_batch(f"run/{chunk}", {"reward": [0.5]}), chunk=chunk))
    labels = pool.quantize(1, scope=Scope(where=where)).labels()
    np.testing.assert_array_equal(labels >= 0, expected)


def test_each_prompt_is_cut_for_itself(pool: NativePool) -> None:
    labels = pool.quantize(2, scope=Scope(per_prompt=True)).labels()
    prompts, rewards = pool.column("prompt_id"), pool.scores("reward")
    for prompt in np.unique(prompts):
        of_prompt = prompts == prompt
        best = rewards[of_prompt & (labels == 1)]
        worst = rewards[of_prompt & (labels == 0)]
        assert abs(len(best) - len(worst)) <= 1
        assert worst.max(initial=-1) < best.min(initial=2)


def test_the_only_sample_of_a_prompt_is_in_the_middle(tmp_path: Path) -> None:
    pool = NativePool.create(tmp_path / "pool", vocab_size=VOCAB_SIZE)
    pool.append(make_batch("run/0", {"reward": [0.3]}))
    assert pool.quantize(5, scope=Scope(per_prompt=True)).labels().tolist() == [2]


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("rewrad > 0", "names rewrad; there are prompt_id"),
        ("reward >", "no SQL expression"),
        ("reward + 1", "no condition"),
        ("1 = 1", "names no column"),
        ("MAX(reward) > 0", "no condition"),
        ("reward > 'x'", "cannot be computed"),
    ],
)
def test_a_bad_condition_is_named(pool: NativePool, where: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        pool.quantize(2, scope=Scope(where=where))
    assert repr(where) in str(caught.value)
    with pytest.raises(ValueError, match=message):  # before there is a pool
        try_condition(where, pool.score_columns)


def test_what_makes_no_sense_is_refused(pool: NativePool) -> None:
    with pytest.raises(ValueError, match="last_rounds is 0"):
        Scope(last_rounds=0)
    with pytest.raises(ValueError, match="max_per_round is 0"):
        Scope(max_per_round=0)
    with pytest.raises(ValueError, match="min_score is not"):
        Scope(min_score=NAN)
    with pytest.raises(ValueError, match="seed is -1"):
        Scope(seed=-1)
    with pytest.raises(ValueError, match="no meaning within prompts"):
        pool.quantize(2, scope=Scope(per_prompt=True), remainder=RemainderRule.LOWEST)
    with pytest.raises(KeyError, match="rewrad"):
        pool.quantize(2, score=Lowest(["reward", "rewrad"]))
    with pytest.raises(ValueError, match="at least one"):
        Lowest([])
    with pytest.raises(KeyError, match="rewrad"):
        pool.column("rewrad")


def test_values_follow_a_combination_of_ones_own(pool: NativePool) -> None:
    class Signed:
        columns = ("reward",)
        sign = 1.0

        def combine(self, scores: Sequence[NDArray[np.float32]]) -> NDArray[np.float64]:
            return np.asarray(scores[0] * self.sign, np.float64)

    score = Signed()
    best = pool.quantize(2, score=score).labels() == 1
    score.sign = -1.0
    np.testing.assert_array_equal(pool.quantize(2, score=score).labels() == 0, best)


def test_a_ranking_is_of_one_snapshot_whatever_is_committed_meanwhile(pool: NativePool) -> None:
    class Appends:
        columns = ("reward",)

        def combine(self, scores: Sequence[NDArray[np.float32]]) -> NDArray[np.float64]:
            pool.append(make_batch("meanwhile", {"reward": [9.0] * 10}))
            return scores[0].astype(np.float64)

    before = pool.snapshot
    cut = pool.quantize(2, score=Appends(), scope=Scope(last_rounds=99))
    assert cut.snapshot == before != pool.snapshot
    assert cut.counts.tolist() == [60, 60]


def test_values_follow_the_snapshot(pool: NativePool) -> None:
    scope = Scope(where="reward >= 0")
    assert pool.quantize(2, scope=scope).counts.sum() == 120
    pool.append(make_batch("more", {"reward": [0.5] * 10}))
    assert pool.quantize(2, scope=scope).counts.sum() == 130
    pool.rescore("reward", lambda prompts, completions: [-1.0] * len(completions))
    assert pool.quantize(2, scope=scope).counts.sum() == 0


@given(
    rounds=st.lists(st.tuples(st.integers(0, 3), SCORES), min_size=1, max_size=6),
    quota=st.integers(1, 8),
    seed=st.integers(0, 2**64 - 1),
    min_score=st.sampled_from([None, 0.1, 0.5]),
)
@settings(max_examples=60)
def test_threshold_and_quota_choose_by_score_and_then_by_hash(
    rounds: list[tuple[int, list[float]]], quota: int, seed: int, min_score: float | None
) -> None:
    pool = MemoryPool(vocab_size=VOCAB_SIZE)
    for number, (round, scores) in enumerate(rounds):
        batch = make_batch(str(number), {"reward": scores}, content=number)
        pool.append(replace(batch, round=round))
    scope = Scope(min_score=min_score, max_per_round=quota, seed=seed)
    labels = pool.quantize(3, scope=scope).labels()
    scores = pool.scores("reward")
    enough = -math.inf if min_score is None else np.float32(min_score)
    for number in range(4):
        fits = [id for id in range(len(pool)) if scores[id] >= enough]
        fits = [id for id in fits if pool.column("round")[id] == number]
        expected = sorted(fits, key=lambda id: scramble(seed, id))[:quota]
        of_round = np.flatnonzero((labels >= 0) & (pool.column("round") == number))
        assert of_round.tolist() == sorted(expected)


def test_a_threshold_alone_is_a_quantile_of_what_passes_it(pool: NativePool) -> None:
    rewards = pool.scores("reward")
    labels = pool.quantize(1, scope=Scope(min_score=0.5)).labels()
    np.testing.assert_array_equal(labels == 0, rewards >= 0.5)
    assert 0 < (labels == 0).sum() < len(pool)
