"""Runs whose model gets no reward token: quantiles differ by the critic alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import quark as quark_api
from quark.config.load import load_config
from quark.errors import ConfigError, ModelError
from quark.generation.base import SamplingConfig
from quark.generation.transformers_generator import TransformersGenerator
from quark.models.check.trials import check_policy
from quark.models.config import ModelConfig
from quark.models.loading import load_policy, load_saved_policy
from quark.models.reward_tokens import REWARD_TOKENS_FILE
from quark.models.token_critic import CRITIC_FILE, TokenCritic
from quark.pool.native import NativePool
from quark.run_directory import RunDirectory
from quark.training.loop.critic import weakness_of
from quark.types import Prompt
from tests.cli.commands import TINY_RUN, quark
from tests.training.launching import launch
from tests.training.tiny_run import NEEDS_SHARDING, end_of, rows_of, train, write_inputs

FROZEN = (
    "model.reward_tokens=false",
    "sampling.guide=critic",
    "sampling.guidance=2.0",
    "objective.lm_coef=0",
)
TRAINED = (
    *FROZEN,
    "objective.advantage_coef=1",
    "objective.tilt_coef=1",
    "objective.tilt_best_share=1",
)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def frozen_run(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("frozen") / "run"
    assert not train(config, run, overrides=FROZEN).interrupted
    return run


@pytest.fixture(scope="module")
def trained_run(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("trained") / "run"
    assert not train(config, run, overrides=TRAINED).interrupted
    return run


def evaluations_of(run: Path) -> list[dict[str, Any]]:
    return [row for row in rows_of(run) if row["event"] == "evaluation"]


def test_a_model_that_nothing_trains_is_the_original_one(config: Path, frozen_run: Path) -> None:
    model = RunDirectory(frozen_run).model
    original = load_file(config.parent / "model" / "model.safetensors")
    saved = load_file(model / "model.safetensors")
    assert saved.keys() == original.keys()
    for name, weight in original.items():
        np.testing.assert_array_equal(saved[name], weight)
    before, after = (AutoTokenizer.from_pretrained(p) for p in (config.parent / "model", model))
    assert after.get_vocab() == before.get_vocab()
    assert after("say").input_ids == before("say").input_ids


def test_it_takes_no_optimizer_step_and_keeps_no_weights(frozen_run: Path) -> None:
    rows = rows_of(frozen_run)
    assert not [row for row in rows if row["event"] == "step"]
    assert [row["skipped_steps"] for row in rows if row["event"] == "round"] == [0, 0, 0]
    checkpoints = sorted(RunDirectory(frozen_run).checkpoints.iterdir())
    assert [path.name for path in checkpoints] == ["step-00000008", "step-00000012"]
    for path in checkpoints:
        assert load_file(path / "model.safetensors") == {}
        assert load_file(path / "optimizer.safetensors") == {}
        assert (path / "hooks.safetensors").is_file(), "the critic"


def test_its_quantiles_are_drawn_along_the_critic(frozen_run: Path) -> None:
    last = {row["quantile"]: row for row in evaluations_of(frozen_run)[-3:]}
    assert set(last) == {0, 1, 2}
    for row in last.values():
        assert row["kl_policy_to_reference"] == row["kl_reference_to_policy"] == 0.0
    assert last[1]["kl_sampled_per_completion"] == pytest.approx(0.0, abs=1e-5)
    assert min(last[0]["kl_sampled_per_completion"], last[2]["kl_sampled_per_completion"]) > 0.01
    assert last[2]["reward_mean"] > last[0]["reward_mean"]
    with NativePool.open(RunDirectory(frozen_run).pool) as pool:
        asked = pool.column("reward_token")
        drawn = pool.column("logprob_sampled") - pool.column("logprob_policy")
        policy = pool.column("logprob_policy") - pool.column("logprob_reference")
    assert asked.tolist() == [-1] * 24 + [2] * 24
    np.testing.assert_array_equal(drawn[:24], 0.0)
    assert np.abs(drawn[24:]).max() > 0.01
    np.testing.assert_array_equal(policy, 0.0)


@pytest.mark.parametrize("settings", [FROZEN, TRAINED], ids=["frozen", "trained"])
def test_a_stopped_run_ends_as_one_that_was_not(
    config: Path, settings: tuple[str, ...], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    whole = request.getfixturevalue("frozen_run" if settings is FROZEN else "trained_run")
    num_lives = 1
    while train(config, tmp_path / "run", overrides=settings, stop_at=9).interrupted:
        num_lives += 1
    assert num_lives > 2
    assert end_of(tmp_path / "run") == end_of(whole)


def test_training_begins_at_the_original_model(config: Path, trained_run: Path) -> None:
    first, *_, last = [row for row in rows_of(trained_run) if row["event"] == "step"]
    assert first["kl_policy_to_reference"] == pytest.approx(0.0, abs=1e-6)
    assert last["kl_policy_to_reference"] > 1e-4
    saved = load_file(RunDirectory(trained_run).model / "model.safetensors")
    original = load_file(config.parent / "model" / "model.safetensors")
    assert {n: w.shape for n, w in saved.items()} == {n: w.shape for n, w in original.items()}
    assert any((saved[name] != original[name]).any() for name in original)


def test_plain_transformers_writes_the_same(trained_run: Path) -> None:
    """As the saved model's card says."""
    folder = RunDirectory(trained_run).model
    policy = load_saved_policy(folder)
    assert not policy.reward_tokens.are_placed
    prompt = Prompt(index=0, text="one", token_ids=tuple(policy.tokenizer.encode("one")))
    settings = {"guide": "critic", "guidance": 2.0, "temperature": 0.0, "max_new_tokens": 6}
    ours = TransformersGenerator(
        policy,
        policy.tokenizer,
        policy.reward_tokens,
        SamplingConfig.model_validate(settings),
        torch.device("cpu"),
    )
    (expected,) = ours.generate([prompt], quantile=2, seed=0)
    (alone,) = quark_api.load(folder).generate("one", temperature=0.0, max_new_tokens=6)
    assert alone.token_ids.tolist() == expected.token_ids.tolist(), "without its run"
    scores = torch.from_numpy(load_file(folder / CRITIC_FILE)["scores"])

    def along_the_critic(input_ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        logits[:, : len(scores)] += 2.0 * scores
        return logits

    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer("one", return_tensors="pt")
    found = AutoModelForCausalLM.from_pretrained(folder).generate(
        **inputs, do_sample=False, temperature=None, top_p=None, top_k=None, max_new_tokens=6,
        logits_processor=[along_the_critic],
    )  # fmt: skip
    new = found[0, inputs.input_ids.shape[1] :].tolist()
    assert new[: len(expected.token_ids)] == expected.token_ids.tolist()


@pytest.mark.parametrize("rank", [0, 2])
def test_every_check_of_a_model_passes(config: Path, rank: int) -> None:
    model = ModelConfig.model_validate(
        {
            "name": str(config.parent / "model"),
            "reward_tokens": False,
            "lora": {"rank": rank, "target_modules": ["q_proj", "c_attn"] if rank else []},
        }
    )
    policy = load_policy(model, num_quantiles=3, seed=0)
    found = {finding.name: finding.state for finding in check_policy(policy).findings}
    assert set(found.values()) == {"passed"}, found


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (("sampling.guide=tokens", "objective.advantage_coef=1"), 'set sampling.guide = "critic"'),
        (("objective.lm_coef=1",), "objective.lm_coef trains or measures reward tokens"),
        (("objective.contrast_coef=1",), "objective.contrast_coef trains or measures"),
        (("optimizer.settling_steps=2",), "optimizer.settling_steps trains or measures"),
        (("pool.held_out_share=0.2",), "pool.held_out_share trains or measures"),
        (("objective.tilt_coef=1",), "set it to 1"),
        (("model.shift_positions=true",), "leave them out"),
        (('model.lowest_words=["a"]', 'model.highest_words=["b"]'), "leave them out"),
    ],
)
def test_what_needs_tokens_is_refused(config: Path, settings: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_config(config, (*FROZEN, *settings))


@pytest.mark.parametrize(
    "changed", [{"base_vocab_size": 10}, {"ids": [1, 2, 3]}, {"format_version": 3}]
)
def test_a_saved_model_with_other_quantiles_is_refused(
    frozen_run: Path, changed: dict[str, Any], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    load_saved_policy(RunDirectory(frozen_run).model).save(folder)
    file = folder / REWARD_TOKENS_FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    with pytest.raises(ModelError, match=REWARD_TOKENS_FILE):
        load_saved_policy(folder)


@NEEDS_SHARDING
def test_processes_that_share_the_weights_measure_the_same(
    config: Path, frozen_run: Path, tmp_path: Path
) -> None:
    ended = launch(config, tmp_path / "run", *FROZEN, "run.parallel=sharded")
    assert ended.codes == [0, 0], ended.err
    for found, expected in zip(
        evaluations_of(tmp_path / "run"), evaluations_of(frozen_run), strict=True
    ):
        for name in ("reward_mean", "kl_sampled_per_completion"):
            assert found[name] == pytest.approx(expected[name], abs=1e-5)


def test_fit_learns_tokens_from_its_pool(config: Path, frozen_run: Path) -> None:
    model = config.parent / "model"
    outcome = quark("fit", frozen_run, "--model", model, "--steps", "1", "--held-out", "0.4")
    assert "rank corr." in outcome.out, outcome.err


@pytest.mark.parametrize(
    ("explained", "is_last_round", "said"),
    [
        (0.0, False, "do not explain their rewards"),
        (0.05, True, "explains 5% of how 512 samples rank"),
        (0.05, False, None),
        (0.24, True, None),
    ],
)
def test_a_critic_that_explains_little_is_said_to(explained, is_last_round, said):
    critic = TokenCritic(scores=torch.zeros(4), explained=explained, num_samples=512)
    found = weakness_of(critic, is_last_round=is_last_round)
    assert found is None if said is None else said in found


def test_a_run_says_that_its_critic_explains_little(tmp_path: Path) -> None:
    """By a reward that no token predicts."""
    (tmp_path / "reward.py").write_text(
        "import zlib\n"
        "def score(*, prompts, completions):\n"
        "    return [zlib.crc32(text.encode()) % 1000 for text in completions]\n"
    )
    settings = {
        "model.name": "embedded:reviews",
        "prompts.source": "embedded:reviews",
        "reward.name": f"{tmp_path / 'reward.py'}:score",
    }
    chosen = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    done = quark("train", "critic", "--run-dir", tmp_path / "run", *TINY_RUN, *chosen)
    assert done.code == 0, done.err
    said = " ".join((done.out + done.err).split())
    assert "do not explain their rewards" in said or "changes the reward little" in said
