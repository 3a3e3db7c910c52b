"""What quantiles and batches are, against ten lines of NumPy, for both pools."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from quark.pool.base import RemainderRule, SamplePool, SamplingMode, TieRule
from quark.pool.defaults import MAX_QUANTILES
from quark.pool.memory import MemoryPool
from quark.pool.native import NativePool
from quark.pool.scope import Scope
from tests.pool.batches import VOCAB_SIZE, assert_same_cut, assert_same_draws, make_batch

MakePool = Callable[[list[float]], SamplePool]
TIED = st.lists(st.sampled_from([0.0, -0.0, 1.0, 2.0, float("nan")]), min_size=1, max_size=60)
DISTINCT = st.lists(st.floats(width=32), min_size=1, max_size=60)


@pytest.fixture(scope="module", params=["native", "memory"])
def make_pool(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> MakePool:
    def native(scores: list[float]) -> SamplePool:
        path = tmp_path_factory.mktemp("pools") / "pool"
        return filled(NativePool.create(path, vocab_size=VOCAB_SIZE), scores)

    def memory(scores: list[float]) -> SamplePool:
        return filled(MemoryPool(vocab_size=VOCAB_SIZE), scores)

    return native if request.param == "native" else memory


def filled(pool: SamplePool, scores: list[float]) -> SamplePool:
    """In many appends, so that there are several runs, and merged ones."""
    size = max(7, len(scores) // 12)
    for number, begin in enumerate(range(0, len(scores), size)):
        some = scores[begin : begin + size]
        pool.append(make_batch(str(number), {"reward": some}, content=number))
    return pool


def sizes(total: int, num_quantiles: int, remainder: RemainderRule) -> list[int]:
    if remainder is RemainderRule.LOWEST:
        size = total // num_quantiles
        return [total - (num_quantiles - 1) * size] + [size] * (num_quantiles - 1)
    return np.diff(np.arange(num_quantiles + 1) * total // num_quantiles).tolist()


@pytest.mark.parametrize("remainder", RemainderRule)
@pytest.mark.parametrize("ties", [TieRule.HASH, TieRule.OLDER_FIRST])
@given(
    scores=st.one_of(TIED, DISTINCT),
    num_quantiles=st.one_of(st.integers(1, 9), st.integers(50, 90)),
)
@settings(max_examples=30)
def test_quantiles_have_the_sizes_of_their_rule_and_cut_the_sorted_scores(
    make_pool: MakePool,
    ties: TieRule,
    remainder: RemainderRule,
    scores: list[float],
    num_quantiles: int,
) -> None:
    pool = make_pool(scores)
    cut = pool.quantize(num_quantiles, ties=ties, remainder=remainder)
    values = np.array(scores, np.float32)
    ranked = np.sort(values[~np.isnan(values)])
    expected = sizes(len(ranked), num_quantiles, remainder)
    assert cut.counts.tolist() == expected
    assert cut.num_unranked == len(values) - len(ranked)
    labels = cut.labels()
    assert (labels == -1).tolist() == np.isnan(values).tolist()
    ends = np.cumsum(expected)
    for k, (end, size) in enumerate(zip(ends, expected, strict=True)):
        assert_array_equal(np.sort(values[labels == k]), ranked[end - size : end])
        assert_array_equal(cut.lower_bounds[k], ranked[end - size] if size else np.nan)
    pool.close()


@given(scores=TIED, num_quantiles=st.integers(1, 9))
@settings(max_examples=60)
def test_older_first_is_a_stable_sort(
    make_pool: MakePool, scores: list[float], num_quantiles: int
) -> None:
    pool = make_pool(scores)
    labels = pool.quantize(num_quantiles, ties=TieRule.OLDER_FIRST).labels()
    ranked = [id for id, score in enumerate(scores) if score == score]
    best_first = sorted(ranked, key=lambda id: -scores[id])
    assert (np.diff(labels[best_first]) <= 0).all()
    pool.close()


@given(scores=TIED, num_quantiles=st.integers(1, 70))
@settings(max_examples=60)
def test_together_gives_equal_scores_the_highest_label_that_a_cut_block_touches(
    make_pool: MakePool, scores: list[float], num_quantiles: int
) -> None:
    pool = make_pool(scores)
    together = pool.quantize(num_quantiles, ties=TieRule.TOGETHER).labels()
    by_hash = pool.quantize(num_quantiles, ties=TieRule.HASH).labels()
    values = np.array(scores)
    for value in values[~np.isnan(values)]:
        assert set(together[values == value]) == {by_hash[values == value].max()}
    pool.close()


def test_the_hash_does_not_let_age_leak_into_the_label(make_pool: MakePool) -> None:
    pool = make_pool([1.0] * 700)
    labels = pool.quantize(2).labels()
    halves = labels[:350].sum(), labels[350:].sum()
    # Each is hypergeometric with mean 175 and standard deviation 6.6.
    assert all(abs(half - 175) < 40 for half in halves)


def test_a_pool_without_a_score_has_nothing_to_draw_from(make_pool: MakePool) -> None:
    pool = make_pool([float("nan")] * 20)
    cut = pool.quantize(3)
    assert cut.counts.tolist() == [0, 0, 0]
    assert cut.labels().tolist() == [-1] * 20
    with pytest.raises(ValueError):
        cut.sampler(batch_size=4, seed=0)


def test_an_unknown_score_column_is_a_key_error(make_pool: MakePool) -> None:
    with pytest.raises(KeyError):
        make_pool([1.0]).quantize(2, score="judge")


@pytest.mark.parametrize("arguments", [(0, 0), (3, -1), (3, 3)])
def test_what_cannot_be_drawn_is_refused(make_pool: MakePool, arguments: tuple[int, int]) -> None:
    batch_size, quantile = arguments
    cut = make_pool([1.0, 2.0, 3.0]).quantize(3)
    with pytest.raises(ValueError):
        cut.sampler(batch_size=batch_size, seed=0, quantiles=[quantile])
    with pytest.raises(ValueError):
        make_pool([1.0]).quantize(0)
    with pytest.raises(IndexError):
        cut.labels_of(np.array([3], np.uint64))


SPREAD_SCORES = np.random.default_rng(0).permutation(500).astype(float).tolist()


def test_a_batch_of_128_holds_25_or_26_of_each_of_5_quantiles_and_the_remainder_rotates(
    make_pool: MakePool,
) -> None:
    sampler = make_pool(SPREAD_SCORES).quantize(5).sampler(batch_size=128, seed=3)
    counts = np.array([np.bincount(sampler.draw(step)[1], minlength=5) for step in range(10)])
    assert set(counts.ravel()) == {25, 26}
    assert (counts.sum(axis=0) == 256).all()


def test_stratified_sampling_takes_each_sample_of_a_quantile_once_before_any_twice(
    make_pool: MakePool,
) -> None:
    cut = make_pool(SPREAD_SCORES[:203]).quantize(3)
    labels = cut.labels()
    sampler = cut.sampler(batch_size=10, seed=5)
    drawn: dict[int, list[int]] = {k: [] for k in range(3)}
    for step in range(70):
        for id, quantile in zip(*sampler.draw(step), strict=True):
            assert labels[id] == quantile
            drawn[quantile].append(int(id))
    for quantile, ids in drawn.items():
        members = np.flatnonzero(labels == quantile).tolist()
        epochs = [ids[i : i + len(members)] for i in range(0, len(ids), len(members))]
        full = [epoch for epoch in epochs if len(epoch) == len(members)]
        assert len(full) >= 3
        assert all(sorted(epoch) == members for epoch in full)
        assert all(a != b for a, b in itertools.pairwise(full))


def test_shuffling_takes_every_ranked_sample_once_an_epoch(make_pool: MakePool) -> None:
    sampler = (
        make_pool([*SPREAD_SCORES[:96], float("nan")])
        .quantize(5)
        .sampler(batch_size=8, seed=1, mode=SamplingMode.SHUFFLE)
    )
    epochs = [
        np.concatenate([sampler.draw(12 * epoch + step)[0] for step in range(12)])
        for epoch in range(3)
    ]
    assert all(sorted(epoch) == list(range(96)) for epoch in epochs)
    assert not (epochs[0] == epochs[1]).all()


def test_independent_draws_are_uniform_over_quantiles_whatever_their_sizes(
    make_pool: MakePool,
) -> None:
    cut = make_pool(SPREAD_SCORES[:203]).quantize(5, remainder=RemainderRule.LOWEST)
    sampler = cut.sampler(batch_size=5000, seed=2, mode=SamplingMode.IID)
    ids, quantiles = sampler.draw(0)
    assert_array_equal(cut.labels_of(ids), quantiles)
    # Binomial with mean 1000 and standard deviation 28.
    assert (np.abs(np.bincount(quantiles, minlength=5) - 1000) < 150).all()
    assert len(np.unique(ids)) > 195


@pytest.mark.parametrize("mode", SamplingMode)
def test_seeds_and_steps_give_different_batches(make_pool: MakePool, mode: SamplingMode) -> None:
    cut = make_pool(SPREAD_SCORES).quantize(5)
    seen = {
        tuple(cut.sampler(batch_size=32, seed=seed, mode=mode).draw(step)[0].tolist())
        for seed in range(5)
        for step in (0, 1, 2**40)
    }
    assert len(seen) == 15


@pytest.mark.parametrize("mode", SamplingMode)
def test_batch_t_is_the_same_after_reopening_and_in_any_order(
    tmp_path: Path, mode: SamplingMode
) -> None:
    pool = filled(NativePool.create(tmp_path / "pool", vocab_size=VOCAB_SIZE), SPREAD_SCORES)
    sampler = pool.quantize(5).sampler(batch_size=128, seed=11, mode=mode)
    before = [sampler.draw(step)[0].tolist() for step in range(20)]
    generation = pool.snapshot.generation
    pool.append(make_batch("later", {"reward": [1e9] * 50}))
    pool.close()
    reopened = NativePool.open(tmp_path / "pool", snapshot=generation)
    again = reopened.quantize(5).sampler(batch_size=128, seed=11, mode=mode)
    order = np.random.default_rng(1).permutation(20)
    assert [again.draw(int(t))[0].tolist() for t in order] == [before[t] for t in order]


def test_a_quantization_stays_what_it_was_while_the_pool_grows(make_pool: MakePool) -> None:
    pool = make_pool(SPREAD_SCORES[:100])
    cut = pool.quantize(4)
    sampler = cut.sampler(batch_size=16, seed=0)
    labels, batch = cut.labels(), sampler.draw(3)[0]
    for number in range(70):
        pool.append(make_batch(f"later {number}", {"reward": [1e6, -1e6]}, content=number))
    assert_array_equal(cut.labels(), labels)
    assert_array_equal(sampler.draw(3)[0], batch)
    assert cut.snapshot.num_samples == 100
    with pytest.raises(IndexError):
        cut.labels_of(np.array([100], np.uint64))


def test_blocks_cut_by_age_at_both_ends_of_a_quantile_are_drawn_alike(tmp_path: Path) -> None:
    # 90 samples in three blocks of 30 and four quantiles: the middle ones begin and end inside a block.
    scores = [float(i % 3) for i in range(90)]
    model = MemoryPool(vocab_size=VOCAB_SIZE)
    with NativePool.create(tmp_path / "pool", vocab_size=VOCAB_SIZE) as pool:
        for start in range(0, 90, 9):
            batch = make_batch(f"{start}", {"reward": scores[start : start + 9]}, content=start)
            assert pool.append(batch) == model.append(batch)
        ours, theirs = (p.quantize(4, ties=TieRule.OLDER_FIRST) for p in (pool, model))
        assert_same_cut(ours, theirs)
        for mode in SamplingMode:
            samplers = (q.sampler(batch_size=16, seed=5, mode=mode) for q in (ours, theirs))
            assert_same_draws(*samplers, steps=range(12))


@pytest.mark.parametrize("ties", TieRule)
@pytest.mark.parametrize("digits", [0, 6])
def test_very_many_quantiles_of_values_are_those_of_the_column(
    tmp_path: Path, ties: TieRule, digits: int
) -> None:
    pool = NativePool.create(tmp_path / "pool", vocab_size=VOCAB_SIZE)
    scores = np.random.default_rng(0).normal(size=20_000).round(digits)
    pool.append(make_batch("all", {"reward": scores.tolist()}))
    by_runs = pool.quantize(MAX_QUANTILES, ties=ties)
    by_values = pool.quantize(MAX_QUANTILES, ties=ties, scope=Scope(min_score=-100.0))
    assert_same_cut(by_values, by_runs)
