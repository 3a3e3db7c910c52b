"""The settling steps: a shift of all reward tokens, without labels, before anything is learned."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import torch

from quark.models.config import ModelConfig
from quark.models.loading import load_policy
from quark.models.policy import Policy
from quark.objectives.config import QuarkObjectiveConfig
from quark.objectives.quark import QuarkObjective
from quark.reference.base import FrozenReference
from quark.training.loop.settling import settle_reward_tokens
from tests.tiny import save_tiny, tiny_batch, tiny_llama
from tests.training.launching import launch
from tests.training.tiny_run import NEEDS_SHARDING, fingerprint_of, rows_of, train, write_inputs

SETTINGS = ("optimizer.settling_steps=6", "model.reward_token_std_scale=0.0")


def settle(policy: Policy, reference: FrozenReference, *, num_steps: int = 40) -> list[float]:
    objective = QuarkObjective(QuarkObjectiveConfig())
    return settle_reward_tokens(
        policy,
        reference,
        [tiny_batch(policy)] * num_steps,
        rate=0.15,
        micro_batches=lambda batch: objective.micro_batches(batch, 2),
        autocast=contextlib.nullcontext,
    )


@pytest.mark.parametrize("rank", [0, 2])
def test_it_moves_the_tokens_alike_and_nothing_else(tmp_path: Path, rank: int) -> None:
    config = ModelConfig.model_validate(
        {"name": str(save_tiny(tmp_path / "model", tiny_llama())), "lora": {"rank": rank}}
    )
    policy = load_policy(config, num_quantiles=3, seed=5)
    policy.model.eval()
    vectors = policy.reward_vectors.clone()
    before = {name: value.clone() for name, value in policy.model.state_dict().items()}
    costs = settle(policy, FrozenReference(tiny_llama().eval()))
    assert costs[-1] < 0.8 * costs[0]
    shift = policy.reward_vectors - vectors
    assert float(shift.abs().max()) > 0.0
    torch.testing.assert_close(shift, shift[:1].expand_as(shift))
    policy.reward_vectors.copy_(vectors)
    for name, value in policy.model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_scale_of_0_begins_all_tokens_as_one_vector(tmp_path: Path) -> None:
    config = ModelConfig(name=str(save_tiny(tmp_path / "model")), reward_token_std_scale=0.0)
    vectors = load_policy(config, num_quantiles=4, seed=5).reward_vectors
    assert torch.equal(vectors, vectors[:1].expand_as(vectors))
    assert float(vectors.abs().max()) > 0.0


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def whole_run(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    assert not train(config, run_dir, overrides=SETTINGS).interrupted
    return run_dir


def test_a_run_settles_once_and_says_so(whole_run: Path) -> None:
    rows = [row for row in rows_of(whole_run) if row["event"] == "settling"]
    assert [len(row["kl_by_step"]) for row in rows] == [6]
    assert rows[0]["kl_by_step"][-1] < rows[0]["kl_by_step"][0]
    assert rows[0]["step"] == 0


def test_a_run_stopped_within_rounds_ends_equal(
    config: Path, whole_run: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    lives = 0
    while train(config, run_dir, stop_at=6 + lives, overrides=SETTINGS).interrupted:
        lives += 1
    assert lives > 1
    found, expected = fingerprint_of(run_dir), fingerprint_of(whole_run)
    for name in ("rows", "samples"):
        assert found[name] == expected[name]
    last = max(name for name in expected["files"] if name.endswith("model.safetensors"))
    assert found["files"][last] == expected["files"][last]


def test_two_processes_settle_as_one_does(config: Path, whole_run: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    ended = launch(config, run_dir, *SETTINGS)
    assert ended.codes == [0, 0], ended.err
    found, expected = (
        next(row["kl_by_step"] for row in rows_of(run) if row["event"] == "settling")
        for run in (run_dir, whole_run)
    )
    assert found == pytest.approx(expected, rel=1e-4)


@NEEDS_SHARDING
def test_sharded_weights_refuse_it(config: Path, tmp_path: Path) -> None:
    ended = launch(config, tmp_path / "run", *SETTINGS, "run.parallel=sharded")
    assert 0 not in ended.codes
    assert any("optimizer.settling_steps" in text for text in ended.err)
