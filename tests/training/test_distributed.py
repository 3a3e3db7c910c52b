"""Two processes of one run, on the CPU: the command line as a launcher starts it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch.distributed.fsdp import FSDPModule

from quark.cli.exit_codes import ExitCode
from quark.errors import ConfigError
from quark.run_directory import RunDirectory
from quark.training.processes.launch import rank_of_process
from quark.training.processes.process_group import ProcessGroup, join_process_group
from quark.training.state.checkpoint import verify
from tests.training.launching import Ended, launch
from tests.training.tiny_run import (
    NUM_ROUNDS,
    STEPS_PER_ROUND,
    Listener,
    fingerprint_of,
    train,
    write_inputs,
)

WEIGHTS_WITHIN = 2e-5
"""Gradients of two halves are added in another order than those of one batch: float32 rounding, which Adam
turns into at most a small part of the learning rate (1e-3) at each of the twelve steps."""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def alone(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run of one process."""
    run_dir = tmp_path_factory.mktemp("alone") / "run"
    train(config, run_dir)
    return run_dir


@pytest.fixture(scope="module")
def together_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("together") / "run"


@pytest.fixture(scope="module")
def together(config: Path, together_dir: Path) -> Ended:
    """A whole run of two processes, which scores while it generates, as the one alone does not."""
    ended = launch(config, together_dir, "run.overlap_scoring=true", new_interpreter=True)
    assert ended.codes == [0, 0], ended.err
    return ended


def weights_of(run_dir: Path) -> dict[str, Any]:
    return load_file(RunDirectory(run_dir).model / "model.safetensors")


def assert_close(run_dir: Path, other: Path) -> None:
    ours, theirs = weights_of(run_dir), weights_of(other)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        if name.endswith("attn.c_attn.bias"):
            # Attention does not feel its keys' bias: the gradient is nothing but rounding, which Adam
            # brings to the full length of a step.
            width = len(value) // 3
            value[width : 2 * width] = theirs[name][width : 2 * width]
        np.testing.assert_allclose(value, theirs[name], rtol=0, atol=WEIGHTS_WITHIN, err_msg=name)


def test_two_processes_fill_the_pool_as_one_does(
    alone: Path, together: Ended, together_dir: Path
) -> None:
    ours, theirs = (fingerprint_of(run)["samples"] for run in (together_dir, alone))
    first = [sample for sample in theirs if sample[2] == 0]
    assert len(first) == 24
    # The original model's are the same to the bit, log-probabilities included.
    assert ours[: len(first)] == first
    # The policy's weights differ by rounding: so do log-probabilities, but no token and no score.
    assert [[*s[:7], s[-1]] for s in ours] == [[*s[:7], s[-1]] for s in theirs]


def test_two_processes_learn_what_one_does(
    alone: Path, together: Ended, together_dir: Path
) -> None:
    assert_close(together_dir, alone)
    steps = [
        [row for row in fingerprint_of(run)["rows"] if row["event"] == "step"]
        for run in (together_dir, alone)
    ]
    assert len(steps[0]) == NUM_ROUNDS * STEPS_PER_ROUND
    for ours, theirs in zip(*steps, strict=True):
        for name in ("loss", "lm_loss", "kl_reference_to_policy", "grad_norm", "kl_coef"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), name
    # The weights did move, by far more than they differ.
    trained = weights_of(alone)
    earlier = load_file(sorted(RunDirectory(alone).checkpoints.iterdir())[0] / "model.safetensors")
    moved = max(float(np.abs(earlier[name] - trained[name]).max()) for name in earlier)
    assert moved > 50 * WEIGHTS_WITHIN


def test_all_processes_hold_the_same_weights_and_only_the_main_process_speaks(
    together: Ended,
) -> None:
    assert together.weights[0] is not None
    assert together.weights[0] == together.weights[1]
    assert json.loads(together.out[0])["rounds"] == NUM_ROUNDS
    assert "pool 48 samples" in " ".join(together.err[0].split())
    assert together.out[1] == ""
    assert together.err[1] == ""


