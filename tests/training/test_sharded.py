"""Two processes that share the weights of one run (FSDP2), on the CPU, against one that holds them all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from quark.cli.exit_codes import ExitCode
from quark.config.load import load_config
from quark.errors import ConfigError, TrainingError
from quark.run_directory import RunDirectory
from quark.training.assemble import assemble
from quark.training.processes import weights as weights_module
from quark.training.processes.process_group import ProcessGroup
from quark.training.processes.shards import copy_full, first_local_row, local_rows, local_shard
from quark.training.processes.weights import ShardedWeights
from tests.tiny import tiny_batch, tiny_policy
from tests.training.launching import Ended, launch
from tests.training.test_distributed import assert_close, weights_of
from tests.training.tiny_run import (
    NEEDS_SHARDING,
    NUM_ROUNDS,
    STEPS_PER_ROUND,
    Listener,
    fingerprint_of,
    rows_of,
    train,
    write_inputs,
)

SETTINGS = (
    # Nine sequences: one process makes five passes, so that the other goes along in one for nothing.
    "optimizer.micro_batch_size=1",
    # The reward tokens' rows are the last ones, which one process holds.
    "optimizer.reward_token_lr_scale=5",
    # Which weights it reaches must not depend on where they lie.
    "optimizer.weight_decay=0.5",
    "model.gradient_checkpointing=true",
)
SHARDED = (*SETTINGS, "run.parallel=sharded")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def alone(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run of one process."""
    run_dir = tmp_path_factory.mktemp("alone") / "run"
    train(config, run_dir, overrides=SETTINGS)
    return run_dir


@pytest.fixture(scope="module")
def sharded_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sharded") / "run"


