"""The average of the weights: Elastic Reset, sampling from it, and the reference that follows the policy."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quark.config.load import load_config
from quark.config.schema import AverageSection
from quark.errors import CheckpointError, ConfigError
from quark.run_directory import RunDirectory
from quark.training.assemble import assemble
from quark.training.loop.averaging import WeightAverage
from quark.training.loop.trainer import Trainer
from tests.tiny import tiny_batch
from tests.training.tiny_run import (
    NUM_ROUNDS,
    STEPS_PER_ROUND,
    Listener,
    end_of,
    fingerprint_of,
    rows_of,
    train,
    write_inputs,
)

RESET = ("average.reset_every_rounds=1", "average.update_every_steps=3")
LORA = ("model.lora.rank=2",)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@contextmanager
def assembled(
    config: Path, run_dir: Path, *overrides: str
) -> Iterator[tuple[Trainer, WeightAverage]]:
    trainer = assemble(load_config(config, overrides), run_dir, listener=Listener())
    [hook] = trainer._learning.hooks._hooks
    assert isinstance(hook, WeightAverage)
    try:
        yield trainer, hook
    finally:
        trainer._journal.close()
        trainer._exploring.pool.close()


def trained_tensors(trainer: Trainer) -> dict[str, Tensor]:
    model = trainer._learning.policy.model
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def shift(trainer: Trainer, seed: int) -> None:
    """What an optimizer step would do."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trainer._learning.policy.model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)


