"""A part of the pool that no step learns from, and what each round measures on unseen samples."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from quark.config.schema import PoolSection, RunConfig, RunSection
from quark.pool.base import PromptRecord, SamplePool
from quark.pool.memory import MemoryPool
from quark.pool.native import NativePool
from quark.run_directory import RunDirectory
from quark.selftest.samples import VOCAB_SIZE, make_batch
from quark.training.loop.draws import held_out_samples, quantize, round_sampler
from quark.training.loop.information import MOST_SAMPLES, labels_by, newest
from tests.training.launching import launch
from tests.training.test_distributed import assert_close
from tests.training.tiny_run import (
    NEEDS_SHARDING,
    NUM_ROUNDS,
    fingerprint_of,
    rows_of,
    train,
    write_inputs,
)

SETTINGS = (
    "objective.lm_coef=0",
    "objective.contrast_coef=1.0",
    "pool.held_out_share=0.4",
    "run.seed=5",
)
FIGURES = ("information", "information_error", "label_accuracy", "rank_correlation")


def config_of(share: float, seed: int = 0, **pool: Any) -> RunConfig:
    return RunConfig(
        pool=PoolSection(held_out_share=share, num_quantiles=4, **pool), run=RunSection(seed=seed)
    )


def append(pool: SamplePool, *numbers: int) -> SamplePool:
    for number in numbers:
        scores = np.random.default_rng(number).normal(size=40).round(1).tolist()
        batch = make_batch(f"run/{number}/0", {"reward": scores}, content=number)
        # Half of the prompts come again in the next append.
        prompts = [
            PromptRecord(token_ids=np.array([10 * number + i], np.uint32), text="")
            for i in range(20)
        ]
        index = np.arange(40, dtype=np.uint32) % 20
        pool.append(replace(batch, prompts=prompts, prompt_index=index))
    return pool


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> SamplePool:
    path = tmp_path_factory.mktemp("pools") / "pool"
    return append(NativePool.create(path, vocab_size=VOCAB_SIZE), 0, 1, 2, 3)


def test_nothing_is_held_out_by_default(pool: SamplePool) -> None:
    assert held_out_samples(pool, RunConfig()) is None


@given(share=st.floats(0.01, 0.49), seed=st.integers(0, 1000), round=st.integers(0, 3))
@settings(max_examples=30, deadline=None)
def test_held_out_samples_keep_their_rank_and_are_never_drawn(
    pool: SamplePool, share: float, seed: int, round: int
) -> None:
    config = config_of(share, seed)
    held_out = held_out_samples(pool, config)
    assert held_out is not None
    assert_array_equal(held_out, held_out_samples(pool, config))
    # A prompt is held out or not with all its samples.
    prompts = pool.column("prompt_id")
    assert not set(prompts[held_out].tolist()) & set(prompts[~held_out].tolist())
    everything = quantize(pool, config_of(0.0, seed).pool.ranking())
    ours = quantize(pool, config.pool.ranking())
    assert_array_equal(ours.labels(), everything.labels())
    sampler = round_sampler(pool, ours, config, round)
    for step in range(4):
        ids, quantiles = sampler.draw(step)
        assert not held_out[ids.astype(np.int64)].any()
        assert_array_equal(quantiles, everything.labels_of(ids))


def test_a_prompt_stays_where_it_is_while_the_pool_grows(tmp_path: Path) -> None:
    config = config_of(0.3)
    growing = append(NativePool.create(tmp_path / "pool", vocab_size=VOCAB_SIZE), 0)
    first = held_out_samples(growing, config)
    append(growing, 1, 2)
    later = held_out_samples(growing, config)
    assert first is not None
    assert later is not None
    assert_array_equal(later[: len(first)], first)


def test_the_share_is_about_what_was_asked_for_and_another_seed_chooses_others() -> None:
    prompts = np.arange(20_000, dtype=np.uint32)

    class Many(MemoryPool):
        def column(self, name: str) -> Any:
            return prompts

    many = Many(vocab_size=VOCAB_SIZE)
    ours, others = (held_out_samples(many, config_of(0.2, seed)) for seed in (0, 1))
    assert ours is not None
    assert others is not None
    assert ours.mean() == pytest.approx(0.2, abs=0.01)
    assert (ours & others).mean() == pytest.approx(0.04, abs=0.01)


def test_both_pools_keep_the_same_samples(pool: SamplePool) -> None:
    assert isinstance(pool, NativePool)
    spec = append(MemoryPool(vocab_size=VOCAB_SIZE, tie_seed=pool.settings.tie_seed), 0, 1, 2, 3)
    is_kept = np.random.default_rng(0).random(len(pool)) < 0.6
    ours, theirs = (each.quantize(3).only(is_kept) for each in (pool, spec))
    assert_array_equal(ours.labels(), theirs.labels())
    assert_array_equal(ours.counts, theirs.counts)
    assert_array_equal(ours.lower_bounds, theirs.lower_bounds)
    assert ours.num_unranked == theirs.num_unranked == len(pool) - int(is_kept.sum())
    options: dict[str, Any] = {"batch_size": 7, "seed": 3}
    for step in range(5):
        for a, b in zip(
            ours.sampler(**options).draw(step), theirs.sampler(**options).draw(step), strict=True
        ):
            assert_array_equal(a, b)
    for each in (pool, spec):
        with pytest.raises(ValueError, match=r"marks|booleans"):
            each.quantize(3).only(is_kept[:-1])
        with pytest.raises(ValueError, match=r"is_kept|booleans"):
            each.quantize(3).only(np.ones((2, 2), np.bool_))


def test_a_measurement_takes_the_newest_samples_that_have_a_quantile(tmp_path: Path) -> None:
    pool = NativePool.create(tmp_path / "pool", vocab_size=VOCAB_SIZE)
    append(pool, *range(MOST_SAMPLES // 40 + 2))
    scores = [math.nan, 1.0, 2.0]
    pool.append(make_batch("run/last/0", {"reward": scores}, content=99))
    everything = np.arange(len(pool), dtype=np.uint64)
    chosen = newest(pool, pool.quantize(3), everything)
    assert len(chosen) == MOST_SAMPLES
    rounds = pool.column("round")[chosen.ids.astype(np.int64)]
    assert (np.diff(rounds.astype(np.int64)) <= 0).all()
    assert (chosen.labels >= 0).all()
    assert np.isfinite(chosen.rewards).all()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def whole_run(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    assert not train(inputs, run_dir, overrides=SETTINGS).interrupted
    return run_dir


def test_each_round_says_what_the_tokens_tell_of_unseen_samples(whole_run: Path) -> None:
    rounds = [row for row in rows_of(whole_run) if row["event"] == "round"]
    assert len(rounds) == NUM_ROUNDS
    for name in FIGURES:
        assert rounds[0][f"{name}_fresh"] is None, "the tokens meant nothing then"
    for row in rounds[1:]:
        assert row["information_fresh"] < math.log(3)
        assert row["information_error_fresh"] > 0
    for row in rounds:
        assert 0 <= row["label_accuracy_held_out"] <= 1
        assert row["information_held_out"] < math.log(3)


def test_without_a_contrast_or_a_share_nothing_is_measured(inputs: Path, tmp_path: Path) -> None:
    train(inputs, tmp_path / "run")
    for row in rows_of(tmp_path / "run"):
        assert not any(key.startswith(FIGURES) for key in row)


def test_measuring_does_not_change_what_is_learned(inputs: Path, tmp_path: Path) -> None:
    """The share moves the batches; the measurements of fresh samples alone move nothing."""
    settings = ("objective.contrast_coef=1.0",)
    train(inputs, tmp_path / "measured", overrides=settings)
    from quark.training.loop.information import InformationMeter

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InformationMeter, "fresh", lambda *_, **__: {})
        train(inputs, tmp_path / "plain", overrides=settings)
    ours, theirs = (fingerprint_of(tmp_path / name) for name in ("measured", "plain"))
    assert ours["weights"] == theirs["weights"]
    assert ours["samples"] == theirs["samples"]


def test_a_run_with_a_held_out_part_stopped_within_rounds_ends_equal(
    inputs: Path, whole_run: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    num_lives = 1
    while train(inputs, run_dir, stop_at=6, overrides=SETTINGS).interrupted:
        num_lives += 1
        assert num_lives < 100
    assert num_lives > NUM_ROUNDS
    found, expected = fingerprint_of(run_dir), fingerprint_of(whole_run)
    for name in ("rows", "samples", "weights", "position", "coefficients"):
        assert found[name] == expected[name], name


@pytest.mark.parametrize("parallel", ["data", pytest.param("sharded", marks=NEEDS_SHARDING)])
def test_two_processes_measure_what_one_does(
    inputs: Path, whole_run: Path, tmp_path: Path, parallel: str
) -> None:
    run_dir = tmp_path / "run"
    ended = launch(inputs, run_dir, *SETTINGS, f"run.parallel={parallel}")
    assert ended.codes == [0, 0], ended.err
    assert_close(run_dir, whole_run)
    ours, theirs = (
        [row for row in rows_of(run) if row["event"] == "round"] for run in (run_dir, whole_run)
    )
    for a, b in zip(ours, theirs, strict=True):
        for name in (f"{figure}_held_out" for figure in FIGURES):
            assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-4, nan_ok=True), name


def test_held_out_samples_of_a_run_are_in_no_batch(inputs: Path, whole_run: Path) -> None:
    from quark.training.explain import explain

    with NativePool.open(RunDirectory(whole_run).pool) as pool:
        held_out = held_out_samples(pool, config_of(0.4, seed=5))
        assert held_out is not None
        assert 0 < held_out.sum() < len(pool)
        used = [
            any(use.steps or use.steps_to_come for use in explain(whole_run, i).rounds)
            for i in range(len(pool))
        ]
    assert not (np.array(used) & held_out).any()
    assert np.array(used)[~held_out].any()


def test_a_single_token_is_compared_with_nothing(inputs: Path, tmp_path: Path) -> None:
    settings = ("pool.num_quantiles=1", "pool.held_out_share=0.4", "run.seed=5", "run.num_rounds=1")
    train(inputs, tmp_path / "run", overrides=settings)
    (row,) = [row for row in rows_of(tmp_path / "run") if row["event"] == "round"]
    assert row["information_held_out"] is None


def test_new_samples_are_labelled_by_what_the_tokens_were_trained_on() -> None:
    rewards = np.array([-9.0, 0.0, 0.5, 0.7, 1.0, 3.0], np.float32)
    assert labels_by([0.0, 0.5, 1.0], rewards).tolist() == [0, 0, 1, 1, 2, 2]
    assert labels_by([0.0, math.nan, 1.0], rewards).tolist() == [0, 0, 0, 0, 2, 2]
    assert labels_by([math.nan, math.nan], rewards).tolist() == [0] * 6
