"""Settings that save memory or time: runs with them resume byte by byte, like any other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from quark.cli.trained_model import open_model
from quark.config.load import load_config
from quark.errors import CheckpointError, ConfigError
from quark.run_directory import RunDirectory
from quark.training.assemble import dry_run
from tests.tiny import save_tiny, tiny_gpt2
from tests.training.tiny_run import Listener, fingerprint_of, train, write_inputs

LORA = ("model.lora.rank=4", "optimizer.learning_rate=0.02", "optimizer.reward_token_lr_scale=3.0")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.mark.parametrize(
    "settings",
    [(*LORA, "model.lora.dropout=0.1", "model.gradient_checkpointing=true")],
    ids=["lora"],
)
def test_a_run_stopped_again_and_again_ends_equal(
    config: Path, tmp_path: Path, settings: tuple[str, ...]
) -> None:
    train(config, tmp_path / "whole", overrides=settings)
    run_dir = tmp_path / "run"
    num_lives = 1
    while train(config, run_dir, overrides=settings, stop_at=11).interrupted:
        num_lives += 1
    assert num_lives > 2
    assert fingerprint_of(run_dir) == fingerprint_of(tmp_path / "whole")


@pytest.fixture(scope="module")
def adapted_run(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("adapted") / "run"
    train(config, run_dir, overrides=LORA)
    return run_dir


def test_checkpoints_hold_adapters_and_the_saved_model_is_whole(adapted_run: Path) -> None:
    run = RunDirectory(adapted_run)
    checkpoint = load_file(max(run.checkpoints.iterdir()) / "model.safetensors")
    assert all("lora_" in name or name.endswith(".rows") for name in checkpoint)
    model = AutoModelForCausalLM.from_pretrained(run.model)
    assert {n for n, _ in model.named_parameters()} == {
        n for n, _ in tiny_gpt2().named_parameters()
    }
    trained = open_model(str(adapted_run))
    assert trained.num_quantiles == 3


def steps_of(run_dir: Path) -> list[dict[str, float]]:
    lines = RunDirectory(run_dir).metrics.read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["event"] == "step"]


FIGURES = ("lm_loss", "kl_reference_to_policy", "kl_policy_to_reference", "entropy")


@pytest.fixture(scope="module")
def plain_steps(config: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    run_dir = tmp_path_factory.mktemp("plain") / "run"
    train(config, run_dir, stop_at=14)
    return steps_of(run_dir)


def test_adapters_begin_where_all_weights_do(
    adapted_run: Path, plain_steps: list[dict[str, float]]
) -> None:
    first, plain = steps_of(adapted_run)[0], plain_steps[0]
    assert [first[f] for f in FIGURES] == pytest.approx([plain[f] for f in FIGURES], rel=1e-4)
    assert steps_of(adapted_run)[-1]["lm_loss"] < first["lm_loss"]


def test_other_weights_below_the_adapters_are_refused(config: Path, tmp_path: Path) -> None:
    folder = tmp_path / "inputs"
    folder.mkdir()
    own = write_inputs(folder)
    assert train(own, tmp_path / "run", overrides=LORA, stop_at=21).interrupted
    save_tiny(folder / "model", tiny_gpt2(seed=1))
    with pytest.raises(CheckpointError, match="weights below the adapters"):
        train(own, tmp_path / "run", overrides=LORA)


def test_a_dry_run_answers_without_the_adapters(config: Path) -> None:
    whole, adapted = (
        dry_run(load_config(config, overrides), listener=Listener()) for overrides in ((), LORA)
    )
    assert [p.completion for p in whole.prompts] == [p.completion for p in adapted.prompts]


def test_the_enlarged_softmax_does_not_go_with_adapters(config: Path) -> None:
    with pytest.raises(ConfigError, match="lm_softmax"):
        load_config(config, (*LORA, "objective.lm_softmax=enlarged"))
