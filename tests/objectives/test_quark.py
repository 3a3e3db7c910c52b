from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from quark.objectives.config import KLDirection, LMSoftmax, QuarkObjectiveConfig, Reduction
from quark.objectives.quark import QuarkObjective
from quark.reference.base import FrozenReference
from tests.tiny import (
    COMPLETIONS,
    PROMPTS,
    VOCAB_SIZE,
    tiny_batch,
    tiny_gpt2,
    tiny_llama,
    tiny_policy,
)

MAKERS = {
    "gpt2 tied": tiny_gpt2,
    "gpt2 untied": lambda: tiny_gpt2(tied=False),
    "llama tied": tiny_llama,
    "llama untied": lambda: tiny_llama(tied=False),
}
CONFIGS = [
    QuarkObjectiveConfig(),
    QuarkObjectiveConfig(kl_coef=0.5, kl_direction=KLDirection.POLICY_TO_REFERENCE),
    QuarkObjectiveConfig(kl_coef=0.5, reduction=Reduction.TOKEN_MEAN, entropy_coef=0.06),
    QuarkObjectiveConfig(lm_softmax=LMSoftmax.ENLARGED, entropy_coef=0.1, length_groups=1),
    QuarkObjectiveConfig(kl_coef=0.5, unlikelihood_coef=0.7),
]


def specification(policy, reference, config):
    """The loss one sequence at a time, from plain forwards of the two models."""
    losses, counts = [], 0
    for i, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        ids = torch.tensor([[policy.reward_tokens.ids[i % 5], *prompt, *completion]])
        logits = policy.model(ids).logits[0, len(prompt) : -1]
        base = reference.model(ids[:, 1:]).logits[0, len(prompt) - 1 : -1]
        log_p, log_q = F.log_softmax(logits[:, :VOCAB_SIZE], -1), F.log_softmax(base, -1)
        lm = F.log_softmax(logits, -1) if config.lm_softmax is LMSoftmax.ENLARGED else log_p
        nll = -lm.gather(1, torch.tensor(completion)[:, None]).sum()
        if config.kl_direction is KLDirection.REFERENCE_TO_POLICY:
            kl = (log_q.exp() * (log_q - log_p)).sum()
        else:
            kl = (log_p.exp() * (log_p - log_q)).sum()
        entropy = -(log_p.exp() * log_p).sum()
        loss = nll + config.kl_coef * kl - config.entropy_coef * entropy
        for step, token in enumerate(completion):
            earlier = sorted({*prompt, *completion[:step]} - {token})
            rest = 1 - log_p[step].exp()[earlier]
            loss = loss - config.unlikelihood_coef * rest.log().sum()
        losses.append(loss)
        counts += len(completion)
    size = len(losses) if config.reduction is Reduction.SEQUENCE_SUM else counts
    return torch.stack(losses).sum() / size


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("config", CONFIGS)
def test_loss_and_gradients_equal_the_formula_sequence_by_sequence(make, config):
    policy, reference = tiny_policy(make()), FrozenReference(make())
    batch = tiny_batch(policy, extra=1)
    output = QuarkObjective(config)(
        policy, reference, batch, num_sequences=6, num_tokens=batch.num_tokens
    )
    expected = specification(policy, reference, config)
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    parameters = list(policy.model.parameters())
    found = torch.autograd.grad(output.loss, parameters)
    for gradient, other in zip(found, torch.autograd.grad(expected, parameters), strict=True):
        assert torch.allclose(gradient, other, atol=2e-4)


@pytest.mark.parametrize("reduction", list(Reduction))
def test_micro_batches_add_up_to_the_whole(reduction):
    policy, reference = tiny_policy(), FrozenReference(tiny_gpt2(seed=1))
    objective = QuarkObjective(QuarkObjectiveConfig(reduction=reduction, entropy_coef=0.1))
    batch = tiny_batch(policy)
    counts = {"num_sequences": batch.num_sequences, "num_tokens": batch.num_tokens}
    whole = objective(policy, reference, batch, **counts)
    parts = [objective(policy, reference, part, **counts) for part in batch.split(4)]
    assert sum(part.loss.item() for part in parts) == pytest.approx(whole.loss.item(), rel=1e-5)
    assert sum(part.num_tokens for part in parts) == whole.num_tokens
    for name in ("lm_loss", "kl_reference_to_policy", "kl_policy_to_reference", "entropy"):
        total = sum(getattr(part, name) for part in parts)
        assert total == pytest.approx(getattr(whole, name), rel=1e-5)
    parameters = list(policy.model.parameters())
    expected = torch.autograd.grad(whole.loss, parameters)
    for part in parts:
        part.loss.backward()
    for parameter, gradient in zip(parameters, expected, strict=True):
        assert torch.allclose(parameter.grad, gradient, atol=2e-4)


