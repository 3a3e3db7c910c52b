"""Runs whose loss looks at each sample under several reward tokens: stopped and resumed, and shared by processes."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from quark.pool.native import NativePool
from tests.training.launching import launch
from tests.training.test_distributed import assert_close
from tests.training.tiny_run import NEEDS_SHARDING, fingerprint_of, rows_of, train, write_inputs

SETTINGS = (
    "objective.lm_coef=0.2",
    "objective.contrast_coef=1.0",
    "objective.contrast_tokens=2",
    "objective.advantage_coef=0.5",
    "objective.tilt_coef=0.5",
    "objective.kl_tokens=all",
    "run.completions_per_prompt=2",
    "sampling.guide=critic",
    "sampling.guidance=1.0",
)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def whole_run(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    assert not train(config, run_dir, overrides=SETTINGS).interrupted
    return run_dir


def test_every_step_says_what_the_terms_are(whole_run: Path) -> None:
    steps = [row for row in rows_of(whole_run) if row["event"] == "step"]
    for row in steps:
        assert row["information"] == pytest.approx(math.log(3) - row["contrast_loss"])
        assert math.isfinite(row["advantage_loss"])
        assert row["tilt_loss"] > 0.0


def test_every_round_fits_its_critic_to_all_samples_so_far(whole_run: Path) -> None:
    rows = rows_of(whole_run)
    found = [row["num_samples"] for row in rows if row["event"] == "critic"]
    with NativePool.open(whole_run / "pool") as pool:
        rounds = pool.column("round")
    assert found == [int((rounds <= i).sum()) for i in range(len(found))]
    assert len(found) == rounds.max() + 1


def test_the_critic_guides_from_the_second_round_on(whole_run: Path) -> None:
    with NativePool.open(whole_run / "pool") as pool:
        drawn, policy = pool.column("logprob_sampled"), pool.column("logprob_policy")
        first = pool.column("round") == 0
    assert (drawn[first] == policy[first]).all()
    assert (abs(drawn[~first] - policy[~first]) > 1e-3).all()


def test_the_tokens_are_told_apart_better_at_the_end(config: Path, tmp_path: Path) -> None:
    # Fast enough that the difference is far larger than what the choice of samples makes.
    train(config, tmp_path / "run", overrides=(*SETTINGS, "optimizer.learning_rate=0.01"))
    rounds = [row for row in rows_of(tmp_path / "run") if row["event"] == "round"]
    assert rounds[-1]["information_mean"] > rounds[0]["information_mean"] + 0.1


def test_a_run_stopped_within_rounds_ends_equal(
    config: Path, whole_run: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    for stop_at in (12, 16):
        assert train(config, run_dir, stop_at=stop_at, overrides=SETTINGS).interrupted
    assert not train(config, run_dir, overrides=SETTINGS).interrupted
    found, expected = fingerprint_of(run_dir), fingerprint_of(whole_run)
    for name in ("rows", "samples"):
        assert found[name] == expected[name]
    last = max(name for name in expected["files"] if name.endswith("model.safetensors"))
    assert found["files"][last] == expected["files"][last]


@pytest.mark.parametrize("parallel", ["data", pytest.param("sharded", marks=NEEDS_SHARDING)])
def test_two_processes_learn_what_one_does(
    config: Path, whole_run: Path, tmp_path: Path, parallel: str
) -> None:
    run_dir = tmp_path / "run"
    ended = launch(config, run_dir, *SETTINGS, f"run.parallel={parallel}")
    assert ended.codes == [0, 0], ended.err
    assert_close(run_dir, whole_run)
    steps = [
        [row for row in rows_of(run) if row["event"] == "step"] for run in (run_dir, whole_run)
    ]
    for ours, theirs in zip(*steps, strict=True):
        for name in (
            "loss",
            "contrast_loss",
            "advantage_loss",
            "tilt_loss",
            "kl_reference_to_policy",
        ):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-5), name
