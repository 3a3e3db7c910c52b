from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from quark.models.batch import EarlierTokens
from quark.models.causal import CompletionRows
from quark.models.logprobs import LossWeights, Tilt, token_nll, token_statistics, weighted_loss

BASE = 7
"""Columns that are compared; the heads below have more."""


def logits_rows(logits: torch.Tensor) -> CompletionRows:
    return CompletionRows(rows=logits, head=lambda rows: rows, parameters=())


SEQUENCES = torch.tensor([[0, 1, 2, 2, 3, 1, 4], [0, 0, 5, 6, 5, 5, 5], [3, 3, 3, 0, 2, 0, 0]])
"""Two prompts of three tokens and one of one, padded with 0 on both sides."""
EARLIER = EarlierTokens(
    sequences=SEQUENCES,
    row=torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 2, 2]),
    begin=torch.tensor([0, 0, 0, 0, 2, 2, 2, 2, 0, 0]),
    end=torch.tensor([3, 4, 5, 6, 3, 4, 5, 6, 3, 4]),
)
CANDIDATES = [
    {0, 1},
    {0, 1, 2},
    {0, 2, 3},
    {0, 1, 2, 3},
    {5},
    {6},
    {6},
    {6},
    {3},
    {0, 3},
]
"""What came earlier and is not the token itself, by hand. The 0 of the first prompt is a token, that of the second padding."""
TILT = Tilt(
    scores=torch.linspace(-1.0, 0.5, BASE, dtype=torch.float64),
    strengths=torch.linspace(-2.0, 3.0, 10, dtype=torch.float64),
)
TARGETS = SEQUENCES[EARLIER.row, EARLIER.end]


def test_earlier_tokens_are_those_of_the_sequence_and_not_the_token_itself():
    for places in (slice(0, 10), slice(3, 7), slice(9, 10)):
        found = EARLIER.other_than(TARGETS[places], places, BASE)
        assert [set(row.nonzero().flatten().tolist()) for row in found] == CANDIDATES[places]


def test_unlikelihood_equals_a_value_computed_by_hand():
    """At p = (0.5, 0.3, 0.2) with token 2 after tokens 0, 1 and 0: each counts once, whatever its frequency."""
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log()
    earlier = EarlierTokens(
        sequences=torch.tensor([[0, 1, 0, 2]]),
        row=torch.tensor([0]),
        begin=torch.tensor([0]),
        end=torch.tensor([3]),
    )
    weights = LossWeights(
        lm=0.0,
        kl_reference_to_policy=0.0,
        kl_policy_to_reference=0.0,
        entropy=0.0,
        unlikelihood=2.0,
    )
    loss, sums = weighted_loss(
        logits_rows(logits),
        logits_rows(logits),
        torch.tensor([2]),
        weights,
        base_vocab_size=3,
        earlier=earlier,
    )
    by_hand = -math.log(0.5) - math.log(0.7)
    assert sums[4].item() == pytest.approx(by_hand, abs=1e-6)
    assert loss.item() == pytest.approx(2 * by_hand, abs=1e-6)


def test_a_certain_repetition_has_a_finite_loss_and_gradient():
    logits = torch.tensor([[200.0, 0.0, 0.0]], requires_grad=True)
    earlier = EarlierTokens(
        sequences=torch.tensor([[0, 1]]),
        row=torch.tensor([0]),
        begin=torch.tensor([0]),
        end=torch.tensor([1]),
    )
    weights = LossWeights(
        lm=0.0,
        kl_reference_to_policy=0.0,
        kl_policy_to_reference=0.0,
        entropy=0.0,
        unlikelihood=1.0,
    )
    loss, _ = weighted_loss(
        logits_rows(logits),
        logits_rows(logits.detach()),
        torch.tensor([1]),
        weights,
        base_vocab_size=3,
        earlier=earlier,
    )
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.item() == pytest.approx(-math.log(1e-5), rel=1e-4)
    assert gradient.isfinite().all()