def test_a_batch_is_divided_by_length_only_where_that_spares_padding():
    objective = QuarkObjective(QuarkObjectiveConfig(length_groups=3))
    ragged = tiny_batch(tiny_policy())
    assert [part.num_sequences for part in objective.micro_batches(ragged, 1)] == [2, 2, 2]
    assert [part.num_sequences for part in objective.micro_batches(ragged, 6)] == [1] * 6
    (longest,) = (p for p in objective.micro_batches(ragged, 6) if p.prompt_lengths.max() == 4)
    assert not longest.has_padding
    assert objective.micro_batches(longest, 1) == [longest]


def test_both_divergences_are_reported_and_vanish_where_policy_and_reference_agree():
    policy, reference = tiny_policy(), FrozenReference(tiny_gpt2())
    batch = tiny_batch(policy)
    counts = {"num_sequences": batch.num_sequences, "num_tokens": batch.num_tokens}
    objective = QuarkObjective(QuarkObjectiveConfig())
    apart = objective(policy, reference, batch, **counts)
    assert apart.kl_reference_to_policy > 0.1
    assert apart.kl_policy_to_reference > 0.1
    same = objective(policy, policy, batch, **counts)
    assert same.kl_reference_to_policy == pytest.approx(0.0, abs=1e-4)
    assert same.kl_policy_to_reference == pytest.approx(0.0, abs=1e-4)


def test_reward_token_logits_leave_the_base_loss_alone():
    policy, reference = tiny_policy(tiny_gpt2(tied=False)), FrozenReference(tiny_gpt2())
    batch = tiny_batch(policy)
    counts = {"num_sequences": batch.num_sequences, "num_tokens": batch.num_tokens}
    objective = QuarkObjective(QuarkObjectiveConfig())
    before = objective(policy, reference, batch, **counts)
    with torch.no_grad():
        policy.model.get_output_embeddings().weight[VOCAB_SIZE:] *= 100.0
    after = objective(policy, reference, batch, **counts)
    assert after.loss.item() == before.loss.item()


def test_bfloat16_autocast_runs_and_stays_close():
    policy, reference = tiny_policy(), FrozenReference(tiny_gpt2())
    batch = tiny_batch(policy)
    counts = {"num_sequences": batch.num_sequences, "num_tokens": batch.num_tokens}
    objective = QuarkObjective(QuarkObjectiveConfig(kl_coef=0.2, entropy_coef=0.05))
    full = objective(policy, reference, batch, **counts)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = objective(policy, reference, batch, **counts)
    assert low.loss.dtype == torch.float32
    assert low.loss.item() == pytest.approx(full.loss.item(), rel=0.01)
    assert low.entropy == pytest.approx(full.entropy, rel=0.01)
    parameters = list(policy.model.parameters())
    expected = torch.autograd.grad(full.loss, parameters)
    for gradient, other in zip(torch.autograd.grad(low.loss, parameters), expected, strict=True):
        assert F.cosine_similarity(gradient.flatten(), other.flatten(), dim=0) > 0.95


def test_reference_gets_no_gradient_and_gives_sequence_logprobs():
    policy, reference = tiny_policy(), FrozenReference(tiny_gpt2(seed=1))
    batch = tiny_batch(policy)
    output = QuarkObjective(QuarkObjectiveConfig(kl_coef=1.0))(
        policy, reference, batch, num_sequences=6, num_tokens=batch.num_tokens
    )
    output.loss.backward()
    assert all(p.grad is None for p in reference.model.parameters())
    found = reference.sequence_logprobs(batch, base_vocab_size=VOCAB_SIZE)
    for i, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        logits = reference.model(torch.tensor([[*prompt, *completion]])).logits
        logp = F.log_softmax(logits[0, len(prompt) - 1 : -1], -1)
        expected = logp.gather(1, torch.tensor(completion)[:, None]).sum()
        assert found[i].item() == pytest.approx(expected.item(), abs=1e-4)


def test_coefficients_adapt_to_the_penalized_direction_and_restore():
    objective = QuarkObjective(
        QuarkObjectiveConfig(
            kl_coef=0.05, kl_target=3.0, kl_horizon=1000.0, entropy_coef=0.06, entropy_target=40.0
        )
    )
    sums = {"kl_reference_to_policy": 600.0, "kl_policy_to_reference": 0.0, "entropy": 2000.0}
    objective.after_step(sums, num_sequences=100)
    assert objective.kl_coefficient.value == pytest.approx(0.05 * 1.02)
    assert objective.entropy_coefficient.value == pytest.approx(0.06 * (1 + 0.2 * 100 / 2500))
    other = QuarkObjective(objective.config)
    other.load_state_dict(objective.state_dict())
    assert other.state_dict() == objective.state_dict()


@pytest.mark.parametrize("name", ["kl", "entropy"])
def test_a_target_that_no_factor_reaches_is_refused(name):
    with pytest.raises(ValueError, match=f"{name}_coef is 0"):
        QuarkObjectiveConfig(**{f"{name}_target": 1.0, f"{name}_coef": 0.0})
