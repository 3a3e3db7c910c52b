"""Another reward for a finished run's pool, cut anew and trained on: not a token is generated."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from quark.config.schema import OptimizerSection
from quark.data.collate import collate
from quark.errors import ConfigError
from quark.models.config import ModelConfig
from quark.models.loading import load_base_model, load_policy
from quark.objectives.config import QuarkObjectiveConfig
from quark.objectives.quark import QuarkObjective
from quark.pool.base import Quantization, RemainderRule, TieRule
from quark.pool.native import NativePool
from quark.pool.scope import MeanMinusVariance, Scope
from quark.reference.base import FrozenReference
from quark.rewards.build import build_reward, reward_provenance
from quark.rewards.config import RewardConfig
from quark.rewards.heuristics import LengthConfig
from quark.run_directory import RunDirectory
from quark.training.loop.optimization import make_optimizer
from tests.training.tiny_run import Listener, train, write_inputs

NUM_QUANTILES = 2


def high_bytes(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """The opposite of what the run was rewarded for."""
    return [sum(c >= "a" for c in text) / (len(text) or 1) for text in completions]


def test_a_run_changes_its_reward_in_the_middle(tmp_path: Path) -> None:
    config, run_dir = write_inputs(tmp_path), tmp_path / "run"
    other = tmp_path / "other_reward.py"
    other.write_text(
        "def of(prompts, completions):\n    return [float(len(t)) for t in completions]\n"
    )
    change = f"reward.name={json.dumps(f'{other}:of')}"
    assert train(config, run_dir, stop_at=15).interrupted
    with pytest.raises(ConfigError, match=r"first: quark pool rescore .*other_reward"):
        train(config, run_dir, overrides=(change,))

    reward = build_reward(RewardConfig(name=f"{other}:of"))
    with NativePool.open(RunDirectory(run_dir).pool, writable=True) as pool:
        num_before = len(pool)
        pool.rescore(
            "reward",
            lambda p, c: [score or 0.0 for score in reward(prompts=p, completions=c)],
            source=reward_provenance(reward),
        )
    with pytest.raises(ConfigError, match="were scored anew by of, and the reward of the run is"):
        train(config, run_dir)
    with pytest.raises(ConfigError, match=r"pool\.num_quantiles"):
        train(config, run_dir, overrides=(change, "pool.num_quantiles=4"))

    listener = Listener()
    result = train(config, run_dir, overrides=(change,), listener=listener)
    assert (result.rounds, result.interrupted) == (3, False)
    assert any("another one from here on" in message for message in listener.messages)
    with NativePool.open(RunDirectory(run_dir).pool) as pool:
        assert len(pool) > num_before
        texts = [sample.completion_text or "" for sample in pool.samples(range(len(pool)))]
        assert pool.scores("reward").tolist() == [len(text) for text in texts]

    # Anew, with the first reward: the scores of the other one are gone with the pool.
    assert train(config, run_dir, fresh=True, force=True, stop_at=15).interrupted
    with NativePool.open(RunDirectory(run_dir).pool) as pool:
        texts = [sample.completion_text or "" for sample in pool.samples(range(len(pool)))]
        assert pool.scores("reward").tolist() != [len(text) for text in texts]


def test_a_rescored_pool_is_not_gone_on_with_by_a_reward_with_other_settings(
    tmp_path: Path,
) -> None:
    config, run_dir = write_inputs(tmp_path), tmp_path / "run"
    assert train(config, run_dir, stop_at=15).interrupted
    reward = build_reward(RewardConfig(name="length", length=LengthConfig(target=6)))
    with NativePool.open(RunDirectory(run_dir).pool, writable=True) as pool:
        pool.rescore(
            "reward",
            lambda p, c: [score or 0.0 for score in reward(prompts=p, completions=c)],
            source=reward_provenance(reward),
        )
    change = "reward.name=length"
    with pytest.raises(ConfigError, match="length with other settings"):
        train(config, run_dir, overrides=(change,))

    shutil.rmtree(
        RunDirectory(run_dir).checkpoints
    )  # so that rounds begin anew that are in the pool
    listener = Listener()
    changes = (change, "reward.length.target=6")
    assert train(config, run_dir, overrides=changes, listener=listener).rounds == 3
    said = [message.split(";")[0] for message in listener.messages if " learns by " in message]
    assert said == [
        f"warning: round {n} learns by the scores that its samples had when it began"
        for n in (0, 1)
    ]


def test_a_rescored_pool_teaches_the_other_reward(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    config = write_inputs(tmp_path)
    train(config, tmp_path / "run")
    with NativePool.open(RunDirectory(tmp_path / "run").pool, writable=True) as pool:
        num_samples, old = len(pool), pool.quantize(3)
        pool.rescore("reward", high_bytes, chunk_size=17)
        pool.rescore("second", high_bytes)
        new = pool.quantize(
            NUM_QUANTILES,
            score=MeanMinusVariance(["reward", "second"]),
            scope=Scope(last_rounds=2, where="finish_reason > 0"),
            ties=TieRule.TOGETHER,
            remainder=RemainderRule.SPREAD,
        )
        assert (old.labels() >= 0).all()
        assert 0 < new.counts.sum() < num_samples
        contrast = [
            train_on(new, ModelConfig(name=str(tmp_path / "model")), steps=n) for n in (0, 30)
        ]
        assert len(pool) == num_samples
    assert contrast[1] > contrast[0] + 1.0


def train_on(quantization: Quantization, model: ModelConfig, *, steps: int) -> float:
    """Nats a sample by which the best token favours samples of the best quantile, after so many steps."""
    policy = load_policy(model, num_quantiles=NUM_QUANTILES, seed=0)
    reference = FrozenReference(load_base_model(model))
    objective = QuarkObjective(QuarkObjectiveConfig(kl_coef=0.02))
    optimizer = make_optimizer(policy.model, OptimizerSection(learning_rate=3e-3))
    sampler = quantization.sampler(batch_size=16, seed=0)
    for step in range(steps):
        samples = sampler.batch(step, pad_id=policy.pad_id)
        batch = collate(samples, policy.reward_tokens.ids, policy.pad_id, policy.device)
        optimizer.zero_grad()
        output = objective(
            policy,
            reference,
            batch,
            num_sequences=batch.num_sequences,
            num_tokens=batch.num_tokens,
        )
        output.loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    samples = sampler.batch(0, pad_id=policy.pad_id)
    of_token = []
    for token in policy.reward_tokens.ids:
        batch = collate(samples, [token] * NUM_QUANTILES, policy.pad_id, policy.device)
        with torch.no_grad():
            rows = policy.completion_rows(batch)
            logits = rows.head(rows.rows)[:, : policy.reward_tokens.base_vocab_size]
            picked = logits.log_softmax(-1).gather(1, batch.targets.unsqueeze(1)).squeeze(1)
        of_token.append(batch.sum_by_sequence(picked).numpy())
    favour = of_token[-1] - of_token[0]
    is_best = samples.quantiles == NUM_QUANTILES - 1
    return float(np.mean(favour[is_best]) - np.mean(favour[~is_best]))
