from __future__ import annotations

import pytest
import torch
import transformers as hf
from transformers import AutoModelForCausalLM, PreTrainedModel

from quark.models.loading import load_saved_policy
from quark.models.positions import (
    absolute_positions,
    give_reward_token_its_own_position,
    original_leading_positions,
)
from quark.reference.base import FrozenReference
from tests.tiny import VOCAB_SIZE, tiny_batch, tiny_policy

_GPT2 = {"n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.3}
_USUAL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 1,
}
_GROUPED = _USUAL | {"num_key_value_heads": 2}
_FAIRSEQ = {"max_position_embeddings": 64, "init_std": 0.3, "pad_token_id": 1}

LEARNED = {
    "GPT2LMHeadModel": _GPT2,
    "GPTBigCodeForCausalLM": _GPT2,
    "OpenAIGPTLMHeadModel": _GPT2,
    "GPTNeoForCausalLM": {
        "max_position_embeddings": 64,
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 8,
        "initializer_range": 0.3,
    },
    "OPTForCausalLM": _FAIRSEQ
    | {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "ffn_dim": 64,
        "num_attention_heads": 4,
        "word_embed_proj_dim": 16,
    },
    "BioGptForCausalLM": _USUAL,
}
"""Models with a table of learned positions, under several names; OPT's and BioGPT's begin at row 2."""
COMPUTED = {
    "XGLMForCausalLM": _FAIRSEQ
    | {"d_model": 32, "ffn_dim": 64, "num_layers": 2, "attention_heads": 4},
    "CTRLLMHeadModel": _GPT2 | {"dff": 64},
}
RELATIVE = {
    "BloomForCausalLM": {"hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.3},
    "MptForCausalLM": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64},
    "CodeGenForCausalLM": _GPT2 | {"n_ctx": 64, "rotary_dim": 4},
    "GPTJForCausalLM": _GPT2 | {"rotary_dim": 4},
    "GPTNeoXForCausalLM": _USUAL,
    "FalconForCausalLM": _USUAL,
    "LlamaForCausalLM": _GROUPED,
    "MistralForCausalLM": _GROUPED,
    "Qwen2ForCausalLM": _GROUPED,
    "Qwen3ForCausalLM": _GROUPED | {"head_dim": 8},
    "GemmaForCausalLM": _GROUPED | {"head_dim": 8},
    "Gemma2ForCausalLM": _GROUPED | {"head_dim": 8},
    "PhiForCausalLM": _GROUPED,
    "Phi3ForCausalLM": _GROUPED,
    "StableLmForCausalLM": _GROUPED,
    "OlmoForCausalLM": _GROUPED,
    "Starcoder2ForCausalLM": _GROUPED,
}
FAMILIES = LEARNED | COMPUTED | RELATIVE


def tiny(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A random model of a family of transformers."""
    kind = getattr(hf, name)
    config = kind.config_class(
        vocab_size=VOCAB_SIZE, bos_token_id=0, eos_token_id=256, **FAMILIES[name]
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind(config).to(dtype).eval()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_reward_token_without_influence_leaves_the_reference(name):
    """The token is hidden by the mask, so that it can only move what follows it."""
    policy = tiny_policy(tiny(name))
    original = tiny(name)
    reference = FrozenReference(
        original, num_leading_positions=original_leading_positions(original)
    )
    batch = tiny_batch(policy)
    conditioned = batch.policy_inputs()
    mask = conditioned.attention_mask.clone()
    arguments = {}
    if name not in {"BloomForCausalLM", "MptForCausalLM"}:
        arguments["position_ids"] = policy.causal.positions(mask, is_conditioned=True)
    mask[torch.arange(len(mask)), mask.argmax(1)] = 0
    logits = policy.model(conditioned.input_ids, attention_mask=mask, **arguments).logits
    found = logits.flatten(0, 1)[conditioned.token_positions][:, :VOCAB_SIZE]
    rows = reference.completion_rows(batch)
    torch.testing.assert_close(found, rows.head(rows.rows)[:, :VOCAB_SIZE], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_positions_are_found_by_what_they_do(name, dtype):
    found = absolute_positions(tiny(name, dtype))
    if name in RELATIVE:
        assert found is None
        return
    assert found is not None
    assert (found.table is not None) == (name in LEARNED)
    if name in LEARNED:
        assert found.offset == (2 if name in {"OPTForCausalLM", "BioGptForCausalLM"} else 0)


@pytest.mark.parametrize("name", [*LEARNED, *COMPUTED, "LlamaForCausalLM"])
def test_plain_transformers_count_the_saved_models_positions_alike(name, tmp_path):
    """Also at the end of the context, which a learned table does not shorten."""
    policy = tiny_policy(tiny(name))
    policy.save(tmp_path)
    again, plain = load_saved_policy(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.num_leading_positions == policy.num_leading_positions
    num_tokens = 64 + (name in LEARNED)
    ids = (torch.arange(num_tokens) * 7 % 200).unsqueeze(0)
    ids[0, 0] = policy.reward_tokens.best
    mask = torch.ones_like(ids)
    positions = policy.causal.positions(mask, is_conditioned=True)
    expected = plain(ids).logits
    for model in (policy.model, again.model):
        found = model(ids, attention_mask=mask, position_ids=positions).logits
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", LEARNED)
def test_a_grown_table_keeps_every_position_behind_the_new_one(name):
    model, original = tiny(name), tiny(name)
    ids = (torch.arange(64) * 7 % 200).unsqueeze(0)
    expected = original(ids).logits
    assert give_reward_token_its_own_position(model)
    assert model.config.max_position_embeddings == 65
    wider = torch.cat([ids[:, :1], ids], 1)
    mask = torch.ones_like(wider)
    mask[0, 0] = 0
    positions = torch.arange(65).unsqueeze(0)
    found = model(wider, attention_mask=mask, position_ids=positions).logits[:, 1:]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
