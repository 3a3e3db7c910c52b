"""What a run keeps of the distribution that it drew from, and what it learns with where the pool cannot keep it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quark.objectives.advantages import COLUMNS, Advantages
from quark.objectives.config import AdvantageScope
from quark.pool.native import NativePool
from quark.training.loop.draws import columns_of
from tests.pool.batches import older_pool
from tests.training.tiny_run import fingerprint_of, train, write_inputs

GUIDED = ("sampling.guidance=1.0", "objective.advantage_coef=0.5")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def guided_run(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("guided") / "run"
    assert not train(config, run_dir, overrides=GUIDED).interrupted
    return run_dir


def test_a_guided_round_keeps_what_it_was_drawn_from_and_learns_with_it(guided_run: Path) -> None:
    with NativePool.open(guided_run / "pool") as pool:
        drawn, policy = pool.column("logprob_sampled"), pool.column("logprob_policy")
        is_guided = pool.column("reward_token") >= 0
        used = Advantages.of(columns_of(pool, COLUMNS), AdvantageScope.ROUND).sampled_logprobs
    assert np.isfinite(drawn).all()
    assert (drawn < 0).all()
    np.testing.assert_array_equal(drawn[~is_guided], policy[~is_guided])
    assert (np.abs(drawn - policy)[is_guided] > 1e-3).any()
    # Guidance goes where the policy already leans to.
    assert drawn[is_guided].mean() > policy[is_guided].mean()
    np.testing.assert_array_equal(used, drawn)


def test_a_guided_run_that_is_stopped_again_and_again_ends_with_the_same_bytes(
    config: Path, guided_run: Path, tmp_path: Path
) -> None:
    num_lives = 1
    while train(config, tmp_path / "run", overrides=GUIDED, stop_at=9).interrupted:
        num_lives += 1
        assert num_lives < 100
    assert num_lives > 2
    assert fingerprint_of(tmp_path / "run") == fingerprint_of(guided_run)


def test_a_run_that_began_on_an_older_pool_goes_on_as_it_began(
    config: Path, guided_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(NativePool, "create", lambda path, **more: older_pool(path, 2, **more))
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train(config, whole, overrides=GUIDED)
    assert train(config, stopped, overrides=GUIDED, stop_at=14).interrupted
    monkeypatch.undo()  # only a pool that is made anew is of the newest version
    assert not train(config, stopped, overrides=GUIDED).interrupted
    assert fingerprint_of(stopped) == fingerprint_of(whole)
    columns: dict[Path, dict[str, Any]] = {}
    for run_dir in (whole, guided_run):
        with NativePool.open(run_dir / "pool") as pool:
            names = ("seed", "logprob_policy", "logprob_sampled")
            columns[run_dir] = {name: pool.column(name) for name in names}
            used = Advantages.of(columns_of(pool, COLUMNS), AdvantageScope.ROUND).sampled_logprobs
            assert pool.has_sampled_logprobs == (run_dir == guided_run)
        if run_dir == whole:
            assert np.isnan(columns[whole]["logprob_sampled"]).all()
            np.testing.assert_array_equal(used, columns[whole]["logprob_policy"])
    # The first round is the same but for the column; later ones have learned with other ratios.
    first = slice(0, 24)
    ours, theirs = columns[whole], columns[guided_run]
    np.testing.assert_array_equal(ours["logprob_policy"][first], theirs["logprob_policy"][first])
