"""Log-probabilities, exact divergences and their gradients over completion tokens, in chunks.

No [B, T, V] tensor is ever held: the vocabulary work runs over chunks of the M completion
positions, and the gradient with respect to each chunk is taken while its logits are at hand, so
that backward needs none of them. A chunk is the part that is multiplied with the head at once.
Chunks are large, because large products are fast. Within it, arithmetic on logits runs over blocks,
small enough to stay in a CPU's cache from one pass to the next. It is in float32 (float64 where the
logits are).

Shapes: M completion tokens, D hidden size, V all columns of a head, W columns that are compared (the
base vocabulary: no reward tokens, no columns beyond the tokenizer).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from quark.models.batch import EarlierTokens
from quark.models.causal import CompletionRows

CHUNK_ELEMENTS = 1 << 25
"""Logits per chunk (128 MiB in float32); up to three tensors of this size are alive."""
CPU_BLOCK_ELEMENTS = 1 << 19
"""Logits per block on a CPU (2 MiB in float32)."""
BLOCK_ELEMENTS = 1 << 23
"""Logits per block on other devices (32 MiB), where starting a kernel costs more than a pass through memory."""
_LEAST_REST = 1e-5
"""Lower limit of 1 - p in the unlikelihood, as in the published code: float32 knows no smaller one well."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenStatistics:
    """Per-token figures in nats, each [M], without gradient."""

    nll: Tensor
    """-log pi(y_t | r, x, y_<t) over the base vocabulary."""
    reference_nll: Tensor
    """-log p0(y_t | x, y_<t) over the base vocabulary."""
    kl_reference_to_policy: Tensor
    """KL(p0 || pi)."""
    kl_policy_to_reference: Tensor
    """KL(pi || p0)."""
    entropy: Tensor
    """H(pi)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LossWeights:
    """Factors of the terms, including the reduction."""

    lm: float | Tensor
    """One for all tokens, or float [M], one for each; a negative one makes the token less likely."""
    kl_reference_to_policy: float
    kl_policy_to_reference: float
    entropy: float
    """Positive rewards entropy: the term is subtracted from the loss."""
    unlikelihood: float = 0.0
    """Of -log(1 - p), summed over the tokens that came earlier in the sequence."""
    tilt: float = 0.0
    """Of KL(q || pi), where q is the tilted reference."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tilt:
    """A reference distribution tilted along one score per vocabulary entry: q proportional to p0 exp(strength score)."""

    scores: Tensor
    """float [W]"""
    strengths: Tensor
    """float [M], one for each completion token."""

    def part(self, rows: slice) -> Tilt:
        """Some of the positions."""
        return replace(self, strengths=self.strengths[rows])

    def log_probs(self, reference_logits: Tensor) -> Tensor:
        """[m, W] log q of as many positions, from the reference's logits [m, W]."""
        scores = self.scores.to(reference_logits)
        strengths = self.strengths.to(reference_logits).unsqueeze(1)
        return torch.log_softmax(reference_logits + strengths * scores, dim=-1)


def token_nll(model: CompletionRows, targets: Tensor, *, base_vocab_size: int) -> Tensor:
    """-log p(target) over the base vocabulary for each token: [M], in nats, without gradient."""
    parts = []
    with torch.no_grad():
        for part in _chunks(model.rows, base_vocab_size):
            logits, picked = model.head(model.rows[part]), targets[part].unsqueeze(1)
            for block in _blocks(logits):
                base = _accurate(logits[block, :base_vocab_size])
                parts.append(base.logsumexp(-1) - base.gather(1, picked[block]).squeeze(1))
    return torch.cat(parts)


def token_statistics(
    policy: CompletionRows, reference: CompletionRows, targets: Tensor, *, base_vocab_size: int
) -> TokenStatistics:
    """Exact per-token figures of policy against reference on ``targets`` [M], without gradient."""
    parts = []
    with torch.no_grad():
        for part in _chunks(policy.rows, base_vocab_size):
            logits, reference_logits = (m.head(m.rows[part]) for m in (policy, reference))
            picked = targets[part].unsqueeze(1)
            for block in _blocks(logits):
                terms = _Terms(
                    _accurate(logits[block, :base_vocab_size]),
                    _accurate(reference_logits[block, :base_vocab_size]),
                )
                parts.append(
                    torch.stack(
                        [
                            -terms.log_policy.gather(1, picked[block]).squeeze(1),
                            -terms.log_reference.gather(1, picked[block]).squeeze(1),
                            terms.kl_reference_to_policy,
                            terms.kl_policy_to_reference,
                            terms.entropy,
                        ]
                    )
                )
    nll, reference_nll, forward, backward, entropy = torch.cat(parts, dim=1)
    return TokenStatistics(
        nll=nll,
        reference_nll=reference_nll,
        kl_reference_to_policy=forward,
        kl_policy_to_reference=backward,
        entropy=entropy,
    )


