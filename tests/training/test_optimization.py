"""Weight decay is for matrices, and the optimizer's state belongs to names, not to groups."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from quark.config.schema import OptimizerSection
from quark.models.config import LoraConfig, ModelConfig
from quark.models.loading import load_policy
from quark.training.loop.optimization import (
    decays,
    load_optimizer_tensors,
    make_optimizer,
    optimizer_tensors,
)
from tests.tiny import save_tiny, tiny_gpt2, tiny_llama


def decayed_names(model: torch.nn.Module) -> set[str]:
    decayed = decays(model)
    return {name for name, parameter in model.named_parameters() if parameter in decayed}


def test_biases_norms_and_embeddings_are_not_decayed() -> None:
    model = tiny_gpt2()
    names = decayed_names(model)
    assert names == {
        f"transformer.h.{layer}.{part}.weight"
        for layer in range(len(model.transformer.h))
        for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }


def test_an_untied_head_is_decayed_and_a_tied_one_is_the_embedding() -> None:
    heads = [
        {name for name in decayed_names(tiny_llama(tied=tied)) if "embed" in name or "head" in name}
        for tied in (False, True)
    ]
    assert heads == [{"lm_head.weight"}, set()]


def test_adapters_are_decayed_and_the_vectors_of_reward_tokens_are_not(tmp_path: Path) -> None:
    name = str(save_tiny(tmp_path / "base"))
    policy = load_policy(ModelConfig(name=name, lora=LoraConfig(rank=2)), num_quantiles=3, seed=0)
    trained = {n for n, p in policy.model.named_parameters() if p.requires_grad}
    names = decayed_names(policy.model)
    assert names
    assert all("lora_A" in name or "lora_B" in name for name in names)
    assert [name for name in trained - names if "lora" in name] == []
    assert len(trained - names) == 1


@pytest.mark.parametrize("implementation", ["fused", "foreach"])
def test_a_step_without_gradient_shrinks_what_decays_and_nothing_else(implementation: str) -> None:
    model = tiny_gpt2()
    before = copy.deepcopy(model.state_dict())
    settings = OptimizerSection(learning_rate=0.1, weight_decay=0.5, implementation=implementation)
    optimizer = make_optimizer(model, settings)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    decayed = decayed_names(model)
    for name, parameter in model.named_parameters():
        factor = 1 - 0.1 * 0.5 if name in decayed else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * factor)


def test_a_state_saved_by_one_group_for_everything_goes_on(tmp_path: Path) -> None:
    """Checkpoints were made so before there were groups."""
    models = [tiny_gpt2(), tiny_gpt2()]
    old = torch.optim.AdamW(models[0].parameters(), lr=1e-2, weight_decay=0.0, fused=True)

    def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()

    for seed in range(2):
        step(models[0], old, seed)
    models[1].load_state_dict(models[0].state_dict())
    new = make_optimizer(models[1], OptimizerSection(learning_rate=1e-2))
    load_optimizer_tensors(new, models[1], copy.deepcopy(optimizer_tensors(old, models[0])))
    for model, optimizer in zip(models, (old, new), strict=True):
        step(model, optimizer, 7)
    for ours, theirs in zip(models[1].parameters(), models[0].parameters(), strict=True):
        assert torch.equal(ours, theirs)