def test_the_average_is_the_recursion_of_the_paper(config: Path, tmp_path: Path) -> None:
    with assembled(config, tmp_path / "run", "average.decay=0.75", "average.samples=ema") as (
        trainer,
        hook,
    ):
        expected = {name: value.double() for name, value in trained_tensors(trainer).items()}
        for step in range(5):
            shift(trainer, step)
            hook.after_step(step)
            now = trained_tensors(trainer)
            expected = {name: 0.75 * value + 0.25 * now[name] for name, value in expected.items()}
        assert hook.tensors().keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(hook.tensors()[name].double(), value, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("overrides", [(), LORA], ids=["all weights", "adapters"])
def test_a_reset_goes_to_the_average_and_the_average_to_the_original(
    config: Path, tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    with assembled(
        config, tmp_path / "run", *overrides, "average.reset_every_rounds=2", "average.decay=0.5"
    ) as (trainer, hook):
        original = trained_tensors(trainer)
        for step in range(3):
            shift(trainer, step)
            hook.after_step(step)
        tokens = trainer._learning.policy.reward_vectors.clone()
        average = {name: value.clone() for name, value in hook.tensors().items()}
        matrix, rows = trainer._learning.policy.reward_matrix
        hook.before_exploration(1)
        assert not torch.equal(
            trained_tensors(trainer)[next(iter(average))], average[next(iter(average))]
        )
        hook.before_exploration(2)
        for name, parameter in trainer._learning.policy.model.named_parameters():
            if not parameter.requires_grad:
                continue
            inside = torch.ones(len(parameter), dtype=torch.bool)
            if parameter is matrix:
                inside[rows] = False
                assert torch.equal(parameter[rows], tokens)
                assert torch.equal(hook.tensors()[name][rows], tokens)
            assert torch.equal(parameter[inside], average[name][inside])
            assert torch.equal(hook.tensors()[name][inside], original[name][inside])


def test_a_reset_is_not_made_twice_before_one_round(config: Path, tmp_path: Path) -> None:
    with assembled(
        config, tmp_path / "run", "average.reset_every_rounds=1", "average.decay=0.5"
    ) as (trainer, hook):
        shift(trainer, 0)
        hook.after_step(0)
        hook.before_exploration(1)
        once = trained_tensors(trainer)
        hook.before_exploration(1)
        assert all(
            torch.equal(once[name], value) for name, value in trained_tensors(trainer).items()
        )


def without_resets(run_dir: Path) -> list[dict[str, Any]]:
    return [row for row in rows_of(run_dir) if row["event"] not in ("reset", "recovery")]


@pytest.fixture(scope="module")
def idle_resets(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run whose average is the policy at every moment."""
    run_dir = tmp_path_factory.mktemp("idle") / "run"
    train(config, run_dir, overrides=(RESET[0], "average.decay=0"))
    return run_dir


def test_a_decay_of_0_makes_resets_without_effect(
    config: Path, tmp_path: Path, idle_resets: Path
) -> None:
    train(config, tmp_path / "plain")
    assert without_resets(idle_resets) == without_resets(tmp_path / "plain")
    fingerprints = [fingerprint_of(run) for run in (tmp_path / "plain", idle_resets)]
    assert fingerprints[0]["weights"] == fingerprints[1]["weights"]


def test_a_decay_of_1_resets_all_the_way(config: Path, tmp_path: Path) -> None:
    # Far enough from the original that going back to it shortens the drift of any random model.
    far = ("optimizer.learning_rate=1e-2", "optimizer.reward_token_lr_scale=0.01")
    overrides = (RESET[0], "average.decay=1", "run.num_rounds=2", *far)
    train(config, tmp_path / "run", overrides=overrides)
    [reset] = [row for row in rows_of(tmp_path / "run") if row["event"] == "reset"]
    assert reset["weight_of_original"] == 1.0
    assert reset["distance_to_original"] > 0
    assert reset["distance_of_average_to_original"] == 0.0
    assert reset["kl_after"] < reset["kl_before"]


@pytest.mark.parametrize(
    "overrides",
    [
        (*RESET, "average.kl_anchor=ema"),
        ("average.samples=ema", "average.decay=0.5", *LORA),
    ],
    ids=["resets with the average as the anchor", "sampling from the average of adapters"],
)
def test_a_run_stopped_again_and_again_ends_equal(
    config: Path, tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    train(config, tmp_path / "whole", overrides=overrides)
    num_lives = 1
    while train(config, tmp_path / "run", overrides=overrides, stop_at=7).interrupted:
        num_lives += 1
        assert num_lives < 100
    assert num_lives > NUM_ROUNDS
    assert end_of(tmp_path / "run") == end_of(tmp_path / "whole")
    resets = [row for row in rows_of(tmp_path / "run") if row["event"] == "reset"]
    if "average.kl_anchor=ema" in overrides:
        assert [row["number"] for row in resets] == list(range(1, NUM_ROUNDS))
        assert [row["step"] for row in resets] == [STEPS_PER_ROUND, 2 * STEPS_PER_ROUND]
        assert all(0 < row["weight_of_original"] < 1 for row in resets)


def test_the_log_says_when_the_reward_from_before_a_reset_is_reached_again(
    idle_resets: Path,
) -> None:
    # A reset that changes nothing is recovered from at the first evaluation that is no worse.
    rows = rows_of(idle_resets)
    resets = {row["number"]: row for row in rows if row["event"] == "reset"}
    recoveries = [row for row in rows if row["event"] == "recovery"]
    best = [r for r in rows if r["event"] == "evaluation" and r["quantile"] == 2]
    expected = []
    for number, reset in resets.items():
        assert reset["reward_before"] == reset["reward_after"]
        later = [row for row in best if row["step"] > reset["step"]]
        until = resets[number + 1]["step"] if number + 1 in resets else float("inf")
        reached = [r for r in later if r["reward_mean"] >= reset["reward_before"]]
        if reached and reached[0]["step"] <= until:
            expected.append((number, reached[0]["step"] - reset["step"]))
    assert [(row["number"], row["steps"]) for row in recoveries] == expected


def test_what_is_sampled_and_published_is_the_average_while_the_policy_trains_on(
    config: Path, tmp_path: Path
) -> None:
    overrides = ("average.samples=ema", "average.decay=0.8")
    train(config, tmp_path / "run", overrides=overrides)
    run = RunDirectory(tmp_path / "run")
    checkpoint = sorted(run.checkpoints.iterdir())[-1]
    policy = load_file(checkpoint / "model.safetensors")
    average = load_file(checkpoint / "hooks.safetensors")
    published = load_file(run.model / "model.safetensors")
    name = "transformer.h.0.attn.c_attn.weight"
    assert torch.equal(published[name], average[f"average/{name}"])
    assert not torch.equal(published[name], policy[name])


@pytest.mark.parametrize("overrides", [(), LORA], ids=["all weights", "adapters"])
def test_the_average_as_a_reference_is_the_original_model_until_it_moves(
    config: Path, tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    with assembled(
        config, tmp_path / "run", *overrides, "average.kl_anchor=ema", "average.decay=0"
    ) as (trainer, hook):
        policy = trainer._learning.policy
        anchor = trainer._learning.learner._reference
        batch = tiny_batch(policy)
        width = policy.reward_tokens.base_vocab_size
        original = trainer._evaluating.evaluator._reference  # type: ignore[union-attr]
        before = anchor.sequence_logprobs(batch, base_vocab_size=width)
        torch.testing.assert_close(before, original.sequence_logprobs(batch, base_vocab_size=width))
        shift(trainer, 0)
        assert torch.equal(anchor.sequence_logprobs(batch, base_vocab_size=width), before)
        hook.after_step(0)  # with a decay of 0 the average is the policy
        moved = anchor.sequence_logprobs(batch, base_vocab_size=width)
        with torch.no_grad():
            rows = policy.causal.run(batch.reference_inputs())
        assert torch.equal(anchor.completion_rows(batch).rows, rows.rows)
        assert not torch.allclose(moved, before)


def test_a_run_does_not_resume_over_another_original_model(tmp_path: Path) -> None:
    config, run_dir = write_inputs(tmp_path), tmp_path / "run"
    train(config, run_dir, overrides=(*RESET, "run.num_rounds=1"))
    weights = tmp_path / "model" / "model.safetensors"
    tensors = load_file(weights)
    tensors = {name: value * 1.01 for name, value in tensors.items()}
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="is not the one that this run began with"):
        train(config, run_dir, overrides=RESET)


def test_a_checkpoint_without_its_average_is_refused(config: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    train(config, run_dir, overrides=(*RESET, "run.num_rounds=1"))
    for checkpoint in RunDirectory(run_dir).checkpoints.iterdir():
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        del manifest["hooks.safetensors"]
        (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="lacks"):
        train(config, run_dir, overrides=RESET)


def test_the_weight_at_a_reset_gives_the_decay() -> None:
    section = AverageSection(reset_every_rounds=5, init_weight_at_reset=0.2)
    assert section.decay_in(16) ** (5 * 16) == pytest.approx(0.2)
    assert AverageSection(reset_every_rounds=5).decay_in(16) ** 80 == pytest.approx(0.3)
    assert AverageSection(reset_every_rounds=5, init_weight_at_reset=0).decay_in(16) == 0.0


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("average.decay=0.9",), "has no use"),
        (("average.samples=ema",), "average.decay is unset"),
        (("average.init_weight_at_reset=0.5",), "average.reset_every_rounds is unset"),
        ((*RESET, "average.decay=0.9", "average.init_weight_at_reset=0.5"), "set one of them"),
        ((*RESET, "average.samples=ema"), "leave the resets out"),
        (
            ("average.kl_anchor=ema", "average.decay=0.4", "reference.cache=hidden"),
            "reference.cache",
        ),
    ],
)
def test_settings_of_the_average_that_do_not_fit_are_refused(
    config: Path, overrides: tuple[str, ...], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        load_config(config, overrides)
