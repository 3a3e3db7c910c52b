from __future__ import annotations

import pytest
import torch
from torch import nn

from quark.errors import ModelError
from quark.models.causal import SHORT_SEQUENCE
from quark.models.config import LoraConfig, ModelConfig
from quark.models.loading import load_policy
from quark.models.recomputation import recompute_layers
from tests.tiny import save_tiny, tiny_batch, tiny_gpt2, tiny_llama


def rows_and_gradients(policy, *, extra):
    """Of a short batch, or padded beyond the length at which attention is computed otherwise."""
    rows = policy.completion_rows(tiny_batch(policy, extra=extra)).rows
    rows.square().sum().backward()
    trained = {n: p for n, p in policy.model.named_parameters() if p.grad is not None}
    return rows.detach(), {n: p.grad for n, p in trained.items()}


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("make", [lambda: tiny_gpt2(positions=256), tiny_llama])
@pytest.mark.parametrize("extra", [0, SHORT_SEQUENCE], ids=["short", "long"])
def test_rows_and_gradients_are_the_same_bits(tmp_path, make, rank, extra):
    config = ModelConfig(name=str(save_tiny(tmp_path, make())), lora=LoraConfig(rank=rank))
    kept = load_policy(config, num_quantiles=5, seed=0)
    recomputed = load_policy(
        config.model_copy(update={"gradient_checkpointing": True}), num_quantiles=5, seed=0
    )
    rows, gradients = rows_and_gradients(kept, extra=extra)
    rows_again, gradients_again = rows_and_gradients(recomputed, extra=extra)
    assert torch.equal(rows, rows_again)
    assert gradients.keys() == gradients_again.keys()
    assert all(torch.equal(g, gradients_again[n]) for n, g in gradients.items())


def test_a_layer_is_computed_again_in_backward_and_its_insides_are_not_kept():
    model = tiny_gpt2()
    runs = []
    model.transformer.h[0].mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    kept = []
    ids = torch.arange(8).unsqueeze(0)

    def bytes_kept():
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: kept.append(t.nbytes) or t, lambda t: t
        ):
            model(ids, use_cache=False).logits.sum().backward()
        return sum(kept)

    before = bytes_kept()
    assert len(runs) == 1
    recompute_layers(model)
    runs.clear()
    assert bytes_kept() < 0.5 * before
    assert len(runs) == 2
    runs.clear()
    with torch.no_grad():
        model(ids)
    assert len(runs) == 1


def test_an_architecture_without_marked_layers_is_refused():
    class Plain(nn.Module):
        pass

    with pytest.raises(ModelError, match="Plain does not mark its layers"):
        recompute_layers(Plain())