@pytest.fixture(scope="module")
def sharded(config: Path, sharded_dir: Path) -> Ended:
    """A whole run of two processes, which accelerate's environment tells to shard."""
    asked = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    # With this, transformers would leave the weights of the second process unread.
    asked["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "true"
    ended = launch(config, sharded_dir, *SETTINGS, environment=asked, new_interpreter=True)
    assert ended.codes == [0, 0], ended.err
    return ended


def steps_of(run_dir: Path) -> list[dict[str, float]]:
    return [row for row in rows_of(run_dir) if row["event"] == "step"]


@NEEDS_SHARDING
def test_shards_learn_what_one_process_does(alone: Path, sharded: Ended, sharded_dir: Path) -> None:
    assert_close(sharded_dir, alone)
    steps = steps_of(sharded_dir), steps_of(alone)
    assert len(steps[0]) == NUM_ROUNDS * STEPS_PER_ROUND
    for ours, theirs in zip(*steps, strict=True):
        for name in ("loss", "lm_loss", "kl_reference_to_policy", "grad_norm", "kl_coef"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-6), name
    samples = [fingerprint_of(run)["samples"] for run in (sharded_dir, alone)]
    assert [[*s[:7], s[-1]] for s in samples[0]] == [[*s[:7], s[-1]] for s in samples[1]]
    # The original model's are the same to the bit, log-probabilities included.
    assert samples[0][:24] == samples[1][:24]
    assert sharded.weights[0] == sharded.weights[1] is not None
    assert sharded.err[1] == sharded.out[1] == ""


@NEEDS_SHARDING
def test_between_steps_a_process_holds_half_of_weights_and_moments(
    sharded: Ended, sharded_dir: Path
) -> None:
    checkpoint = sorted(RunDirectory(sharded_dir).checkpoints.iterdir())[-1]
    weights = load_file(checkpoint / "model.safetensors").values()
    # Policy, reference (without reward tokens) and two moments; no gradient is kept.
    everything = 4 * sum(tensor.nbytes for tensor in weights)
    for num_bytes in sharded.held:
        assert num_bytes is not None
        assert 0.45 * everything < num_bytes < 0.52 * everything


@NEEDS_SHARDING
def test_a_killed_process_ends_the_run_and_any_strategy_resumes(
    config: Path, sharded: Ended, sharded_dir: Path, alone: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    ended = launch(config, run_dir, *SHARDED, mishap="die", rank=1, step=6, new_interpreter=True)
    assert ended.codes == [ExitCode.INPUT, 9], ended.err
    assert "error: process 0 of 2 lost the others" in ended.err[0]
    other = tmp_path / "by_one"
    shutil.copytree(run_dir, other)

    assert launch(config, run_dir, *SHARDED).codes == [0, 0]
    assert fingerprint_of(run_dir) == fingerprint_of(sharded_dir)

    listener = Listener()
    train(config, other, overrides=SETTINGS, listener=listener)
    assert any("processes 2 sharded -> 1" in message for message in listener.messages)
    assert_close(other, alone)


@NEEDS_SHARDING
def test_shards_go_on_from_the_checkpoint_of_one_process(
    config: Path, alone: Path, tmp_path: Path
) -> None:
    assert train(config, tmp_path / "run", overrides=SETTINGS, stop_at=16).interrupted
    assert STEPS_PER_ROUND < len(steps_of(tmp_path / "run")) < 2 * STEPS_PER_ROUND
    ended = launch(config, tmp_path / "run", *SHARDED)
    assert ended.codes == [0, 0], ended.err
    assert "processes 1 -> 2 sharded" in " ".join(ended.err[0].split())
    assert_close(tmp_path / "run", alone)


@NEEDS_SHARDING
@pytest.mark.slow
def test_adapters_are_sharded_with_the_weights_below(config: Path, tmp_path: Path) -> None:
    settings = (*SETTINGS, "model.lora.rank=2")
    train(config, tmp_path / "alone", overrides=settings)
    ended = launch(config, tmp_path / "run", *settings, "run.parallel=sharded")
    assert ended.codes == [0, 0], ended.err
    assert_close(tmp_path / "run", tmp_path / "alone")
    # What was saved is an ordinary model with the adapters merged into it.
    assert not any("lora" in name for name in weights_of(tmp_path / "run"))


def test_the_cache_of_the_reference_is_refused(config: Path, tmp_path: Path) -> None:
    loaded = load_config(config, ("reference.cache=hidden",))
    with pytest.raises(
        ConfigError, match=r'reference.cache = "hidden" with run.parallel = "sharded"'
    ):
        assemble(
            loaded,
            tmp_path / "run",
            listener=Listener(),
            processes=ProcessGroup(size=2, is_sharded=True),
        )
    assert not (tmp_path / "run").exists()


@pytest.fixture
def weights() -> Iterator[ShardedWeights]:
    """A policy in the only shard of a group of one."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        processes = ProcessGroup(is_sharded=True)
        yield ShardedWeights(tiny_policy(), processes, autocast_dtype=torch.bfloat16)
    finally:
        distributed.destroy_process_group()


@NEEDS_SHARDING
def test_weights_that_are_gathered_wrongly_are_noticed(
    weights: ShardedWeights, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights.require_equal(step=3)
    honest = weights_module.full_tensor

    def damaged(tensor: torch.Tensor) -> torch.Tensor:
        gathered = honest(tensor).clone()
        gathered.view(-1)[-1] += 1e-6
        return gathered

    monkeypatch.setattr(weights_module, "full_tensor", damaged)
    with pytest.raises(TrainingError, match="after step 3 process 0 does not gather the weights"):
        weights.require_equal(step=3)


@NEEDS_SHARDING
def test_memory_that_lacks_in_a_step_names_the_setting(weights: ShardedWeights) -> None:
    def hungry(size: int) -> int:
        raise torch.OutOfMemoryError(f"out of memory for {size}")

    with pytest.raises(TrainingError, match=r"out of memory for 4.*optimizer\.micro_batch_size"):
        weights.run(hungry, 4, on_smaller=lambda size, reason: None)


@NEEDS_SHARDING
def test_the_twin_has_weights_only_within(weights: ShardedWeights) -> None:
    model = weights.local_policy.model
    assert all(parameter.is_meta for parameter in model.parameters())
    with weights.gathered():
        assert not any(parameter.is_meta for parameter in model.parameters())
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert all(parameter.is_meta for parameter in model.parameters())


@NEEDS_SHARDING
def test_to_sample_linear_layers_are_gathered_as_autocast_rounds_them(
    weights: ShardedWeights,
) -> None:
    policy = weights.local_policy
    sizes, rows = [], []
    for within in (weights.gathered, weights.gathered_for_sampling):
        with within(), torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            parameters = {name: p.dtype for name, p in policy.model.named_parameters()}
            sizes.append(sum(dtype == torch.bfloat16 for dtype in parameters.values()))
            completions = policy.completion_rows(tiny_batch(policy))
            rows.append(completions.head(completions.rows))
    # Four in each of two layers, and the head apart from the embedding that it shares.
    assert sizes == [0, 9]
    assert torch.equal(*rows)


@pytest.mark.parametrize("num_rows", [1, 2, 3, 6, 7])
def test_rows_are_counted_as_torch_deals_them(num_rows: int) -> None:
    everything = torch.arange(2.0 * num_rows).reshape(num_rows, 2)
    dealt = []
    for rank in range(3):
        # Of a group of three one process, whose exchanges lead nowhere.
        distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=3)
        try:
            layer = nn.Linear(2, num_rows, bias=False)
            copy_full(layer.weight, everything)
            fully_shard(layer, mesh=init_device_mesh("cpu", (3,)))
            weight = layer.weight.detach()
            mine = local_shard(weight).clone()
            first = first_local_row(weight)
            assert torch.equal(mine, everything[first : first + len(mine)])
            inner = local_rows(weight, 1, num_rows - 1)
            assert torch.equal(
                inner, everything[max(first, 1) : min(first + len(mine), num_rows - 1)]
            )
            copy_full(weight, everything + 1)
            assert torch.equal(local_shard(weight), mine + 1)
            dealt.append(mine)
        finally:
            distributed.destroy_process_group()
    assert torch.equal(torch.cat(dealt), everything)


@NEEDS_SHARDING
def test_shards_are_averaged_and_reset_as_whole_weights_are(config: Path, tmp_path: Path) -> None:
    settings = (
        "run.num_rounds=2",
        "average.reset_every_rounds=1",
        "evaluation.control_gap=false",
        "evaluation.control_curve=false",
    )
    train(config, tmp_path / "alone", overrides=settings)
    ended = launch(config, tmp_path / "sharded", *settings, "run.parallel=sharded")
    assert ended.codes == [0, 0], ended.err
    found, expected = (
        [row for row in rows_of(tmp_path / name) if row["event"] == "reset"]
        for name in ("sharded", "alone")
    )
    assert len(found) == len(expected) == 1
    for name, value in expected[0].items():
        assert found[0][name] == (
            pytest.approx(value, rel=1e-4) if isinstance(value, float) else value
        ), name
    # The original weights have the same checksum however they are divided.
    states = [
        json.loads((run / "state.json").read_text())["hooks"]["average"]
        for run in (
            sorted((tmp_path / name / "checkpoints").iterdir())[-1] for name in ("sharded", "alone")
        )
    ]
    assert states[0] == states[1] | {"awaited": states[0]["awaited"]}
