from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, pipeline

from quark.config.load import load_config
from quark.errors import CheckpointError, ConfigError, QuarkError, RewardError, TrainingError
from quark.pool.columns import column_name
from quark.pool.native import NativePool
from quark.run_directory import RunDirectory
from quark.training.assemble import assemble
from quark.training.dry_run import dry_run
from quark.training.loop.trainer import Trainer
from quark.training.state.checkpoint import Checkpoints
from tests.full_disk import file_size_limit
from tests.training.tiny_run import (
    NUM_ROUNDS,
    STEPS_PER_ROUND,
    Listener,
    fingerprint_of,
    rows_of,
    train,
    write_inputs,
)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def run_dir(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "whole"
    train(config, path)
    return path


def test_the_first_round_explores_without_a_token_and_later_ones_with_the_best(
    run_dir: Path,
) -> None:
    with NativePool.open(run_dir / "pool") as pool:
        samples = pool.samples(range(len(pool)))
        assert pool.score_columns == ("length", "reward") or set(pool.score_columns) == {
            "reward",
            "length",
        }
    tokens = {number: {s.reward_token for s in samples if s.round == number} for number in range(3)}
    assert tokens == {0: {-1}, 1: {2}, 2: {2}}
    assert [sum(s.round == number for s in samples) for number in range(3)] == [24, 12, 12]
    steps = {(s.round, s.policy_step) for s in samples}
    assert steps == {(0, 0), (1, STEPS_PER_ROUND), (2, 2 * STEPS_PER_ROUND)}


def test_the_references_log_probability_is_stored_for_every_sample(run_dir: Path) -> None:
    with NativePool.open(run_dir / "pool") as pool:
        samples = pool.samples(range(len(pool)))
    first = [s for s in samples if s.round == 0]
    later = [s for s in samples if s.round > 0]
    assert all(s.logprob_reference == s.logprob_policy for s in first)
    assert all(math.isfinite(s.logprob_reference) and s.logprob_reference < 0 for s in later)
    assert any(abs(s.logprob_reference - s.logprob_policy) > 1e-3 for s in later)


def test_the_round_row_agrees_with_the_pool(run_dir: Path) -> None:
    row = [r for r in rows_of(run_dir) if r["event"] == "round"][1]
    with NativePool.open(run_dir / "pool", snapshot=5) as pool:
        rewards = pool.scores("reward")
        new = rewards[24:36]
        quantization = pool.quantize(3)
        assert row["samples"] == len(pool) == 36
        assert row["quantile_counts"] == quantization.counts.tolist()
        assert row["quantile_lower_bounds"] == pytest.approx(quantization.lower_bounds.tolist())
    assert row["new_samples"] == 12
    assert row["reward_mean"] == pytest.approx(new.mean())
    assert row["reward_max"] == pytest.approx(new.max())


def test_the_learning_rate_warms_up_and_decays_to_zero(run_dir: Path) -> None:
    rates = [r["learning_rate"] for r in rows_of(run_dir) if r["event"] == "step"]
    assert rates[:2] == pytest.approx([0.5e-3, 1e-3])
    assert np.all(np.diff(rates[2:]) < 0)
    assert 0 < rates[-1] < 0.2e-3


def test_the_result_tells_before_and_after(config: Path, tmp_path: Path) -> None:
    listener = Listener()
    result = train(config, tmp_path / "run", listener=listener)
    rows = rows_of(tmp_path / "run")
    evaluations = {r["quantile"]: r for r in rows if r["event"] == "evaluation"}
    assert result.reward_before == evaluations[None]["reward_mean"]
    assert result.reward_after == evaluations[2]["reward_mean"]
    assert list(result.control_curve) == [evaluations[k]["reward_mean"] for k in range(3)]
    assert result.kl_reference_to_policy > 0
    assert (result.rounds, result.samples) == (NUM_ROUNDS, 48)
    assert {"diversity_before", "diversity_after", "distinct_2_after"} <= result.metrics.keys()
    assert [pair.prompt for pair in result.before_after] == ["say a", "say b"]
    assert len(listener.rounds) == NUM_ROUNDS
    assert all(s.quantile == 2 for s in listener.rounds[-1].best_samples)
    assert rows[-1]["reward_after"] == result.reward_after


def test_the_saved_model_is_loaded_by_plain_transformers(run_dir: Path) -> None:
    generate = pipeline("text-generation", model=str(RunDirectory(run_dir).model))
    assert generate("say one", max_new_tokens=8)[0]["generated_text"]


def test_the_models_card_tells_the_run(run_dir: Path) -> None:
    card = (RunDirectory(run_dir).model / "README.md").read_text()
    end = rows_of(run_dir)[-1]
    assert f"{end['reward_after']:.3f}" in card
    assert "mean diversity (never trained on)" in card
    assert "num_quantiles = 3" in card


def test_the_log_is_strict_json(run_dir: Path) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    for line in RunDirectory(run_dir).metrics.read_text().splitlines():
        assert next(iter(json.loads(line, parse_constant=refuse))) == "event"


def test_where_every_value_came_from_is_kept(config: Path, run_dir: Path) -> None:
    origins = json.loads(RunDirectory(run_dir).identity.read_text())["origins"]
    assert origins["optimizer.learning_rate"] == f"file {config}"
    assert origins["optimizer.eps"] == "default"


@contextmanager
def trainer_of(config: Path, run_dir: Path, *overrides: str) -> Iterator[Trainer]:
    yield assemble(load_config(config, overrides), run_dir, listener=Listener())


@pytest.mark.parametrize("place", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_skipped_and_counted(
    config: Path, tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second step's loss or gradient is made NaN; its weights must be those of the first."""
    with trainer_of(config, tmp_path / "run") as trainer:
        policy = trainer._learning.policy
        weights: list[torch.Tensor] = []
        compute = trainer._learning.objective.__class__.__call__
        calls = 0

        def poisoned(self, *args, **kwargs):  # type: ignore[no-untyped-def]
            nonlocal calls
            output = compute(self, *args, **kwargs)
            calls += 1
            if calls % 3 == 1:
                weights.append(policy.model.get_input_embeddings().weight.detach().clone())
            if calls == 4:  # three micro-batches a step
                if place == "loss":
                    object.__setattr__(output, "loss", output.loss * math.nan)
                else:
                    output.loss.register_hook(lambda gradient: gradient * math.nan)
            return output

        monkeypatch.setattr(trainer._learning.objective.__class__, "__call__", poisoned)
        result = trainer.run()
    assert result.metrics["skipped_steps"] == 1
    assert not torch.equal(weights[0], weights[1])
    assert torch.equal(weights[1], weights[2])
    steps = [r for r in rows_of(tmp_path / "run") if r["event"] == "step"]
    assert len(steps) == NUM_ROUNDS * STEPS_PER_ROUND
    assert all(torch.isfinite(p).all() for p in policy.model.parameters())


def test_too_many_skipped_steps_in_a_row_stop_the_run(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with trainer_of(config, tmp_path / "run", "optimizer.max_skipped_steps=2") as trainer:
        compute = trainer._learning.objective.__class__.__call__

        def poisoned(self, *args, **kwargs):  # type: ignore[no-untyped-def]
            output = compute(self, *args, **kwargs)
            object.__setattr__(output, "loss", output.loss * math.nan)
            return output

        monkeypatch.setattr(trainer._learning.objective.__class__, "__call__", poisoned)
        with pytest.raises(TrainingError, match="3 steps in a row"):
            trainer.run()


def reward_file(tmp_path: Path, body: str) -> str:
    path = tmp_path / "some_reward.py"
    path.write_text(f"def reward(prompts, completions):\n    {body}\n")
    return f"reward.name={json.dumps(f'{path}:reward')}"


@pytest.mark.parametrize("body", ["raise ValueError('no')", "return [1.0]", "return 'text'"])
def test_a_reward_that_fails_stops_the_run_by_name(config: Path, tmp_path: Path, body: str) -> None:
    with pytest.raises(RewardError, match="reward"):
        train(config, tmp_path / "run", overrides=(reward_file(tmp_path, body),))


def test_completions_without_a_score_are_kept_unranked_and_counted(
    config: Path, tmp_path: Path
) -> None:
    body = "return [None if i % 4 == 0 else len(t) for i, t in enumerate(completions)]"
    listener = Listener()
    train(config, tmp_path / "run", overrides=(reward_file(tmp_path, body),), listener=listener)
    with NativePool.open(tmp_path / "run" / "pool") as pool:
        assert np.isnan(pool.scores("reward")).sum() == 48 // 4
        assert pool.quantize(3).num_unranked == 12
    rounds = [r for r in rows_of(tmp_path / "run") if r["event"] == "round"]
    assert [r["failed_scores"] for r in rounds] == [6, 3, 3]
    assert any("got no score" in message for message in listener.messages)


def test_samples_that_are_used_up_before_the_round_ends_stop_the_run(
    config: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        ConfigError, match=r"pool.max_uses = 1 leaves 2 batches of 9 for the 4 steps"
    ):
        train(config, tmp_path / "run", overrides=("pool.max_uses=1",))


def test_a_reward_that_never_scores_stops_the_run(config: Path, tmp_path: Path) -> None:
    overrides = (reward_file(tmp_path, "return [None for _ in completions]"),)
    with pytest.raises(TrainingError, match="none of the 24 samples has a score"):
        train(config, tmp_path / "run", overrides=overrides)


def test_a_condition_that_no_sample_fulfils_is_not_blamed_on_the_reward(
    config: Path, tmp_path: Path
) -> None:
    with pytest.raises(TrainingError, match=r"none of the 24 samples fulfils pool.min_score = 9"):
        train(config, tmp_path / "run", overrides=("pool.min_score=9999.0",))


@pytest.mark.parametrize(
    "override",
    [
        "pool.sampling=iid",
        "pool.sampling=shuffle",
        "pool.train_quantiles=best",
        "pool.num_quantiles=1",
        "pool.ties=older_first",
        "pool.remainder=lowest",
        "run.completions_per_prompt=2",
        "optimizer.schedule=cosine",
        "objective.kl_direction=kl_policy_to_reference",
        "objective.reduction=token_mean",
        "objective={entropy_coef=0.01, entropy_target=20.0}",
        "sampling.temperature=0.0",
        "pool.store_text=false",
        "evaluation.control_curve=false",
        "prompts.limit=3",
        "run.precision=bfloat16",
    ],
)
def test_every_way_to_train_runs(config: Path, tmp_path: Path, override: str) -> None:
    result = train(config, tmp_path / "run", overrides=(override, "run.num_rounds=2"))
    assert result.rounds == 2
    assert math.isfinite(result.reward_after)


def test_training_on_the_best_quantile_alone_draws_nothing_else(
    config: Path, tmp_path: Path
) -> None:
    with trainer_of(config, tmp_path / "run", "pool.train_quantiles=best") as trainer:
        seen: set[int] = set()
        step = trainer._learning.learner.step
        trainer._learning.learner.step = lambda samples, position: (  # type: ignore[method-assign]
            seen.update(samples.quantiles.tolist()),
            step(samples, position),
        )[1]
        trainer.run()
    assert seen == {2}


def test_reward_tokens_take_longer_steps_where_asked_and_nothing_else_does(
    config: Path, tmp_path: Path
) -> None:
    one_step = ("run.num_rounds=1", "run.steps_per_round=1", "optimizer.warmup_steps=0")
    weights: dict[str, np.ndarray] = {}
    for scale in ("1.0", "10.0", "20.0"):
        setting = f"optimizer.reward_token_lr_scale={scale}"
        train(config, tmp_path / scale, overrides=(*one_step, setting))
        model = AutoModelForCausalLM.from_pretrained(tmp_path / scale / "model")
        weights[scale] = model.get_input_embeddings().weight.detach().numpy()
    # Adam's first step is one learning rate long, so the steps differ by multiples of it.
    rows, rate = slice(-3, None), 1e-3
    moved = weights["10.0"] - weights["1.0"]
    assert np.abs(moved[rows]).max() == pytest.approx(9 * rate, rel=1e-2)
    assert weights["20.0"][rows] - weights["10.0"][rows] == pytest.approx(
        moved[rows] * 10 / 9, abs=1e-6
    )
    assert not moved[:-3].any()


def test_micro_batches_do_not_change_the_step(config: Path, tmp_path: Path) -> None:
    losses = []
    for size in ("9", "2"):
        train(config, tmp_path / size, overrides=(f"optimizer.micro_batch_size={size}",))
        losses.append([r["loss"] for r in rows_of(tmp_path / size) if r["event"] == "step"][:4])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_dry_run_scores_three_prompts_and_writes_nothing(config: Path, tmp_path: Path) -> None:
    before = sorted(config.parent.iterdir())
    rehearsal = dry_run(load_config(config), listener=Listener())
    assert len(rehearsal.prompts) == 3
    assert all(p.text.startswith("<|reward_2|>say ") for p in rehearsal.prompts)
    assert all(math.isfinite(p.reward) for p in rehearsal.prompts)
    assert sorted(config.parent.iterdir()) == before
    for override in (
        "pool.where='rewrad > 0'",
        "pool.where='reward'",
        "pool.extra_scores=['./a:f']",
    ):
        with pytest.raises(QuarkError):
            dry_run(load_config(config, (override,)), listener=Listener())


def test_judges_and_extra_scores_have_the_settings_of_their_kind(
    config: Path, tmp_path: Path
) -> None:
    overrides = (
        "reward.regex.pattern='.'",
        "evaluation.judges=['regex']",
        f"pool.extra_scores=['{tmp_path}/My.py:F', 'regex']",
        f"""pool.where='"{column_name(f"{tmp_path}/My.py:F")}" > 0 AND regex >= 0'""",
    )
    (tmp_path / "My.py").write_text("def F(prompts, completions): return [1.0] * len(prompts)\n")
    metrics = train(config, tmp_path / "run", overrides=overrides).metrics
    assert 0 < metrics["regex_after"] <= 1


@pytest.mark.parametrize("num_bytes", [50_000, 7_000, 2_000])
def test_a_full_disk_names_the_path_and_leaves_the_last_checkpoint_good(
    config: Path, run_dir: Path, tmp_path: Path, num_bytes: int
) -> None:
    """The smaller the limit, the earlier it is met: by tensors, by the log, by the configuration."""
    expected = fingerprint_of(run_dir)
    run_dir = tmp_path / "run"
    assert train(config, run_dir, stop_at=21).interrupted
    checkpoints = Checkpoints(RunDirectory(run_dir).checkpoints, keep_last=2)
    before, _ = checkpoints.newest()
    assert before is not None
    with file_size_limit(num_bytes), pytest.raises((CheckpointError, OSError, QuarkError)) as error:
        train(config, run_dir)
    assert str(run_dir) in f"{error.value} {getattr(error.value, 'filename', '')}"
    if isinstance(error.value, CheckpointError):
        assert re.search(r"needs \d+\.\d MB", str(error.value))
    after, rejected = checkpoints.newest()
    assert after is not None
    assert (after.step, rejected) == (before.step, [])
    train(config, run_dir)
    assert fingerprint_of(run_dir) == expected


def test_a_run_on_batches_of_one_has_finite_figures(config: Path, tmp_path: Path) -> None:
    """Warnings are errors here, those about the spread of a single value too."""
    ones = ("run.chunk_size", "run.completions_per_prompt", "run.steps_per_round")
    ones += ("optimizer.batch_size", "evaluation.completions_per_prompt", "sampling.batch_size")
    counts = ("run.prompts_first_round=3", "run.prompts_per_round=1", "run.num_rounds=2")
    settings = (*(f"{key}=1" for key in ones), *counts, "optimizer.micro_batch_size=1")
    result = train(config, tmp_path / "run", overrides=settings)
    assert result.samples == 4
    assert math.isfinite(result.reward_after)
    assert math.isfinite(result.kl_policy_to_reference)
