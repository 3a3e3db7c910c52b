"""Contrast, quantile advantage and tilt, against a version that takes one sequence and one token at a time."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from quark.config.schema import RunConfig
from quark.objectives.config import KLDirection, KLTokens, LMSoftmax, QuarkObjectiveConfig
from quark.objectives.quark import QuarkObjective
from quark.objectives.tilt import TokenTilt
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

CONFIGS = [
    QuarkObjectiveConfig(lm_coef=0.0, contrast_coef=1.0, kl_coef=0.0),
    QuarkObjectiveConfig(lm_coef=0.0, contrast_coef=1.0, contrast_tokens=4),
    QuarkObjectiveConfig(
        lm_coef=0.3,
        contrast_coef=0.7,
        contrast_tokens=2,
        contrast_temperature=3.0,
        kl_coef=0.5,
        entropy_coef=0.05,
        kl_tokens=KLTokens.ALL,
    ),
    QuarkObjectiveConfig(
        lm_coef=1.0,
        contrast_coef=0.5,
        kl_coef=0.5,
        kl_direction=KLDirection.POLICY_TO_REFERENCE,
        kl_tokens=KLTokens.ALL,
    ),
    QuarkObjectiveConfig(lm_coef=0.0, advantage_coef=1.0, kl_coef=0.5, entropy_coef=0.1),
    QuarkObjectiveConfig(
        lm_coef=0.2, contrast_coef=0.4, contrast_tokens=2, advantage_coef=0.9, ratio_clip=0.7
    ),
    QuarkObjectiveConfig(
        contrast_coef=0.4, contrast_tokens=2, kl_tokens=KLTokens.ALL, unlikelihood_coef=0.3
    ),
    QuarkObjectiveConfig(lm_coef=0.0, tilt_coef=0.8, kl_coef=0.0),
    QuarkObjectiveConfig(lm_coef=0.0, tilt_coef=0.8, kl_coef=0.3, entropy_coef=0.1),
    QuarkObjectiveConfig(lm_coef=0.5, tilt_coef=0.8),
    QuarkObjectiveConfig(
        lm_coef=0.2, contrast_coef=0.4, contrast_tokens=2, advantage_coef=0.9, tilt_coef=0.8
    ),
]
TILT = TokenTilt(
    scores=np.linspace(-0.5, 0.7, VOCAB_SIZE, dtype=np.float32),
    strengths=np.array([-3.0, -1.0, 0.0, 1.0, 3.0], dtype=np.float32),
)
TILT_QUANTILES = torch.tensor([4, 4, 1, 0, 2, 4])
ADVANTAGES = torch.tensor([1.2, -0.8, 0.0, -1.5, 0.4, -0.1])
SAMPLED_LOGPROBS = torch.tensor([-9.0, -40.0, -12.0, 3.0, -20.0, math.nan])
"""Such that some ratios are clipped, some are not, and one is unknown."""


def with_terms(batch, policy, objective, seed=3):
    """``batch`` with what the objective needs of it, the other tokens as a step of that seed draws them."""
    ids = torch.tensor(policy.reward_tokens.ids)
    own = (batch.reward_tokens - ids[0]).numpy().astype(np.int16)
    others = objective.other_quantiles(own, num_quantiles=5, seed=seed)
    if others is not None:
        batch = dataclasses.replace(
            batch, other_tokens=ids[torch.from_numpy(others.astype(np.int64))]
        )
    if objective.config.advantage_coef:
        batch = dataclasses.replace(batch, advantages=ADVANTAGES, sampled_logprobs=SAMPLED_LOGPROBS)
    if objective.config.tilt_coef:
        objective.take_tilt(TILT)
        batch = dataclasses.replace(batch, tilt_tokens=ids[TILT_QUANTILES])
    return batch


def specification(policy, reference, config, batch):
    losses = []
    for i, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        picked = torch.tensor(completion)[:, None]
        ids = torch.tensor([[*prompt, *completion]])
        log_q = F.log_softmax(reference.model(ids).logits[0, len(prompt) - 1 : -1], -1)

        def log_probs(token, prompt=prompt, completion=completion):
            ids = torch.tensor([[token, *prompt, *completion]])
            return F.log_softmax(policy.model(ids).logits[0, len(prompt) : -1, :VOCAB_SIZE], -1)

        def distance(quantile, log_q=log_q, log_probs=log_probs):
            """KL(q || pi) under the token of ``quantile``."""
            shift = float(TILT.strengths[quantile]) * torch.from_numpy(TILT.scores).double()
            log_target = F.log_softmax(log_q + shift, -1)
            log_p = log_probs(policy.reward_tokens.ids[quantile])
            return (log_target.exp() * (log_target - log_p)).sum()

        def under(token, picked=picked, log_q=log_q, log_probs=log_probs):
            """log pi of the completion, KL, entropy and unlikelihood."""
            log_p = log_probs(token)
            kl = (log_q.exp() * (log_q - log_p)).sum()
            if config.kl_direction is KLDirection.POLICY_TO_REFERENCE:
                kl = (log_p.exp() * (log_p - log_q)).sum()
            entropy = -(log_p.exp() * log_p).sum()
            return log_p.gather(1, picked).sum(), kl, entropy, unlikelihood(log_p)

        def unlikelihood(log_p, prompt=prompt, completion=completion):
            if not config.unlikelihood_coef:
                return 0.0
            rest = torch.log1p(-log_p.exp())
            return -sum(
                rest[step, list({*prompt, *completion[:step]} - {token})].sum()
                for step, token in enumerate(completion)
            )

        loss = 0.0
        if config.tilt_coef:
            quantile = int(TILT_QUANTILES[i])
            loss += config.tilt_coef * distance(quantile)
            if not (config.lm_coef or config.contrast_coef or config.advantage_coef):
                _, kl, entropy, _ = under(policy.reward_tokens.ids[quantile])
                loss += config.kl_coef * kl - config.entropy_coef * entropy
        if config.lm_coef or config.contrast_coef:
            logp, kl, entropy, repeated = under(int(batch.reward_tokens[i]))
            loss += config.unlikelihood_coef * repeated
            loss += -config.lm_coef * logp + config.kl_coef * kl - config.entropy_coef * entropy
        if config.contrast_coef:
            others = [under(token) for token in batch.other_tokens[i].tolist()]
            sums = torch.stack([logp, *(other for other, *_ in others)])
            posterior = F.log_softmax(sums / config.contrast_temperature, 0)
            loss -= config.contrast_coef * posterior[0]
            if config.kl_tokens is KLTokens.ALL:
                loss += config.kl_coef * sum(kl for _, kl, *_ in others)
        if config.advantage_coef:
            logp, kl, entropy, _ = under(policy.reward_tokens.best)
            advantage, sampled = float(ADVANTAGES[i]), float(SAMPLED_LOGPROBS[i])
            if advantage < 0 and not math.isnan(sampled):
                advantage *= min(math.exp(min(logp.item() - sampled, 50.0)), config.ratio_clip)
            loss += -config.advantage_coef * advantage * logp
            loss += config.kl_coef * kl - config.entropy_coef * entropy
        losses.append(loss)
    return torch.stack(losses).mean()


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama])
@pytest.mark.parametrize("config", CONFIGS)
def test_loss_and_gradients_equal_the_formula_in_float64(make, config):
    policy = tiny_policy(make().double())
    policy.model.double()
    reference = FrozenReference(make(seed=1).double())
    objective = QuarkObjective(config)
    batch = with_terms(tiny_batch(policy), policy, objective)
    output = objective(policy, reference, batch, num_sequences=6, num_tokens=batch.num_tokens)
    expected = specification(policy, reference, config, batch)
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-10)
    parameters = list(policy.model.parameters())
    found = torch.autograd.grad(output.loss, parameters)
    for gradient, other in zip(found, torch.autograd.grad(expected, parameters), strict=True):
        # Llama's norms are taken in float32 whatever the weights.
        assert torch.allclose(gradient, other, atol=1e-9 if make is tiny_gpt2 else 1e-5)


def test_parts_add_up_to_the_whole_and_report_the_same_sums():
    policy, reference = tiny_policy(), FrozenReference(tiny_gpt2(seed=1))
    objective = QuarkObjective(CONFIGS[-1])
    batch = with_terms(tiny_batch(policy), policy, objective)
    counts = {"num_sequences": batch.num_sequences, "num_tokens": batch.num_tokens}
    whole = objective(policy, reference, batch, **counts)
    parts = [objective(policy, reference, part, **counts) for part in batch.split(4)]
    for name in (
        "loss",
        "lm_loss",
        "kl_reference_to_policy",
        "entropy",
        "contrast_loss",
        "advantage_loss",
        "tilt_loss",
    ):
        total = sum(torch.as_tensor(getattr(part, name)).item() for part in parts)
        assert total == pytest.approx(torch.as_tensor(getattr(whole, name)).item(), rel=1e-5)
    parameters = list(policy.model.parameters())
    expected = torch.autograd.grad(whole.loss, parameters)
    for part in parts:
        part.loss.backward()
    for parameter, gradient in zip(parameters, expected, strict=True):
        assert torch.allclose(parameter.grad, gradient, atol=2e-4)


def test_tokens_that_say_the_same_are_at_chance_and_the_contrast_pulls_them_apart():
    policy, reference = tiny_policy(), FrozenReference(tiny_gpt2())
    with torch.no_grad():
        policy.reward_vectors.copy_(policy.reward_vectors[:1].expand(5, -1))
    config = QuarkObjectiveConfig(lm_coef=0.0, contrast_coef=1.0, kl_coef=0.0, contrast_tokens=4)
    objective = QuarkObjective(config)
    batch = with_terms(tiny_batch(policy), policy, objective)
    counts = {"num_sequences": 6, "num_tokens": batch.num_tokens}
    optimizer = torch.optim.Adam(policy.model.parameters(), lr=1e-2)
    first = objective(policy, reference, batch, **counts)
    assert first.contrast_loss / 6 == pytest.approx(math.log(5), abs=1e-4)
    for _ in range(20):
        optimizer.zero_grad()
        objective(policy, reference, batch, **counts).loss.backward()
        optimizer.step()
    assert objective(policy, reference, batch, **counts).contrast_loss / 6 < 0.5


def test_bfloat16_autocast_stays_close():
    policy, reference = tiny_policy(), FrozenReference(tiny_gpt2())
    objective = QuarkObjective(CONFIGS[1])
    batch = with_terms(tiny_batch(policy), policy, objective)
    counts = {"num_sequences": 6, "num_tokens": batch.num_tokens}
    full = objective(policy, reference, batch, **counts)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = objective(policy, reference, batch, **counts)
    assert low.loss.dtype == torch.float32
    assert low.loss.item() == pytest.approx(full.loss.item(), rel=0.03)


def test_other_tokens_are_never_the_own_and_never_twice_and_follow_from_the_seed():
    objective = QuarkObjective(QuarkObjectiveConfig(contrast_coef=1.0, contrast_tokens=3))
    own = np.arange(500, dtype=np.int16) % 5
    others = objective.other_quantiles(own, num_quantiles=5, seed=1)
    assert others.shape == (500, 3)
    assert all(len({k, *row}) == 4 for k, row in zip(own.tolist(), others.tolist(), strict=True))
    counts = np.bincount(others[own == 2].ravel(), minlength=5)
    assert counts[2] == 0
    assert counts.max() - counts.min(initial=300, where=np.arange(5) != 2) < 40
    assert np.array_equal(others, objective.other_quantiles(own, num_quantiles=5, seed=1))
    assert not np.array_equal(others, objective.other_quantiles(own, num_quantiles=5, seed=2))
    assert objective.other_quantiles(own % 2, num_quantiles=2, seed=1).shape == (500, 1)
    assert objective.other_quantiles(own * 0, num_quantiles=1, seed=1) is None
    paper = QuarkObjective(QuarkObjectiveConfig())
    assert paper.other_quantiles(own, num_quantiles=5, seed=1) is None


def test_settings_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="nothing would be learned"):
        RunConfig(objective={"lm_coef": 0.0})
    with pytest.raises(ValueError, match="lm_softmax"):
        QuarkObjectiveConfig(contrast_coef=1.0, lm_softmax=LMSoftmax.ENLARGED)
    with pytest.raises(ValueError, match="num_quantiles = 1 leaves one"):
        RunConfig(objective={"contrast_coef": 1.0}, pool={"num_quantiles": 1})
