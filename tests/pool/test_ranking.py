from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quark.config.schema import PoolSection
from quark.pool.base import RemainderRule, TieRule
from quark.pool.memory import MemoryPool
from quark.pool.native import NativePool
from quark.pool.ranking import RankingRules
from quark.pool.scope import Scope
from quark.pool.ties import tie_share
from tests.pool.batches import filled_alike, make_batch

CHANGED: dict[str, Any] = {
    "num_quantiles": 3,
    "ties": TieRule.TOGETHER,
    "remainder": RemainderRule.LOWEST,
    "last_rounds": 1,
    "where": "reward > 1",
    "min_score": 2.0,
    "max_per_round": 4,
    "per_prompt": True,
}
"""A value other than the default for every rule that a configuration has."""


@pytest.fixture
def pools(tmp_path: Path) -> tuple[NativePool, MemoryPool]:
    """Two rounds of 20 and 18 samples with ties and missing scores."""
    batches = []
    for number, size in enumerate((20, 18)):
        rewards = [float("nan") if i == 3 else float(i % 4) for i in range(size)]
        scores = {"reward": rewards, "judge": [float(i) for i in range(size)]}
        batches.append(replace(make_batch(str(number), scores, content=number), round=number))
    return filled_alike(tmp_path / "pool", batches)


def test_the_rules_are_settings_of_the_pool_with_the_same_defaults() -> None:
    assert {field.name for field in fields(RankingRules)} == {"score", "ensemble", *CHANGED}
    assert PoolSection().ranking() == RankingRules() == RankingRules.recorded({})


@pytest.mark.parametrize("name", CHANGED)
def test_a_rule_is_the_same_from_a_configuration_and_from_its_record(name: str) -> None:
    given = {name: CHANGED[name]}
    rules = RankingRules(**given)
    assert rules != RankingRules()
    assert PoolSection(**given).ranking() == rules
    # As TOML has it: the names of the rules, and no key for what an earlier release did not know.
    written = {
        key: str(value) if key in ("ties", "remainder") else value for key, value in given.items()
    }
    assert RankingRules.recorded({"pool": {**written, "sampling": "iid"}}) == rules


@pytest.mark.parametrize("name", CHANGED)
def test_every_rule_changes_the_quantiles(name: str, pools: tuple[NativePool, MemoryPool]) -> None:
    rules = RankingRules(**{name: CHANGED[name]})
    ours, theirs = (rules.quantize(pool).labels() for pool in pools)
    np.testing.assert_array_equal(ours, theirs)
    assert (ours != RankingRules().quantize(pools[0]).labels()).any()
    by_judge = replace(rules, score="judge").quantize(pools[0])
    assert (by_judge.labels() != ours).any()


@pytest.mark.parametrize("config", [{}, {"pool": 3}, {"pool": {"num_quantiles": 0}}])
def test_a_record_without_rules_has_the_defaults(config: dict[str, Any]) -> None:
    assert RankingRules.recorded(config) == RankingRules()


@pytest.mark.parametrize(
    ("damaged", "error"),
    [
        ({"last_rounds": 0}, ValueError),
        ({"last_rounds": "x"}, TypeError),
        ({"ties": "no"}, ValueError),
        ({"where": "5"}, ValueError),
    ],
)
def test_what_no_ranking_obeys_is_refused_when_a_pool_is_ranked(
    damaged: dict[str, Any], error: type[Exception], pools: tuple[NativePool, MemoryPool]
) -> None:
    rules = RankingRules.recorded({"pool": damaged})
    with pytest.raises(error):
        rules.quantize(pools[0])
    with pytest.raises(KeyError):
        RankingRules(score="rewrad").quantize(pools[0])


@pytest.mark.parametrize("per_prompt", [False, True])
def test_ties_are_counted_among_the_samples_that_are_ranked_against_each_other(
    per_prompt: bool, pools: tuple[NativePool, MemoryPool]
) -> None:
    pool, _ = pools
    rules = RankingRules(num_quantiles=3, per_prompt=per_prompt)
    labels = pool.quantize(3, scope=Scope(per_prompt=per_prompt)).labels()
    prompt_ids = pool.column("prompt_id") if per_prompt else None
    said = rules.tie_share(pool, rules.quantize(pool))
    assert said == tie_share(pool.scores("reward"), labels, prompt_ids)
    assert replace(rules, score="judge").tie_share(
        pool, replace(rules, score="judge").quantize(pool)
    ) != pytest.approx(said)
