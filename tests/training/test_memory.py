"""Settings that save memory or time: runs with them resume byte by byte, like any other."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from quark.api.trained_model import open_model
from quark.config.load import load_config
from quark.config.schema import OptimizerSection
from quark.data.collate import TrainingBatch, collate
from quark.errors import CheckpointError, ConfigError, ModelError, TrainingError
from quark.models.causal import CausalModel
from quark.models.loading import load_base_model, load_policy
from quark.models.logprobs import token_statistics
from quark.models.policy import Policy
from quark.pool.native import NativePool
from quark.reference.base import FrozenReference
from quark.reference.row_files import RowFiles
from quark.run_directory import RunDirectory
from quark.training.dry_run import dry_run
from quark.training.loop.cached_reference import CachedReference
from quark.training.loop.optimization import make_optimizer
from quark.training.processes.process_group import ProcessGroup
from tests.tiny import save_tiny, tiny_gpt2
from tests.training.tiny_run import (
    NUM_ROUNDS,
    STEPS_PER_ROUND,
    Listener,
    fingerprint_of,
    train,
    write_inputs,
)

LORA = ("model.lora.rank=4", "optimizer.learning_rate=0.02", "optimizer.reward_token_lr_scale=3.0")

CACHE = ("reference.cache=hidden",)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.mark.parametrize(
    "settings",
    [(*LORA, "model.lora.dropout=0.1", "model.gradient_checkpointing=true"), CACHE],
    ids=["lora", "cache"],
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
    train(config, run_dir)
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


@pytest.fixture(scope="module")
def cached_run(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("cached") / "run"
    train(config, run_dir, overrides=CACHE)
    return run_dir


def test_a_cached_reference_gives_the_figures_of_a_live_one(
    cached_run: Path, plain_steps: list[dict[str, float]]
) -> None:
    assert len(plain_steps) == NUM_ROUNDS * STEPS_PER_ROUND
    for cached, plain in zip(steps_of(cached_run), plain_steps, strict=True):
        assert [cached[f] for f in FIGURES] == pytest.approx([plain[f] for f in FIGURES], rel=2e-3)


def blocks_of(run_dir: Path) -> list[Path]:
    return sorted(RunDirectory(run_dir).reference_cache.rglob("*.safetensors"))


@pytest.mark.parametrize("damage", ["delete all", "delete one", "flip", "cut", "another's"])
def test_what_is_lost_of_the_cache_is_made_again_the_same(
    config: Path, cached_run: Path, tmp_path: Path, damage: str
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(cached_run, run_dir)
    run = RunDirectory(run_dir)
    shutil.rmtree(max(run.checkpoints.iterdir()))
    first, second, *_ = blocks_of(run_dir)
    content = bytearray(first.read_bytes())
    match damage:
        case "delete all":
            shutil.rmtree(run.reference_cache)
        case "delete one":
            first.unlink()
        case "flip":
            content[-3] ^= 1
            first.write_bytes(content)
        case "cut":
            first.write_bytes(content[:-8])
        case "another's":
            shutil.copy(second, first)
    train(config, run_dir, overrides=CACHE)
    kept = {path.name: path.read_bytes() for path in blocks_of(cached_run)}
    for path in blocks_of(run_dir):
        assert path.read_bytes() == kept[path.name]
    whole, again = fingerprint_of(cached_run), fingerprint_of(run_dir)
    assert again["weights"] == whole["weights"]
    assert again["rows"] == whole["rows"]


def cached_reference(config: Path, run_dir: Path, folder: Path) -> tuple[CachedReference, Policy]:
    """A cache over a finished run's pool, in another folder."""
    loaded = load_config(config, CACHE).config
    policy = load_policy(loaded.model, num_quantiles=3, seed=0)
    run = RunDirectory(run_dir)
    reference = CachedReference(
        FrozenReference(load_base_model(loaded.model)),
        files=RowFiles(folder),
        pool=NativePool.open(run.pool),
        run_id=json.loads(run.identity.read_bytes())["run_id"],
        policy=policy,
        block_size=5,
        autocast=nullcontext,
        autocast_dtype=None,
        processes=ProcessGroup(),
    )
    return reference, policy


def batch_of(run_dir: Path, policy: Policy, ids: list[int], *, cached: bool) -> TrainingBatch:
    with NativePool.open(RunDirectory(run_dir).pool) as pool:
        samples = pool.gather(np.array(ids, dtype=np.uint64), pad_id=0)
    samples.quantiles[:] = 2
    return collate(
        samples,
        policy.reward_tokens.ids,
        policy.pad_id,
        policy.device,
        sample_ids=samples.ids if cached else None,
    )


