"""Every way of running a model gives what one plain pass over each text gives."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from quark.data.collate import collate
from quark.errors import ModelError
from quark.generation.base import SamplingConfig
from quark.generation.transformers_generator import TransformersGenerator
from quark.models.causal import CausalModel
from quark.models.config import LoraConfig
from quark.models.logprobs import token_nll
from quark.models.lora import add_adapter
from quark.models.policy import Policy
from quark.models.reward_tokens import add_reward_tokens
from quark.models.running import Running
from quark.types import Prompt
from scripts.model_families import small_model
from tests.tiny import PROMPTS, VOCAB_SIZE, byte_tokenizer, padded, tiny_batch

FASTEST = Running()
EXPECTED = {
    "gpt2": FASTEST,
    "llama": FASTEST,
    "mamba": Running(masks_steps=False, leave_by="reorder_cache"),
    "jamba": Running(leave_by="reorder_cache"),
    "qwen3_next": Running(leave_by="reorder_cache"),
    "rwkv": Running(masks_padding=False, has_cache=False),
    "recurrent_gemma": Running(masks_padding=False, has_cache=False),
    "bart": Running(masks_padding=False),
    "openai-gpt": Running(has_cache=False),
}
"""Of each kind of model that is run in a way of its own, one or two."""


def policy_of(family: str) -> Policy:
    model, tokenizer = small_model(family), byte_tokenizer()
    return Policy(model, tokenizer, add_reward_tokens(model, tokenizer, 2, seed=0))


def plain_logprob(policy: Policy, ids: list[int], completion: list[int]) -> float:
    with torch.no_grad():
        logits = policy.model(torch.tensor([[*ids, *completion]])).logits[0, len(ids) - 1 : -1]
    logprobs = logits[:, :VOCAB_SIZE].log_softmax(-1)
    return float(logprobs.gather(1, torch.tensor(completion).unsqueeze(1)).sum())


@pytest.mark.parametrize("family", EXPECTED)
def test_sampling_and_training_compute_what_a_plain_pass_computes(family):
    """With prompts of unequal length and rows that end at different times."""
    policy = policy_of(family)
    policy.model.generation_config.eos_token_id = list(range(0, 256, 3))
    found = policy.causal.running
    same = dataclasses.replace(found, padding_gap=0.0, cache_gap=0.0)
    if family == "bart":  # its cache is sound in some versions of transformers only
        same = dataclasses.replace(same, has_cache=True)
    assert same == EXPECTED[family]
    assert bool(found.notes) == (not found.masks_padding or not found.has_cache)

    config = SamplingConfig(max_new_tokens=8)
    generator = TransformersGenerator(policy, policy.tokenizer, None, config, policy.device)
    prompts = [Prompt(index=i, text="", token_ids=tuple(ids)) for i, ids in enumerate(PROMPTS * 2)]
    completions = generator.generate(prompts, quantile=1, seed=3)
    assert len({len(c.token_ids) for c in completions}) > 2
    expected = [
        plain_logprob(
            policy, [policy.reward_tokens.best, *c.prompt.token_ids], c.token_ids.tolist()
        )
        for c in completions
    ]
    np.testing.assert_allclose([c.logprob_policy for c in completions], expected, atol=2e-3)

    samples = padded(PROMPTS * 2, [c.token_ids.tolist() for c in completions], [1] * len(prompts))
    batch = collate(samples, policy.reward_tokens.ids, policy.pad_id, policy.device)
    nll = token_nll(policy.completion_rows(batch), batch.targets, base_vocab_size=VOCAB_SIZE)
    np.testing.assert_allclose(-batch.sum_by_sequence(nll).numpy(), expected, atol=2e-3)


def test_a_model_that_sees_what_follows_is_refused():
    model = small_model("electra", is_decoder=False)
    with pytest.raises(ModelError, match=r"not a causal language model.* nats with what follows"):
        CausalModel(model)


def test_a_model_whose_weights_are_broken_is_refused():
    model = small_model("stablelm")
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(float("nan"))
    with pytest.raises(ModelError, match="its weights are broken"):
        CausalModel(model)


@pytest.mark.parametrize(
    "family", ["mixtral", "jamba", "mamba", "llama4_text", "falcon", "qwen3_next"]
)
def test_adapters_of_mixtures_and_states_can_be_saved(family, tmp_path):
    model, tokenizer = small_model(family), byte_tokenizer()
    tokens = add_reward_tokens(model, tokenizer, 2, seed=0)
    adapter = add_adapter(model, tokens, LoraConfig(rank=2), seed=0)
    policy = Policy(model, tokenizer, tokens, adapter=adapter)
    rows = policy.completion_rows(tiny_batch(policy))
    rows.head(rows.rows).square().mean().backward()
    for _, layer in adapter.layers:
        weight = layer.lora_B["default"].weight
        if weight.grad is not None:
            weight.data -= 0.1 * weight.grad.sign()
    policy.save(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    ids = torch.tensor([[tokens.best, 5, 6, 7]])
    torch.testing.assert_close(again(ids).logits, model(ids).logits, atol=1e-4, rtol=1e-4)
