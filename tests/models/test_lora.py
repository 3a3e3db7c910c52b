from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from quark.errors import ModelError
from quark.models import lora
from quark.models.config import LoraConfig, ModelConfig
from quark.models.loading import load_policy, load_saved_policy
from quark.models.logprobs import LossWeights, token_nll, weighted_loss
from quark.models.lora import frozen_digest
from quark.reference.adapter_off import AdapterOffReference
from quark.reference.base import FrozenReference
from quark.training.state.checkpoint import load_model_tensors, model_tensors
from tests.tiny import save_tiny, tiny_batch, tiny_gpt2, tiny_llama

MODELS = {"gpt2 tied": tiny_gpt2, "llama untied": lambda: tiny_llama(tied=False)}


@pytest.fixture(params=MODELS)
def make(request):
    return MODELS[request.param]


def adapted(folder, model=None, dtype=torch.float32, **settings):
    name = str(save_tiny(folder / "base", model))
    config = ModelConfig(name=name, lora=LoraConfig(rank=4, **settings))
    return load_policy(config, num_quantiles=5, seed=0, dtype=dtype)


def train_a_little(policy, reference, num_steps=3):
    parameters = [p for p in policy.model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=0.02)
    batch = tiny_batch(policy)
    for _ in range(num_steps):
        optimizer.zero_grad()
        loss, _ = weighted_loss(
            policy.completion_rows(batch),
            reference.completion_rows(batch),
            batch.targets,
            LossWeights(
                lm=1.0, kl_reference_to_policy=0.1, kl_policy_to_reference=0.0, entropy=0.0
            ),
            base_vocab_size=policy.reward_tokens.base_vocab_size,
        )
        loss.backward()
        optimizer.step()


def nll(model, policy):
    batch = tiny_batch(policy)
    width = policy.reward_tokens.base_vocab_size
    return token_nll(model.completion_rows(batch), batch.targets, base_vocab_size=width)


def test_with_the_adapters_off_the_trained_policy_is_the_original_model(make, tmp_path):
    policy = adapted(tmp_path, make())
    reference, original = AdapterOffReference(policy), FrozenReference(make())
    before, digest = nll(policy, policy), frozen_digest(policy.model)
    torch.testing.assert_close(nll(reference, policy), nll(original, policy))
    train_a_little(policy, reference)
    torch.testing.assert_close(nll(reference, policy), nll(original, policy))
    assert (nll(policy, policy) - before).abs().max() > 0.05
    assert frozen_digest(policy.model) == digest


def test_adapters_and_reward_vectors_alone_are_trained(make, tmp_path):
    policy = adapted(tmp_path, make())
    vectors = policy.reward_vectors.clone()
    train_a_little(policy, AdapterOffReference(policy))
    trained = {n: p for n, p in policy.model.named_parameters() if p.requires_grad}
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained.values())
    assert all(".lora_A." in n or ".lora_B." in n or n.endswith(".rows") for n in trained)
    assert (policy.reward_vectors != vectors).all(1).all()
    policy.reward_vectors.add_(1.0)
    assert torch.equal(policy.adapter.embedding.rows, policy.reward_vectors)


def test_what_a_checkpoint_holds_brings_the_policy_back(make, tmp_path):
    policy = adapted(tmp_path, make())
    train_a_little(policy, AdapterOffReference(policy))
    tensors = model_tensors(policy.model)
    assert {v.shape[0] for n, v in tensors.items() if n.endswith(".rows")} == {5}
    assert sum(v.numel() for v in tensors.values()) < 0.5 * policy.model.num_parameters()
    again = adapted(tmp_path / "again", make())
    load_model_tensors(again.model, tensors, tmp_path)
    assert torch.equal(nll(again, again), nll(policy, policy))


def test_weights_are_merged_in_full_precision_wherever_it_is_done(tmp_path):
    policy = adapted(tmp_path)
    train_a_little(policy, AdapterOffReference(policy))
    policy.save(tmp_path / "plain")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        policy.save(tmp_path / "while sampling")
    saved, again = (
        load_file(tmp_path / name / "model.safetensors") for name in ("plain", "while sampling")
    )
    assert all(torch.equal(tensor, again[name]) for name, tensor in saved.items())


def test_the_saved_model_is_an_ordinary_one_with_the_adapters_in_its_weights(make, tmp_path):
    policy = adapted(tmp_path, make())
    train_a_little(policy, AdapterOffReference(policy))
    before = copy.deepcopy(policy.model.state_dict())
    expected = nll(policy, policy)
    policy.save(tmp_path / "model")
    again = load_saved_policy(tmp_path / "model")
    torch.testing.assert_close(nll(again, again), expected)
    assert again.adapter is None
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert plain.state_dict().keys() == make().state_dict().keys()
    after = policy.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert torch.equal(nll(policy, policy), expected)


def test_half_precision_weights_keep_adapters_in_float32(tmp_path):
    policy = adapted(tmp_path, tiny_llama(), torch.bfloat16)
    types = {p.dtype for p in policy.model.parameters() if p.requires_grad}
    assert types == {torch.float32}
    train_a_little(policy, AdapterOffReference(policy))
    policy.save(tmp_path / "model")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert saved.dtype == torch.bfloat16


def test_what_is_dropped_follows_from_the_seed_and_only_within_a_step(tmp_path):
    policy = adapted(tmp_path, dropout=0.5)
    with torch.no_grad():
        for _, layer in policy.adapter.layers:
            layer.lora_B["default"].weight.fill_(0.1)
    state = torch.get_rng_state()
    outside = nll(policy, policy)
    within = []
    for seed in (1, 1, 2):
        with policy.dropping(seed):
            within.append(nll(policy, policy))
    assert torch.equal(within[0], within[1])
    assert not torch.equal(within[0], within[2])
    assert torch.equal(nll(policy, policy), outside)
    assert torch.equal(torch.get_rng_state(), state)


def test_first_values_follow_from_the_seed(tmp_path):
    name = str(save_tiny(tmp_path))
    config = ModelConfig(name=name, lora=LoraConfig(rank=2, target_modules=("c_attn",)))
    first, same, other = (
        model_tensors(load_policy(config, num_quantiles=2, seed=seed).model) for seed in (0, 0, 1)
    )
    downs = [n for n in first if "lora_A" in n]
    assert len(downs) == 2
    assert all(
        torch.equal(first[n], same[n]) and not torch.equal(first[n], other[n]) for n in downs
    )


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("no_such_module", "no_such_module"),
        ("lm_head", "lm_head is the model's embedding or vocabulary head"),
        ("wte", "transformer.wte is the model's embedding or vocabulary head"),
        ("wpe", r"transformer.wpe \(Embedding\) is not a linear layer"),
    ],
)
def test_modules_that_cannot_have_an_adapter_are_refused(tmp_path, target, message):
    with pytest.raises(ModelError, match=message):
        adapted(tmp_path, tiny_gpt2(tied=False), target_modules=(target,))


def test_without_peft_the_way_out_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(lora.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"pip install 'peft>="):
        adapted(tmp_path)