def test_a_signal_to_one_process_stops_all_and_any_number_resumes(
    config: Path, together: Ended, together_dir: Path, alone: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    stopped = launch(config, run_dir, mishap="signal", rank=1, step=5)
    assert stopped.codes == [ExitCode.INTERRUPTED] * 2, stopped.err
    checkpoint = verify(sorted(RunDirectory(run_dir).checkpoints.iterdir())[-1])
    assert checkpoint.step == 6  # the step that the signal fell into was finished
    assert checkpoint.state.fingerprint["processes"] == "2"
    other = tmp_path / "by_one"
    shutil.copytree(run_dir, other)

    assert launch(config, run_dir).codes == [0, 0]
    assert fingerprint_of(run_dir) == fingerprint_of(together_dir)

    listener = Listener()
    train(config, other, listener=listener)
    assert any("processes 2 -> 1" in message for message in listener.messages)
    assert_close(other, alone)


@pytest.mark.parametrize("mishap", ["raise", "die"])
def test_a_process_that_ends_ends_the_run(config: Path, tmp_path: Path, mishap: str) -> None:
    new = mishap == "die"  # the other process ends while its connections are broken
    ended = launch(config, tmp_path / "run", mishap=mishap, rank=1, step=5, new_interpreter=new)
    code = ExitCode.UNEXPECTED if mishap == "raise" else 9
    assert ended.codes == [ExitCode.INPUT, code], ended.err
    assert "error: process 0 of 2 lost the others" in ended.err[0]
    if mishap == "raise":
        assert "a defect in this process alone" in ended.err[1]
    # What was saved is good: one process takes it to the end.
    assert train(config, tmp_path / "run").rounds == NUM_ROUNDS


def test_a_reward_that_fails_in_the_main_process_ends_all(config: Path, tmp_path: Path) -> None:
    reward = tmp_path / "failing.py"
    reward.write_text("def fail(prompts, completions):\n    raise RuntimeError('out of order')\n")
    ended = launch(config, tmp_path / "run", f"reward.name={reward}:fail")
    assert ended.codes == [ExitCode.INPUT] * 2, ended.err
    assert "out of order" in ended.err[0]
    assert "process 0 failed: RewardError" in ended.err[1]


def test_weights_that_came_apart_are_noticed(config: Path, tmp_path: Path) -> None:
    ended = launch(config, tmp_path / "run", mishap="flip", rank=1, step=2)
    assert ended.codes == [ExitCode.INPUT] * 2, ended.err
    assert "the weights of process 1 are not those of process 0" in ended.err[0]


def test_memory_that_lacks_in_one_process_makes_all_take_smaller_parts(
    config: Path, alone: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    ended = launch(config, run_dir, mishap="out of memory", rank=1, step=5)
    assert ended.codes == [0, 0], ended.err
    assert ended.weights[0] == ended.weights[1]
    rows = fingerprint_of(run_dir)["rows"]
    sizes = [row["micro_batch_size"] for row in rows if row["event"] == "step"]
    assert sizes == [4] * 5 + [1] * 7
    assert_close(run_dir, alone)


def test_a_process_alone_starts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("RANK", "3")
    assert rank_of_process() == 0
    with join_process_group(timeout_s=1.0) as processes:
        assert (processes.rank, processes.size, processes.is_main_process) == (0, 1, True)
        assert not torch.distributed.is_initialized()
        assert processes.gather({"a": 1}) == [{"a": 1}]
        assert processes.from_main_process(lambda: 7) == 7
        assert processes.sums({"loss": 0.5}) == {"loss": 0.5}


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"WORLD_SIZE": "2"}, "RANK, MASTER_ADDR, MASTER_PORT is not set"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"),
        (
            {"WORLD_SIZE": "2", "ACCELERATE_USE_DEEPSPEED": "true"},
            "DEEPSPEED, which quark does not",
        ),
        ({"WORLD_SIZE": "2", "ACCELERATE_USE_FSDP": "true"}, "set fsdp_version to 2"),
        (
            {"WORLD_SIZE": "2", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"},
            'FSDP (--use_fsdp), and run.parallel = "data"',
        ),
    ],
)
def test_an_environment_that_does_not_fit_is_an_error(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], said: str
) -> None:
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    refused = pytest.raises(ConfigError, match=re.escape(said))
    with refused, join_process_group(timeout_s=1.0, parallel="data"):
        pass


def test_a_library_too_old_to_shard_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delattr(FSDPModule, "set_reduce_scatter_unused_params", raising=False)
    refused = pytest.raises(ConfigError, match=r"needs torch 2\.13 or newer")
    with refused, join_process_group(timeout_s=1.0, parallel="sharded"):
        pass


@pytest.mark.parametrize("device", ["mps", "cuda:1"])
def test_one_device_for_several_processes_is_refused(device: str) -> None:
    with pytest.raises(ConfigError, match="one device for 2 processes"):
        ProcessGroup(rank=0, size=2).own_device(torch.device(device))


def test_two_processes_share_the_cache_and_train_adapters_alike(
    config: Path, tmp_path: Path
) -> None:
    settings = ("reference.cache=hidden", "model.lora.rank=2", "model.lora.dropout=0.1")
    train(config, tmp_path / "alone", overrides=settings)
    together = launch(config, tmp_path / "run", *settings)
    assert together.codes == [0, 0], together.err
    assert together.weights[0] is not None
    assert together.weights[0] == together.weights[1]
    ours, theirs = (
        {p.name: p.read_bytes() for p in (tmp_path / run / "reference_cache").rglob("*.*")}
        for run in ("run", "alone")
    )
    assert len(ours) == len(theirs) == 3 + 2 * 2  # the chunks of three rounds
    # Each process drops other inputs than one alone would, so later rounds sample other tokens.
    of_first_round = ours.keys() & theirs.keys()
    assert len(of_first_round) >= 3
    assert all(ours[name] == theirs[name] for name in of_first_round)