def specification(policy_logits, reference_logits, targets, weights, all_columns):
    """The six terms, naively: what the chunked code must equal in value and gradient."""
    log_p = F.log_softmax(policy_logits[:, :BASE], dim=-1)
    log_q = F.log_softmax(reference_logits[:, :BASE], dim=-1)
    log_lm = F.log_softmax(policy_logits, dim=-1) if all_columns else log_p
    nll = -log_lm.gather(1, targets[:, None]).sum()
    kl_reference_to_policy = (log_q.exp() * (log_q - log_p)).sum()
    kl_policy_to_reference = (log_p.exp() * (log_p - log_q)).sum()
    entropy = -(log_p.exp() * log_p).sum()
    unlikelihood = log_p.new_zeros(())
    if weights.unlikelihood:
        for row, candidates in enumerate(CANDIDATES[: len(targets)]):
            unlikelihood = unlikelihood - torch.log1p(-log_p[row].exp())[list(candidates)].sum()
    tilt = log_p.new_zeros(())
    if weights.tilt:
        strengths = TILT.strengths[: len(targets), None]
        log_target = F.log_softmax(reference_logits[:, :BASE] + strengths * TILT.scores, dim=-1)
        tilt = (log_target.exp() * (log_target - log_p)).sum()
    loss = (
        weights.lm * nll
        + weights.kl_reference_to_policy * kl_reference_to_policy
        + weights.kl_policy_to_reference * kl_policy_to_reference
        - weights.entropy * entropy
        + weights.unlikelihood * unlikelihood
        + weights.tilt * tilt
    )
    sums = [nll, kl_reference_to_policy, kl_policy_to_reference, entropy, unlikelihood, tilt]
    return loss, torch.stack(sums)


def test_both_divergences_equal_values_computed_by_hand():
    p, p0 = torch.tensor([[0.7, 0.2, 0.1]]), torch.tensor([[0.5, 0.25, 0.25]])
    found = token_statistics(
        logits_rows(p.log()), logits_rows(p0.log()), torch.tensor([1]), base_vocab_size=3
    )
    assert found.kl_policy_to_reference.item() == pytest.approx(0.0993, abs=5e-5)
    assert found.kl_reference_to_policy.item() == pytest.approx(0.1166, abs=5e-5)
    assert found.nll.item() == pytest.approx(-math.log(0.2), abs=1e-6)
    assert found.reference_nll.item() == pytest.approx(-math.log(0.25), abs=1e-6)
    by_hand = -(0.7 * math.log(0.7) + 0.2 * math.log(0.2) + 0.1 * math.log(0.1))
    assert found.entropy.item() == pytest.approx(by_hand, abs=1e-6)


def test_divergences_of_equal_distributions_are_zero():
    logits = torch.randn(5, BASE) * 4
    shifted = logits_rows(logits + 3.0)
    found = token_statistics(
        logits_rows(logits), shifted, torch.zeros(5, dtype=torch.long), base_vocab_size=BASE
    )
    assert found.kl_policy_to_reference.abs().max() < 1e-6
    assert found.kl_reference_to_policy.abs().max() < 1e-6


def test_columns_beyond_the_base_vocabulary_do_not_touch_what_is_compared():
    logits, reference = torch.randn(5, BASE + 3), torch.randn(5, BASE + 1)
    boosted = logits.clone()
    boosted[:, BASE:] = 50.0
    targets = torch.arange(5)
    plain = token_statistics(
        logits_rows(logits), logits_rows(reference), targets, base_vocab_size=BASE
    )
    same = token_statistics(
        logits_rows(boosted), logits_rows(reference), targets, base_vocab_size=BASE
    )
    for name in ("nll", "kl_reference_to_policy", "kl_policy_to_reference", "entropy"):
        assert torch.equal(getattr(plain, name), getattr(same, name))