def base_logits(
    models: Sequence[CompletionRows], *, base_vocab_size: int
) -> Iterator[tuple[slice, list[Tensor]]]:
    """Logits of several models at the same positions, part by part: which positions, and [m, W] of each model.

    Without gradient; in float32, or in float64 if the logits are.
    """
    with torch.no_grad():
        for part in _chunks(models[0].rows, base_vocab_size):
            whole = [model.head(model.rows[part]) for model in models]
            for block in _blocks(whole[0]):
                places = slice(part.start + block.start, part.start + block.stop)
                yield places, [_accurate(logits[block, :base_vocab_size]) for logits in whole]


def weighted_loss(
    policy: CompletionRows,
    reference: CompletionRows | None,
    targets: Tensor,
    weights: LossWeights,
    *,
    base_vocab_size: int,
    lm_uses_all_columns: bool = False,
    earlier: EarlierTokens | None = None,
    tilt: Tilt | None = None,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> tuple[Tensor, Tensor]:
    """The weighted sum of the terms over all tokens, differentiable in the policy.

    Args:
        policy: rows of the policy.
        reference: rows of the reference; never differentiated. None leaves the KL terms out.
        targets: int64 [M].
        weights: factor of each term.
        base_vocab_size: number W of leading columns that are compared.
        lm_uses_all_columns: take the -log pi term over all V columns of the policy's head instead of W.
        earlier: tokens of which the unlikelihood is taken; needed, with a reference, if its weight is not 0.
        tilt: how the reference is tilted; needed, with a reference, if the weight of this term is not 0.
        chunk_elements: logits per chunk.

    Returns:
        The scalar loss, and the unweighted sums [6] without gradient: -log pi, KL(p0 || pi),
        KL(pi || p0), H(pi), and the unlikelihood and KL(q || pi), which are 0 if their weights are. Without a
        reference, all but the first are 0.
    """
    job = _Job(
        policy=policy,
        reference=reference,
        targets=targets,
        weights=weights,
        base_vocab_size=base_vocab_size,
        lm_uses_all_columns=lm_uses_all_columns,
        earlier=earlier,
        tilt=tilt,
        chunk_elements=chunk_elements,
    )
    loss, sums = _WeightedLoss.apply(job, policy.rows, *policy.parameters)
    return loss, sums


class _Terms:
    """The exact figures of one chunk from its base logits [m, W] of policy and reference."""

    def __init__(self, policy_logits: Tensor, reference_logits: Tensor) -> None:
        self.log_policy = torch.log_softmax(policy_logits, dim=-1)
        self.log_reference = torch.log_softmax(reference_logits, dim=-1)
        self.policy = self.log_policy.exp()
        self.reference = self.log_reference.exp()
        self.log_ratio = self.log_policy - self.log_reference
        # Autocast would take these products in half precision.
        with torch.autocast(policy_logits.device.type, enabled=False):
            self.kl_policy_to_reference = torch.linalg.vecdot(self.policy, self.log_ratio)
            self.kl_reference_to_policy = -torch.linalg.vecdot(self.reference, self.log_ratio)
            self.entropy = -torch.linalg.vecdot(self.policy, self.log_policy)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    policy: CompletionRows
    reference: CompletionRows | None
    targets: Tensor
    weights: LossWeights
    base_vocab_size: int
    lm_uses_all_columns: bool
    earlier: EarlierTokens | None
    tilt: Tilt | None
    chunk_elements: int


class _WeightedLoss(torch.autograd.Function):
    """Takes the gradient during forward, chunk by chunk; backward only scales it."""

    @staticmethod
    def forward(ctx: Any, job: _Job, rows: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ANN401 - torch's context has no type
        needs_gradient = any(ctx.needs_input_grad)
        row_gradient = torch.empty_like(rows) if needs_gradient else None
        gradients: list[Tensor] = []
        total = rows.new_zeros(7, dtype=_accurate_dtype(rows.dtype))
        for part in _chunks(rows, job.base_vocab_size, job.chunk_elements):
            chunk = rows[part].detach().requires_grad_(needs_gradient)
            with torch.set_grad_enabled(needs_gradient):
                logits = job.policy.head(chunk)
            gradient = torch.empty_like(logits) if needs_gradient else None
            if job.reference is None:
                total += _chunk_nll(logits.detach(), gradient, part, job)
            else:
                with torch.no_grad():
                    reference_logits = job.reference.head(job.reference.rows[part])
                total += _chunk_loss(logits.detach(), reference_logits, gradient, part, job)
            if row_gradient is not None:
                row_gradient[part], *addends = torch.autograd.grad(
                    logits, [chunk, *parameters], gradient
                )
                if not gradients:
                    gradients = [_accurate(addend) for addend in addends]
                else:
                    for accumulated, addend in zip(gradients, addends, strict=True):
                        accumulated += addend
        weights = job.weights
        per_token = isinstance(weights.lm, Tensor)
        factors = total.new_tensor(
            [
                0.0 if per_token else weights.lm,
                weights.kl_reference_to_policy,
                weights.kl_policy_to_reference,
                -weights.entropy,
                weights.unlikelihood,
                weights.tilt,
                1.0 if per_token else 0.0,
            ]
        )
        if row_gradient is not None:
            ctx.save_for_backward(
                row_gradient, *(g.to(p.dtype) for g, p in zip(gradients, parameters, strict=True))
            )
        ctx.mark_non_differentiable(total)
        return (total * factors).sum(), total[:6]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401 - torch's context has no type
        factor = gradients[0]
        return (None, *((saved * factor).to(saved.dtype) for saved in ctx.saved_tensors))


def _chunk_loss(
    logits: Tensor, reference_logits: Tensor, gradient: Tensor | None, part: slice, job: _Job
) -> Tensor:
    """Sums [7] of one chunk; fills ``gradient`` of its weighted loss with respect to ``logits`` [m, V].

    The sums are those of the six terms and, where every token has a weight of its own, of weight times -log p_y.
    With p, p0 the two distributions over the base vocabulary, z the policy's logits and y the target:
    d(-log p_y)/dz = p - 1_y; dKL(p0||p)/dz = p - p0; dKL(p||p0)/dz = p (log p - log p0 - KL);
    dH/dz = -p (log p + H). Over all columns, with s the base vocabulary's share of the probability,
    -log p_y - log s takes the place of -log p_y: its gradient is s p - 1_y there. With C the earlier tokens and
    o_c = p_c / (1 - p_c) the odds of one, the unlikelihood is sum_C -log(1 - p_c); its gradient is o_c on C, and
    minus p times the sum of these everywhere. With q the tilted reference, dKL(q||p)/dz = p - q.
    """
    weights, width = job.weights, job.base_vocab_size
    targets = job.targets[part].unsqueeze(1)
    sums = []
    for block in _blocks(logits):
        whole, picked = _accurate(logits[block]), targets[block]
        base = whole[:, :width]
        terms = _Terms(base, _accurate(reference_logits[block, :width]))
        nll = -terms.log_policy.gather(1, picked)
        weight = _token_weights(weights.lm, part, block)
        lm = weight
        if job.lm_uses_all_columns and whole.shape[1] > width:
            log_sum = base.gather(1, picked) + nll
            log_share = -F.softplus(whole[:, width:].logsumexp(-1, keepdim=True) - log_sum)
            nll = nll - log_share
            lm = weight * log_share.exp()
        push: Tensor | None = None
        unlikelihood = nll.new_zeros(())
        if weights.unlikelihood:
            unlikelihood, push = _unlikelihood(terms, picked, part, block, job)
        target: Tensor | None = None
        tilt_loss = nll.new_zeros(())
        if weights.tilt:
            assert job.tilt is not None, "a weighted tilt needs its scores"
            log_target = (
                job.tilt.part(part)
                .part(block)
                .log_probs(_accurate(reference_logits[block, :width]))
            )
            target = log_target.exp()
            with torch.autocast(logits.device.type, enabled=False):
                tilt_loss = torch.linalg.vecdot(target, log_target - terms.log_policy).sum()
        sums.append(
            torch.stack(
                [
                    nll.sum(),
                    terms.kl_reference_to_policy.sum(),
                    terms.kl_policy_to_reference.sum(),
                    terms.entropy.sum(),
                    unlikelihood,
                    tilt_loss,
                    _weighted_sum(nll, weight),
                ]
            )
        )
        if gradient is None:
            continue
        if weights.kl_policy_to_reference or weights.entropy:
            factor = terms.log_ratio.sub_(terms.kl_policy_to_reference.unsqueeze(1))
            factor.mul_(weights.kl_policy_to_reference)
            if weights.entropy:
                factor.add_(
                    terms.log_policy.add_(terms.entropy.unsqueeze(1)), alpha=weights.entropy
                )
            result = factor.add_(lm + weights.kl_reference_to_policy + weights.tilt).mul_(
                terms.policy
            )
        else:
            result = terms.policy.mul_(lm + weights.kl_reference_to_policy + weights.tilt)
        if weights.kl_reference_to_policy:
            result.sub_(terms.reference, alpha=weights.kl_reference_to_policy)
        if target is not None:
            result.sub_(target, alpha=weights.tilt)
        result.scatter_add_(1, picked, torch.zeros_like(nll) - weight)
        if push is not None:
            result.add_(push, alpha=weights.unlikelihood)
        gradient[block, :width] = result
        if job.lm_uses_all_columns and whole.shape[1] > width:
            gradient[block, width:] = weight * (whole[:, width:] - (log_sum - log_share)).exp()
        else:
            gradient[block, width:] = 0.0
    return torch.stack(sums).sum(0)


def _unlikelihood(
    terms: _Terms, picked: Tensor, part: slice, block: slice, job: _Job
) -> tuple[Tensor, Tensor]:
    """The sum of -log(1 - p) of a block's earlier tokens, and its gradient [m, W] with respect to the logits."""
    assert job.earlier is not None, "a weighted unlikelihood needs the earlier tokens"
    places = slice(part.start + block.start, part.start + block.stop)
    width = job.base_vocab_size
    is_earlier = job.earlier.other_than(picked.squeeze(1), places, width)
    rest = (-torch.expm1(terms.log_policy)).clamp_(min=_LEAST_REST)
    odds = (terms.policy / rest).mul_(is_earlier)
    loss = -(rest.log_().mul_(is_earlier)).sum()
    return loss, odds.sub_(terms.policy * odds.sum(-1, keepdim=True))


def _chunk_nll(logits: Tensor, gradient: Tensor | None, part: slice, job: _Job) -> Tensor:
    """As ``_chunk_loss`` for the likelihood over the base vocabulary alone."""
    width, targets = job.base_vocab_size, job.targets[part].unsqueeze(1)
    sums = []
    for block in _blocks(logits):
        log_policy = torch.log_softmax(_accurate(logits[block, :width]), dim=-1)
        picked = targets[block]
        nll = -log_policy.gather(1, picked)
        weight = _token_weights(job.weights.lm, part, block)
        total = nll.sum()
        zero = torch.zeros_like(total)
        sums.append(torch.stack([total, zero, zero, zero, zero, zero, _weighted_sum(nll, weight)]))
        if gradient is not None:
            result = log_policy.exp_().mul_(weight)
            result.scatter_add_(1, picked, torch.zeros_like(nll) - weight)
            gradient[block, :width] = result
            gradient[block, width:] = 0.0
    return torch.stack(sums).sum(0)


def _token_weights(weights: float | Tensor, part: slice, block: slice) -> float | Tensor:
    """Those of a block, as a column [m, 1] where every token has its own."""
    return weights[part][block].unsqueeze(1) if isinstance(weights, Tensor) else weights


def _weighted_sum(nll: Tensor, weight: float | Tensor) -> Tensor:
    """Of weights times ``nll`` where every token has its own; else 0, since the sum says the same."""
    return (nll * weight).sum() if isinstance(weight, Tensor) else torch.zeros_like(nll.sum())


def _chunks(rows: Tensor, width: int, chunk_elements: int = CHUNK_ELEMENTS) -> list[slice]:
    """As few slices of the rows as have at most ``chunk_elements`` logits each, of like size."""
    most = max(1, chunk_elements // width)
    num_chunks = max(1, math.ceil(len(rows) / most))
    bounds = [len(rows) * i // num_chunks for i in range(num_chunks + 1)]
    return [slice(begin, end) for begin, end in itertools.pairwise(bounds)]


def _blocks(logits: Tensor) -> list[slice]:
    is_cpu = logits.device.type == "cpu"
    return _chunks(logits, logits.shape[1], CPU_BLOCK_ELEMENTS if is_cpu else BLOCK_ELEMENTS)


def _accurate(values: Tensor) -> Tensor:
    return values.to(_accurate_dtype(values.dtype))


def _accurate_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
