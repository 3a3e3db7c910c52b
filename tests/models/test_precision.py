"""Converted projection weights give what autocast gives, bit for bit, and leave no trace."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from quark.models.precision import convert_projections, projections_for_autocast
from tests.tiny import tiny_gpt2, tiny_llama


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    ids = torch.arange(24).reshape(2, 12)
    with torch.autocast("cpu", torch.bfloat16):
        result: torch.Tensor = model(input_ids=ids).logits
    return result


@pytest.mark.parametrize("is_tied", [True, False])
def test_a_model_converted_for_good_answers_the_same_under_autocast(is_tied: bool) -> None:
    model = tiny_llama(tied=is_tied)
    before = logits(model)
    convert_projections(model, torch.bfloat16)
    assert torch.equal(logits(model), before)
    projections = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    assert len(projections) == 15
    assert all(m.weight.dtype == torch.bfloat16 for m in projections)
    assert model.model.embed_tokens.weight.dtype == torch.float32


@pytest.mark.parametrize("is_tied", [True, False])
def test_within_the_context_the_answers_are_the_same_and_after_it_the_weights_are(
    is_tied: bool,
) -> None:
    model = tiny_llama(tied=is_tied)
    before, weights = logits(model), dict(model.named_parameters())
    with torch.autocast("cpu", torch.bfloat16), projections_for_autocast(model):
        assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
        assert torch.equal(logits(model), before)
    assert {name: id(weight) for name, weight in model.named_parameters()} == {
        name: id(weight) for name, weight in weights.items()
    }
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == is_tied


def test_the_projections_of_gpt2_are_converted_too() -> None:
    model = tiny_gpt2()
    before = logits(model)
    convert_projections(model, torch.bfloat16)
    assert torch.equal(logits(model), before)
    assert model.transformer.h[0].mlp.c_fc.weight.dtype == torch.bfloat16


def test_without_autocast_nothing_is_converted() -> None:
    model = tiny_llama()
    with projections_for_autocast(model):
        assert model.lm_head.weight.dtype == torch.float32


def test_an_error_inside_gives_the_weights_back() -> None:
    model = tiny_llama(tied=False)
    weight = model.lm_head.weight
    with (
        pytest.raises(RuntimeError, match="inside"),
        torch.autocast("cpu", torch.bfloat16),
        projections_for_autocast(model),
    ):
        raise RuntimeError("inside")
    assert model.lm_head.weight is weight
