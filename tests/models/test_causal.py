from __future__ import annotations

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

from quark.data.collate import collate
from quark.errors import PoolCorruptedError
from quark.models.causal import CausalModel
from quark.models.logprobs import token_nll
from quark.reference.base import FrozenReference
from tests.tiny import (
    COMPLETIONS,
    PROMPTS,
    VOCAB_SIZE,
    padded,
    tiny_batch,
    tiny_gpt2,
    tiny_llama,
    tiny_policy,
)

MODELS = {
    "gpt2 tied": tiny_gpt2,
    "gpt2 untied": lambda: tiny_gpt2(tied=False),
    "llama tied": tiny_llama,
    "llama untied": lambda: tiny_llama(tied=False),
}


def tiny_gemma2() -> Gemma2ForCausalLM:
    config = Gemma2Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        final_logit_softcapping=2.0,
        initializer_range=0.3,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    return Gemma2ForCausalLM(config).eval()


@pytest.fixture(params=MODELS)
def policy(request):
    return tiny_policy(MODELS[request.param]())


def test_logprobs_are_the_same_alone_and_padded_on_either_side(policy):
    width = policy.reward_tokens.base_vocab_size

    def nll(batch):
        return token_nll(policy.completion_rows(batch), batch.targets, base_vocab_size=width)

    together = nll(tiny_batch(policy))
    alone = [
        nll(collate(padded([p], [c], [i % 5]), policy.reward_tokens.ids, 0, policy.device))
        for i, (p, c) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True))
    ]
    assert torch.allclose(together, torch.cat(alone), atol=1e-4)
    assert torch.allclose(together, nll(tiny_batch(policy, extra=3)), atol=1e-4)


def test_split_batches_hold_the_same_sequences(policy):
    batch = tiny_batch(policy)
    width = policy.reward_tokens.base_vocab_size

    def sums(part):
        nll = token_nll(policy.completion_rows(part), part.targets, base_vocab_size=width)
        return part.sum_by_sequence(nll)

    whole = sums(batch).sort().values
    for num_parts in (1, 2, 3, 6, 9):
        parts = batch.split(num_parts)
        assert sum(part.num_sequences for part in parts) == batch.num_sequences
        assert sum(part.num_tokens for part in parts) == batch.num_tokens
        found = torch.cat([sums(part) for part in parts]).sort().values
        assert torch.allclose(found, whole, atol=1e-4)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_rows_and_head_equal_a_plain_forward(make):
    """The policy's rows against the model run on one unpadded sequence with the library's own positions."""
    policy = tiny_policy(make())
    batch = tiny_batch(policy)
    rows = policy.completion_rows(batch)
    logits = rows.head(rows.rows)
    begin = 0
    for i, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        ids = torch.tensor([[policy.reward_tokens.ids[i % 5], *prompt, *completion]])
        plain = policy.model(ids).logits[0, len(prompt) : -1]
        found = logits[begin : begin + len(completion)]
        assert torch.allclose(found, plain, atol=1e-4)
        begin += len(completion)


@pytest.mark.parametrize("make", [tiny_gpt2, lambda: tiny_gpt2(tied=False)])
def test_policy_equals_reference_at_the_start_when_the_reward_token_is_hidden(make):
    """Prompt and completion stand at the reference's positions; only the token's content differs."""
    policy, reference = tiny_policy(make()), FrozenReference(make())
    batch = tiny_batch(policy)
    inputs = policy.causal
    conditioned = batch.policy_inputs()
    mask = conditioned.attention_mask.clone()
    positions = inputs.positions(mask, is_conditioned=True)
    first = mask.argmax(1)
    mask[torch.arange(len(mask)), first] = 0
    hidden = policy.model.base_model(
        conditioned.input_ids, attention_mask=mask, position_ids=positions
    ).last_hidden_state
    found = policy.causal.head(hidden.flatten(0, 1)[conditioned.token_positions])
    rows = reference.completion_rows(batch)
    assert torch.allclose(found[:, :VOCAB_SIZE], rows.head(rows.rows), atol=1e-4)


def test_without_a_token_the_policy_is_the_reference_at_the_start():
    policy, reference = tiny_policy(), FrozenReference(tiny_gpt2())
    batch = tiny_batch(policy)
    found, expected = policy.causal.run(batch.reference_inputs()), reference.completion_rows(batch)
    assert torch.allclose(found.rows, expected.rows, atol=1e-5)


def test_models_that_reshape_their_logits_are_run_whole():
    model = tiny_gemma2()
    causal = CausalModel(model)
    assert causal.head_parameters == ()
    policy = tiny_policy(model)
    batch = tiny_batch(policy)
    rows = policy.completion_rows(batch)
    ids = torch.tensor([[policy.reward_tokens.ids[0], *PROMPTS[0], *COMPLETIONS[0]]])
    plain = model(ids).logits[0, len(PROMPTS[0]) : -1]
    assert torch.allclose(rows.head(rows.rows)[: len(COMPLETIONS[0])], plain, atol=1e-4)
    assert plain.abs().max() <= 2.0


def test_gradient_reaches_every_weight_of_the_policy(policy):
    rows = policy.completion_rows(tiny_batch(policy))
    rows.head(rows.rows).square().mean().backward()
    assert all(
        p.grad is not None and torch.isfinite(p.grad).all() for p in policy.model.parameters()
    )


def test_a_batch_without_quantiles_or_tokens_is_refused(policy):
    ids = policy.reward_tokens.ids
    with pytest.raises(ValueError, match="quantiles"):
        collate(padded([[1]], [[2]], [-1]), ids, 0, policy.device)
    with pytest.raises(ValueError, match="quantiles"):
        collate(padded([[1]], [[2]], [5]), ids, 0, policy.device)
    with pytest.raises(ValueError, match="completion token"):
        collate(padded([[1], [1]], [[2], []], [0, 1]), ids, 0, policy.device)
    for prompt, completion in (([1, ids[0]], [2]), ([1], [2, 60_000])):
        with pytest.raises(PoolCorruptedError, match="own tokens end at 256"):
            collate(padded([prompt], [completion], [0]), ids, 0, policy.device)


def test_trained_targets_are_the_sampled_ids_with_their_eos(policy):
    batch = tiny_batch(policy, extra=2)
    assert batch.targets.tolist() == [token for tokens in COMPLETIONS for token in tokens]
