"""Age weights, limits of use and batches of like length, for both pools."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal
from numpy.typing import NDArray

from quark.pool.base import Quantization, RemainderRule, SamplePool, SamplingMode
from quark.pool.memory import MemoryPool
from quark.pool.native import NativePool
from quark.pool.scope import Scope
from tests.pool.batches import VOCAB_SIZE, make_batch

ROUNDS = [0, 0, 3, 1, 4, 4, 9, 2]  # appended in this order, as an import may
SIZES = [31, 9, 17, 5, 26, 1, 12, 8]


def fill(pool: SamplePool) -> SamplePool:
    rng = np.random.default_rng(5)
    for number, (round, size) in enumerate(zip(ROUNDS, SIZES, strict=True)):
        scores = rng.normal(size=size).round(1).tolist()
        pool.append(
            replace(make_batch(str(number), {"reward": scores}, content=number), round=round)
        )
    return pool


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> SamplePool:
    path: Path = tmp_path_factory.mktemp("pools") / "pool"
    return fill(NativePool.create(path, vocab_size=VOCAB_SIZE))


@pytest.fixture(scope="module")
def memory() -> SamplePool:
    return fill(MemoryPool(vocab_size=VOCAB_SIZE))


@pytest.fixture(scope="module", params=["native", "memory"])
def pool(request: pytest.FixtureRequest) -> SamplePool:
    made: SamplePool = request.getfixturevalue(request.param)
    return made


OPTIONS = st.fixed_dictionaries(
    {
        "batch_size": st.integers(1, 20),
        "seed": st.integers(0, 2**64 - 1),
        "quantiles": st.sampled_from([None, [0], [1, 3]]),
        "bucket_window": st.integers(1, 5),
    }
)
RULES = st.one_of(
    st.fixed_dictionaries(
        {
            "age_half_life": st.sampled_from([None, 0.05, 0.7, 2, 100]),
            "max_uses": st.sampled_from([None, 1, 2, 7]),
        }
    ),
    st.fixed_dictionaries(
        {"mode": st.just(SamplingMode.SHUFFLE), "max_uses": st.sampled_from([None, 1, 3])}
    ),
    st.just({"mode": SamplingMode.IID}),
)


@given(
    options=OPTIONS,
    rules=RULES,
    steps=st.lists(st.one_of(st.integers(0, 12), st.integers(0, 2**63)), min_size=1, max_size=4),
    scope=st.sampled_from([Scope(), Scope(last_rounds=3), Scope(per_prompt=True)]),
)
@settings(max_examples=80)
def test_both_pools_draw_alike(
    native: SamplePool,
    memory: SamplePool,
    options: dict[str, Any],
    rules: dict[str, Any],
    steps: list[int],
    scope: Scope,
) -> None:
    ours, theirs = (
        pool.quantize(4, scope=scope).sampler(**options, **rules) for pool in (native, memory)
    )
    assert ours.num_batches == theirs.num_batches
    for step in steps:
        if ours.num_batches is not None and step >= ours.num_batches:
            for sampler in (ours, theirs):
                with pytest.raises(ValueError, match="used up after"):
                    sampler.draw(step)
            continue
        for a, b in zip(ours.draw(step), theirs.draw(step), strict=True):
            assert_array_equal(a, b, strict=True)


def drawn(cut: Quantization, steps: int, **options: Any) -> NDArray[np.int64]:
    """[steps, 2, B] ids and quantiles."""
    sampler = cut.sampler(seed=3, **options)
    return np.array([[a.astype(np.int64) for a in sampler.draw(t)] for t in range(steps)])


def test_a_round_that_is_a_half_life_older_is_drawn_half_as_often(pool: SamplePool) -> None:
    cut = pool.quantize(1)
    ids = drawn(cut, 1000, batch_size=50, age_half_life=2.0)[:, 0].ravel()
    rounds = pool.column("round")
    uses = Counter(rounds[ids].tolist())
    for round in (4, 3, 2):
        size = (rounds == round).sum()
        per_sample = uses[round] / size / (uses[9] / (rounds == 9).sum())
        # An epoch takes whole samples.
        assert per_sample == pytest.approx(2 ** -((9 - round) / 2), abs=1.01 / size)
    assert uses[9] > uses[0]


def test_age_weights_leave_the_quantiles_exact_and_the_newest_round_whole(
    pool: SamplePool,
) -> None:
    cut = pool.quantize(4)
    batches = drawn(cut, 30, batch_size=10, age_half_life=1.0)
    for _, quantiles in batches:
        counts = np.bincount(quantiles, minlength=4)
        assert counts.max() - counts.min() <= 1
    # An epoch has every sample of the quantile's newest round once.
    labels, rounds = cut.labels(), pool.column("round")
    for k in range(4):
        newest = np.flatnonzero((labels == k) & (rounds == rounds[labels == k].max()))
        ids = batches[:, 0].ravel()[batches[:, 1].ravel() == k]
        first = [int(np.flatnonzero(ids == id)[0]) for id in newest]
        assert max(first) < (labels == k).sum()


@pytest.mark.parametrize("mode", [SamplingMode.STRATIFIED, SamplingMode.SHUFFLE])
@pytest.mark.parametrize("max_uses", [1, 3])
def test_every_sample_is_used_up_and_none_is_used_more(
    pool: SamplePool, mode: SamplingMode, max_uses: int
) -> None:
    cut = pool.quantize(4)
    options = {"batch_size": 1, "mode": mode, "max_uses": max_uses}
    number = cut.sampler(seed=3, **options).num_batches
    assert number == max_uses * len(pool)
    assert set(Counter(drawn(cut, number, **options)[:, 0].ravel().tolist()).values()) == {max_uses}


def test_a_quantile_that_is_used_up_leaves_its_slots_to_the_others(pool: SamplePool) -> None:
    cut = pool.quantize(10, remainder=RemainderRule.LOWEST)  # the lowest has more than the others
    assert cut.counts.tolist() == [19, *[10] * 9]
    quantiles = drawn(cut, 109, batch_size=1, max_uses=1)[:, 1].ravel()
    assert_array_equal(quantiles[:100], np.tile(np.arange(10), 10))
    assert (quantiles[100:] == 0).all()


def test_with_age_weights_too_no_sample_is_used_more_often(pool: SamplePool) -> None:
    options = {"batch_size": 1, "max_uses": 3, "age_half_life": 1.0}
    number = pool.quantize(4).sampler(seed=3, **options).num_batches
    assert number is not None
    assert number < 3 * len(pool)
    uses = Counter(drawn(pool.quantize(4), number, **options)[:, 0].ravel().tolist())
    assert max(uses.values()) == 3
    newest = np.flatnonzero(pool.column("round") == 9)
    assert all(uses[int(id)] == 3 for id in newest)


@pytest.mark.parametrize("mode", SamplingMode)
def test_a_window_dealt_by_length_holds_the_same_samples_and_less_padding(
    pool: SamplePool, mode: SamplingMode
) -> None:
    cut = pool.quantize(4)
    plain = drawn(cut, 24, batch_size=8, mode=mode)
    dealt = drawn(cut, 24, batch_size=8, mode=mode, bucket_window=8)
    assert_array_equal(plain[:, 1], dealt[:, 1])  # every slot keeps its quantile
    lengths = np.array([len(s.completion_tokens) for s in pool.samples(range(len(pool)))])
    for window in range(3):
        rows = slice(8 * window, 8 * window + 8)
        assert sorted(plain[rows, 0].ravel()) == sorted(dealt[rows, 0].ravel())
        longest = [lengths[batches[rows, 0]].max(1).sum() for batches in (plain, dealt)]
        assert longest[1] < longest[0]
    labels = cut.labels()
    assert_array_equal(labels[dealt[:, 0]], dealt[:, 1])
    means = lengths[dealt[:, 0]].mean(1).reshape(3, 8)
    assert any((np.diff(row) < 0).any() for row in means)  # not a curriculum


@pytest.mark.parametrize(
    "options",
    [
        {"age_half_life": 0.0},
        {"age_half_life": float("nan")},
        {"age_half_life": 1e6},
        {"age_half_life": 1.0, "mode": SamplingMode.IID},
        {"age_half_life": 1.0, "mode": SamplingMode.SHUFFLE},
        {"max_uses": 0},
        {"max_uses": 1, "mode": SamplingMode.IID},
        {"bucket_window": 0},
    ],
)
def test_options_that_make_no_sense_are_refused(pool: SamplePool, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        pool.quantize(4).sampler(batch_size=4, seed=0, **options)
