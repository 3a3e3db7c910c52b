"""The fused activation is the written-out one, forward and back."""

from __future__ import annotations

import torch

from quark.models.activations import fuse_activations
from tests.tiny import tiny_gpt2, tiny_llama


def test_a_fused_gpt2_computes_what_it_did_before() -> None:
    ids = torch.arange(24).reshape(2, 12)
    plain, fused = tiny_gpt2(), tiny_gpt2()
    fuse_activations(fused)
    assert all(type(block.mlp.act) is torch.nn.GELU for block in fused.transformer.h)
    logits = [model(input_ids=ids).logits for model in (plain, fused)]
    assert torch.allclose(*logits, atol=1e-4)
    for logit in logits:
        logit.square().mean().backward()
    for one, other in zip(plain.parameters(), fused.parameters(), strict=True):
        assert torch.allclose(one.grad, other.grad, rtol=1e-3, atol=1e-4)
    assert plain.state_dict().keys() == fused.state_dict().keys()


def test_other_activations_stay() -> None:
    model = tiny_llama()
    before = [type(module) for module in model.modules()]
    fuse_activations(model)
    assert [type(module) for module in model.modules()] == before