def test_stored_rows_are_those_of_the_model_but_for_half_precision(
    config: Path, cached_run: Path, tmp_path: Path
) -> None:
    reference, policy = cached_reference(config, cached_run, tmp_path / "cache")
    ids = [7, 3, 40, 3, 0, 23, 24]
    live, cached = (
        reference.completion_rows(batch_of(cached_run, policy, ids, cached=c))
        for c in (False, True)
    )
    assert cached.rows.dtype == torch.float32
    torch.testing.assert_close(cached.rows, live.rows, rtol=2**-11, atol=1e-5)
    assert torch.equal(cached.rows, cached.rows.half().float())
    batch = batch_of(cached_run, policy, ids, cached=False)
    width = policy.reward_tokens.base_vocab_size
    rounding = token_statistics(cached, live, batch.targets, base_vocab_size=width)
    assert rounding.kl_reference_to_policy.max() < 1e-5


def test_samples_that_another_run_committed_are_computed_alone(
    config: Path, cached_run: Path, tmp_path: Path
) -> None:
    reference, policy = cached_reference(config, cached_run, tmp_path / "cache")
    reference._run_id = "another"
    ids = [7, 3]
    reference.prepare(ids)
    live, cached = (
        reference.completion_rows(batch_of(cached_run, policy, ids, cached=c)).rows
        for c in (False, True)
    )
    torch.testing.assert_close(cached, live, rtol=2**-11, atol=1e-5)


def test_prepared_samples_need_no_model_whatever_the_batch_and_its_parts(
    config: Path, cached_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference, policy = cached_reference(config, cached_run, tmp_path / "cache")
    ids = list(range(0, 30, 3))
    reference.prepare(ids)
    monkeypatch.setattr(reference.causal, "run", None)
    batch = batch_of(cached_run, policy, ids, cached=True)
    whole = reference.completion_rows(batch).rows
    ends = batch.completion_lengths.cumsum(0).tolist()
    by_id = {i: whole[b:e] for i, b, e in zip(ids, [0, *ends], ends, strict=False)}
    for part in batch.split(3):
        assert part.sample_ids is not None
        expected = torch.cat([by_id[i] for i in part.sample_ids.tolist()])
        assert torch.equal(reference.completion_rows(part).rows, expected)
    again, _ = cached_reference(config, cached_run, tmp_path / "cache")
    monkeypatch.setattr(again.causal, "run", None)
    assert torch.equal(again.completion_rows(batch).rows, whole)


def test_the_pass_that_explores_is_the_only_one(
    config: Path, cached_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference, policy = cached_reference(config, cached_run, tmp_path / "cache")
    width = policy.reward_tokens.base_vocab_size
    block = batch_of(cached_run, policy, [5, 6, 7], cached=False)
    live, stored = (
        reference.sequence_logprobs(block, base_vocab_size=width, is_block=is_block)
        for is_block in (False, True)
    )
    torch.testing.assert_close(stored, live, rtol=1e-3, atol=1e-3)
    monkeypatch.setattr(reference.causal, "run", None)
    batch = batch_of(cached_run, policy, [6, 5], cached=True)  # of the chunk's second block of five
    assert len(reference.completion_rows(batch).rows) == batch.num_tokens


def test_numbers_beyond_half_precision_are_refused(
    config: Path, cached_run: Path, tmp_path: Path
) -> None:
    reference, _ = cached_reference(config, cached_run, tmp_path / "cache")
    with torch.no_grad():
        reference.causal.model.transformer.ln_f.bias.fill_(1e5)
    with pytest.raises(TrainingError, match=r"beyond what torch\.float16 holds"):
        reference.prepare([0])


def test_a_disk_that_refuses_the_cache_is_said(
    config: Path, cached_run: Path, tmp_path: Path
) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    reference, _ = cached_reference(config, cached_run, tmp_path / "cache")
    with pytest.raises(TrainingError, match=r"cannot store 0\.0 MB for 5 samples"):
        reference.prepare([0])


def test_a_model_whose_head_is_not_a_projection_is_refused(
    config: Path, cached_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CausalModel, "_head_is_exact", lambda self: False)
    with pytest.raises(ModelError, match="does more to its logits"):
        cached_reference(config, cached_run, tmp_path / "cache")


def test_both_kinds_of_adam_take_the_same_steps_but_for_rounding() -> None:
    states = []
    for implementation in ("auto", "fused", "foreach"):
        model = tiny_gpt2()
        section = OptimizerSection(implementation=implementation, learning_rate=0.01)
        optimizer = make_optimizer(model, section)
        assert optimizer.defaults["fused"] is (implementation != "foreach")
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.arange(8).unsqueeze(0)).logits.square().mean().backward()
            optimizer.step()
        states.append(model.state_dict()["transformer.h.0.mlp.c_fc.weight"])
    assert torch.equal(states[0], states[1])
    torch.testing.assert_close(states[0], states[2])


@pytest.mark.parametrize(("settings", "is_said"), [((), True), (LORA, False)])
def test_half_precision_without_adapters_is_warned_of(
    config: Path, tmp_path: Path, settings: tuple[str, ...], is_said: bool
) -> None:
    listener = Listener()
    overrides = ("model.dtype=bfloat16", *settings)
    train(config, tmp_path / "run", overrides=overrides, listener=listener, stop_at=14)
    assert any("are rounded away" in message for message in listener.messages) is is_said
    assert all(np.isfinite(step["loss"]) for step in steps_of(tmp_path / "run"))