WEIGHTS = [
    LossWeights(lm=0.3, kl_reference_to_policy=0.2, kl_policy_to_reference=0.0, entropy=0.0),
    LossWeights(lm=0.3, kl_reference_to_policy=0.0, kl_policy_to_reference=0.2, entropy=0.0),
    LossWeights(lm=0.3, kl_reference_to_policy=0.1, kl_policy_to_reference=0.2, entropy=0.4),
    LossWeights(lm=0.0, kl_reference_to_policy=0.0, kl_policy_to_reference=0.0, entropy=1.0),
    LossWeights(
        lm=0.3,
        kl_reference_to_policy=0.2,
        kl_policy_to_reference=0.0,
        entropy=0.0,
        unlikelihood=0.7,
    ),
    LossWeights(
        lm=0.3,
        kl_reference_to_policy=0.1,
        kl_policy_to_reference=0.2,
        entropy=0.4,
        unlikelihood=0.7,
    ),
    LossWeights(
        lm=0.0,
        kl_reference_to_policy=0.0,
        kl_policy_to_reference=0.0,
        entropy=0.0,
        tilt=0.6,
    ),
    LossWeights(
        lm=0.3,
        kl_reference_to_policy=0.1,
        kl_policy_to_reference=0.2,
        entropy=0.4,
        unlikelihood=0.7,
        tilt=0.6,
    ),
]


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("all_columns", [False, True])
@pytest.mark.parametrize("chunk_elements", [1, 3 * BASE, 1 << 20])
def test_chunked_loss_and_gradients_equal_the_naive_ones(weights, all_columns, chunk_elements):
    torch.manual_seed(0)
    head = nn.Linear(4, BASE + 2).double()
    rows = torch.randn(10, 4, dtype=torch.float64, requires_grad=True)
    reference = torch.randn(10, BASE + 1, dtype=torch.float64)
    targets = TARGETS

    loss, sums = weighted_loss(
        CompletionRows(rows=rows, head=head, parameters=tuple(head.parameters())),
        logits_rows(reference),
        targets,
        weights,
        base_vocab_size=BASE,
        lm_uses_all_columns=all_columns,
        earlier=EARLIER,
        tilt=TILT,
        chunk_elements=chunk_elements,
    )
    expected, expected_sums = specification(head(rows), reference, targets, weights, all_columns)
    assert torch.allclose(loss, expected, atol=1e-12)
    assert torch.allclose(sums, expected_sums, atol=1e-12)
    inputs = [rows, *head.parameters()]
    found = torch.autograd.grad(3.0 * loss, inputs)
    for gradient, other in zip(found, torch.autograd.grad(3.0 * expected, inputs), strict=True):
        assert torch.allclose(gradient, other, atol=1e-12)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_gradients_equal_finite_differences(weights):
    torch.manual_seed(1)
    head = nn.Linear(3, BASE + 2, bias=False).double()
    reference = torch.randn(4, BASE, dtype=torch.float64)
    targets = TARGETS[:4]

    def loss(rows, weight):
        policy = CompletionRows(rows=rows, head=lambda part: part @ weight.T, parameters=(weight,))
        return weighted_loss(
            policy,
            logits_rows(reference),
            targets,
            weights,
            base_vocab_size=BASE,
            earlier=EARLIER,
            tilt=TILT.part(slice(0, 4)),
            chunk_elements=2 * BASE,
        )[0]

    rows = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(loss, (rows, head.weight))


def test_loss_of_half_precision_logits_is_taken_in_float32():
    torch.manual_seed(0)
    logits = torch.randn(6, BASE, requires_grad=True)
    reference = torch.randn(6, BASE)
    targets = torch.arange(6)
    arguments = (logits_rows(reference), targets, WEIGHTS[0])
    full, _ = weighted_loss(logits_rows(logits), *arguments, base_vocab_size=BASE)
    low, sums = weighted_loss(logits_rows(logits.bfloat16()), *arguments, base_vocab_size=BASE)
    assert low.dtype == sums.dtype == torch.float32
    assert low.item() == pytest.approx(full.item(), rel=0.02)


def test_token_nll_equals_cross_entropy_over_the_base_vocabulary():
    logits, targets = torch.randn(9, BASE + 2), torch.randint(0, BASE, (9,))
    found = token_nll(logits_rows(logits), targets, base_vocab_size=BASE)
    assert torch.allclose(found, F.cross_entropy(logits[:, :BASE], targets, reduction="none"))
