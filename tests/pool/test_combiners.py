"""Combinations of an ensemble's scores: identities, scales, missing members, and what stays with its sample."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from quark.errors import RunDirectoryError
from quark.pool.combiners import CombinerConfig, Ensemble, Rule, Standard, combined, standard_of
from quark.pool.disagreement import disagreement, kendall_tau
from quark.pool.memory import MemoryPool
from quark.pool.native import NativePool
from quark.pool.ranking import RankingRules
from quark.pool.scope import Scope, values_of
from quark.pool.standards import Standards, recorded_ensemble
from tests.pool.batches import VOCAB_SIZE, make_batch

MEMBERS = ("member_1", "member_2", "member_3")
Z = np.array([[0.0, 1.0, -2.0, 0.5], [2.0, 1.0, 0.0, -0.5], [1.0, 1.0, 5.0, 0.0]])
matrices = st.integers(1, 6).flatmap(
    lambda k: st.lists(
        st.lists(st.floats(-50, 50), min_size=k, max_size=k), min_size=1, max_size=20
    ).map(lambda rows: np.array(rows).T)
)


def by(rule: Rule, **settings: float) -> CombinerConfig:
    return CombinerConfig.model_validate({"rule": rule, **settings})


def test_the_rules_of_coste_et_al() -> None:
    assert combined(Z, by("mean")) == pytest.approx(Z.mean(0))
    assert combined(Z, by("worst")) == pytest.approx([0.0, 1.0, -2.0, -0.5])
    # The population variance, not the deviation, and not divided by k - 1.
    variance = ((Z - Z.mean(0)) ** 2).sum(0) / 3
    assert combined(Z, by("uwo", penalty=0.5)) == pytest.approx(Z.mean(0) - 0.5 * variance)
    assert combined(Z, by("quantile", quantile=0.5)) == pytest.approx(np.median(Z, axis=0))


@given(matrices)
def test_identities_hold_for_any_scores(z: NDArray[np.float64]) -> None:
    mean, worst = combined(z, by("mean")), combined(z, by("worst"))
    assert np.array_equal(combined(z, by("uwo", penalty=0.0)), mean)
    assert (worst <= mean + 1e-9).all()
    assert (combined(z, by("uwo", penalty=0.3)) <= mean + 1e-9).all()
    assert np.allclose(combined(z, by("quantile", quantile=0.0)), worst)
    robust = combined(z, by("robust", softness=0.7))
    assert (worst - 1e-9 <= robust).all()
    assert (robust <= mean + 1e-9).all()
    if len(z) == 1:
        for rule in ("worst", "robust", "quantile", "uwo"):
            assert np.allclose(combined(z, by(rule)), mean)


def test_the_robust_rule_has_the_others_as_its_limits() -> None:
    assert combined(Z, by("robust", softness=1e6)) == pytest.approx(
        combined(Z, by("mean")), abs=1e-5
    )
    assert combined(Z, by("robust", softness=1e-3)) == pytest.approx(
        combined(Z, by("worst")), abs=2e-3
    )
    close = 0.02 * Z  # where members nearly agree, it is UWO
    assert combined(close, by("robust", softness=0.5)) == pytest.approx(
        combined(close, by("uwo", penalty=1.0)), abs=1e-4
    )
    far = np.array([[0.0], [5000.0]])  # exp(-far) is 0, exp(far) infinite
    assert combined(far, by("robust", softness=0.1)) == pytest.approx([0.1 * np.log(2)])


def ensemble(combiner: CombinerConfig, *standards: tuple[float, float]) -> Ensemble:
    scales = standards or ((0.0, 1.0),) * len(MEMBERS)
    return Ensemble(
        columns=MEMBERS,
        standards=tuple(Standard(mean=mean, deviation=deviation) for mean, deviation in scales),
        combiner=combiner,
    )


@pytest.mark.parametrize("rule", ["mean", "worst", "uwo", "robust", "quantile"])
def test_another_scale_of_a_member_changes_nothing_once_standardized(rule: Rule) -> None:
    scores = [row.astype(np.float32) for row in Z]
    scaled = [scores[0], 100 * scores[1] + 7, scores[2]]
    values = []
    for columns in (scores, scaled):
        standards = [standard_of(column) for column in columns]
        one = ensemble(by(rule), *((s.mean, s.deviation) for s in standards))
        values.append(one.combine(columns))
    assert values[0] == pytest.approx(values[1], abs=1e-5)


@pytest.mark.parametrize(
    "rule", ["mean", "worst", "uwo", "robust", "quantile", "rank_mean", "rank_min"]
)
def test_a_sample_without_one_members_score_has_none(rule: Rule) -> None:
    scores = [row.astype(np.float32) for row in Z]
    scores[1][2] = np.nan
    assert np.isnan(ensemble(by(rule)).combine(scores)).tolist() == [False, False, True, False]


def test_ranks_need_no_scale() -> None:
    scores = [
        np.array(row, dtype=np.float32) for row in ([1, 2, 3, 4], [10, 40, 20, 30], [0, 0, 0, 1])
    ]
    shares = np.array([[1, 3, 5, 7], [1, 7, 3, 5], [3, 3, 3, 7]]) / 8
    wide = ((0.0, 1e-9), (0.0, 1.0), (0.0, 1e9))
    assert ensemble(by("rank_mean"), *wide).combine(scores) == pytest.approx(shares.mean(0))
    assert ensemble(by("rank_min"), *wide).combine(scores) == pytest.approx(shares.min(0))


@pytest.fixture
def pool(tmp_path: Path) -> NativePool:
    random = np.random.default_rng(4)
    made = NativePool.create(tmp_path / "pool", vocab_size=VOCAB_SIZE)
    for chunk in range(2):
        columns = {name: random.normal(size=12).astype(np.float32) for name in MEMBERS}
        gold = np.arange(12, dtype=np.float32) + 100 * chunk
        mean = np.mean(list(columns.values()), axis=0)
        scores = {"reward": mean.tolist(), "gold": gold.tolist()}
        scores |= {name: values.tolist() for name, values in columns.items()}
        made.append(
            dataclasses.replace(make_batch(f"run/{chunk}/0", scores, content=chunk), round=chunk)
        )
    return made


def test_gold_follows_its_sample_through_every_ranking(pool: NativePool) -> None:
    standards = Standards.measured(pool, MEMBERS)
    gold = pool.scores("gold")
    for rule in ("mean", "worst", "uwo", "robust", "quantile", "rank_mean", "rank_min"):
        one = standards.ensemble(by(rule))
        values = values_of(pool, one, Scope())
        labels = RankingRules(num_quantiles=3, ensemble=one).quantize(pool).labels()
        # A pool that holds the same samples in another order gives each the same label and gold.
        order = np.argsort(-values, kind="stable")
        assert (np.diff(labels[order]) <= 0).all()
        for sample in pool.samples([int(i) for i in order[:5]]):
            assert sample.scores["gold"] == gold[sample.id]
    pool.close()


def test_the_scales_are_those_of_the_first_round_and_survive_their_file(
    pool: NativePool, tmp_path: Path
) -> None:
    standards = Standards.measured(pool, MEMBERS)
    first = pool.scores("member_2")[:12].astype(np.float64)
    assert standards.members["member_2"].mean == pytest.approx(first.mean())
    assert standards.members["member_2"].deviation == pytest.approx(first.std())
    path = tmp_path / "standards.json"
    standards.write(path)
    assert Standards.read(path) == standards
    config = {
        "reward": {"name": "ensemble", "members": ["a/", "b/", "c/"]},
        "combiner": {"rule": "worst"},
    }
    assert recorded_ensemble(config, path) == standards.ensemble(by("worst"))
    assert recorded_ensemble({"reward": {"name": "sentiment"}}, path) is None
    assert recorded_ensemble(config, tmp_path / "none.json") is None
    pool.close()


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "{",
        '{"members": {"member_1": {"mean": 0}}}',
        '{"members": {"member_1": {"mean": 0, "deviation": 0}}}',
        '{"members": {"member_1": {"mean": NaN, "deviation": 1}}}',
    ],
)
def test_a_damaged_file_of_scales_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "standards.json"
    path.write_text(content)
    with pytest.raises(RunDirectoryError, match=r"standards\.json"):
        Standards.read(path)


def test_scales_of_a_newer_quark_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "standards.json"
    path.write_text(json.dumps({"format_version": 2, "members": {}}))
    with pytest.raises(RunDirectoryError, match="newer quark"):
        Standards.read(path)


def test_disagreement_tells_who_is_lowest_and_where_members_differ() -> None:
    pool = MemoryPool(vocab_size=VOCAB_SIZE, tie_seed=0)
    scores = {
        "reward": [0.0, 1.0, 2.0, 3.0],
        "member_1": [0.0, 1.0, 2.0, 3.0],
        "member_2": [0.0, 1.0, 2.0, -3.0],
        "member_3": [0.0, 1.0, 2.0, 4.0],
    }
    pool.append(make_batch("run/0/0", scores, content=1))
    labels = np.array([0, 0, 1, 1], dtype=np.int16)
    found = disagreement(pool, ensemble(by("mean")), labels, num_quantiles=2, new=range(4))
    assert found.means == pytest.approx([1.5, 0.0, 1.75])
    assert found.lowest_share == [0.75, 0.25, 0.0]  # of equal ones the first
    assert found.by_quantile == pytest.approx([0.0, np.std([3, -3, 4]) / 2])
    tau = kendall_tau(np.array(scores["member_1"]), np.array(scores["member_2"]))
    assert tau == pytest.approx(0.0)
    assert found.kendall_tau == pytest.approx((tau + 1.0 + tau) / 3)
    assert found.top_overlap["worst"] == 0.5  # the mean's best two are 2 and 3, the worst's 1 and 2
