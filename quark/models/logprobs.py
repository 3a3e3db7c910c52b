"""Log-probabilities, exact divergences and their gradients over completion tokens, in chunks.

No [B, T, V] tensor is ever held: the vocabulary work runs over chunks of the M completion positions,
and the gradient with respect to each chunk is taken while its logits are at hand, so that backward needs
none of them. Arithmetic on logits is in float32 (float64 where the logits are).

Shapes: M completion tokens, D hidden size, V all columns of a head, W columns that are compared (the
base vocabulary: no reward tokens, no columns beyond the tokenizer).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quark.models.causal import CompletionRows

CHUNK_ELEMENTS = 1 << 24
"""Logits per chunk (64 MiB in float32)."""


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
    """Factors of the four terms, the reduction included."""

    lm: float
    kl_reference_to_policy: float
    kl_policy_to_reference: float
    entropy: float
    """Positive rewards entropy: the term is subtracted from the loss."""


def token_nll(model: CompletionRows, targets: Tensor, *, base_vocab_size: int) -> Tensor:
    """-log p(target) over the base vocabulary for each token: [M], in nats, without gradient."""
    parts = []
    with torch.no_grad():
        for part in _chunks(model.rows, base_vocab_size):
            logits = _base_logits(model, part, base_vocab_size)
            picked = logits.gather(1, targets[part].unsqueeze(1)).squeeze(1)
            parts.append(logits.logsumexp(-1) - picked)
    return torch.cat(parts)


def token_statistics(
    policy: CompletionRows, reference: CompletionRows, targets: Tensor, *, base_vocab_size: int
) -> TokenStatistics:
    """Exact per-token figures of policy against reference on ``targets`` [M], without gradient."""
    parts = []
    with torch.no_grad():
        for part in _chunks(policy.rows, base_vocab_size):
            policy_logits = _base_logits(policy, part, base_vocab_size)
            reference_logits = _base_logits(reference, part, base_vocab_size)
            terms = _Terms(policy_logits, reference_logits)
            picked = targets[part].unsqueeze(1)
            parts.append(
                torch.stack(
                    [
                        -terms.log_policy.gather(1, picked).squeeze(1),
                        -terms.log_reference.gather(1, picked).squeeze(1),
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


def weighted_loss(
    policy: CompletionRows,
    reference: CompletionRows,
    targets: Tensor,
    weights: LossWeights,
    *,
    base_vocab_size: int,
    lm_uses_all_columns: bool = False,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> tuple[Tensor, Tensor]:
    """The weighted sum of the four terms over all tokens, differentiable in the policy.

    Args:
        policy: rows of the policy.
        reference: rows of the reference; never differentiated.
        targets: int64 [M].
        weights: factor of each term.
        base_vocab_size: number W of leading columns that are compared.
        lm_uses_all_columns: take the -log pi term over all V columns of the policy's head instead of W.
        chunk_elements: logits per chunk.

    Returns:
        The scalar loss, and the unweighted sums [4] without gradient: -log pi, KL(p0 || pi),
        KL(pi || p0), H(pi).
    """
    job = _Job(
        policy=policy,
        reference=reference,
        targets=targets,
        weights=weights,
        base_vocab_size=base_vocab_size,
        lm_uses_all_columns=lm_uses_all_columns,
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
    reference: CompletionRows
    targets: Tensor
    weights: LossWeights
    base_vocab_size: int
    lm_uses_all_columns: bool
    chunk_elements: int


class _WeightedLoss(torch.autograd.Function):
    """Takes the gradient during forward, chunk by chunk; backward only scales it."""

    @staticmethod
    def forward(ctx: Any, job: _Job, rows: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ANN401 - torch's context has no type
        needs_gradient = any(ctx.needs_input_grad)
        row_gradient = torch.empty_like(rows) if needs_gradient else None
        gradients = [torch.zeros_like(p, dtype=_accurate(p.dtype)) for p in parameters]
        total = torch.zeros(4, dtype=_accurate(rows.dtype), device=rows.device)
        for part in _chunks(rows, job.base_vocab_size, job.chunk_elements):
            chunk = rows[part].detach().requires_grad_(needs_gradient)
            with torch.set_grad_enabled(needs_gradient):
                logits = job.policy.head(chunk)
            reference_logits = _base_logits(job.reference, part, job.base_vocab_size)
            sums, gradient = _chunk_loss(logits.detach(), reference_logits, part, job)
            total += sums
            if row_gradient is not None:
                row_part, *parameter_parts = torch.autograd.grad(
                    logits, [chunk, *parameters], gradient.to(logits.dtype)
                )
                row_gradient[part] = row_part
                for accumulated, addend in zip(gradients, parameter_parts, strict=True):
                    accumulated += addend
        weights = job.weights
        factors = total.new_tensor(
            [
                weights.lm,
                weights.kl_reference_to_policy,
                weights.kl_policy_to_reference,
                -weights.entropy,
            ]
        )
        if row_gradient is not None:
            ctx.save_for_backward(
                row_gradient, *(g.to(p.dtype) for g, p in zip(gradients, parameters, strict=True))
            )
        ctx.mark_non_differentiable(total)
        return (total * factors).sum(), total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401 - torch's context has no type
        factor = gradients[0]
        return (None, *((saved * factor).to(saved.dtype) for saved in ctx.saved_tensors))


def _chunk_loss(
    logits: Tensor, reference_logits: Tensor, part: slice, job: _Job
) -> tuple[Tensor, Tensor]:
    """Sums [4] of one chunk and the gradient of its weighted loss with respect to ``logits`` [m, V].

    With p, p0 the two distributions over the base vocabulary, z the policy's logits and y the target:
    d(-log p_y)/dz = p - 1_y; dKL(p0||p)/dz = p - p0; dKL(p||p0)/dz = p (log p - log p0 - KL);
    dH/dz = -p (log p + H).
    """
    weights, width = job.weights, job.base_vocab_size
    logits = logits.to(_accurate(logits.dtype))
    targets = job.targets[part].unsqueeze(1)
    terms = _Terms(logits[:, :width], reference_logits)
    if job.lm_uses_all_columns:
        log_all = torch.log_softmax(logits, dim=-1)
        nll = -log_all.gather(1, targets)
    else:
        nll = -terms.log_policy.gather(1, targets)

    factor = weights.kl_reference_to_policy + (0.0 if job.lm_uses_all_columns else weights.lm)
    gradient = terms.policy * factor
    if weights.kl_reference_to_policy:
        gradient.sub_(terms.reference, alpha=weights.kl_reference_to_policy)
    if weights.kl_policy_to_reference:
        centred = terms.log_ratio - terms.kl_policy_to_reference.unsqueeze(1)
        gradient.addcmul_(terms.policy, centred, value=weights.kl_policy_to_reference)
    if weights.entropy:
        centred = terms.log_policy + terms.entropy.unsqueeze(1)
        gradient.addcmul_(terms.policy, centred, value=weights.entropy)
    if logits.shape[1] > width:
        gradient = torch.nn.functional.pad(gradient, (0, logits.shape[1] - width))
    if job.lm_uses_all_columns:
        gradient.add_(log_all.exp(), alpha=weights.lm)
    gradient[torch.arange(len(targets), device=targets.device), targets.squeeze(1)] -= weights.lm

    sums = torch.stack(
        [
            nll.sum(),
            terms.kl_reference_to_policy.sum(),
            terms.kl_policy_to_reference.sum(),
            terms.entropy.sum(),
        ]
    )
    return sums, gradient


def _base_logits(model: CompletionRows, part: slice, base_vocab_size: int) -> Tensor:
    """Base logits [m, W] of one chunk, without gradient."""
    with torch.no_grad():
        logits = model.head(model.rows[part])[:, :base_vocab_size]
    return logits.to(_accurate(logits.dtype))


def _chunks(rows: Tensor, width: int, chunk_elements: int = CHUNK_ELEMENTS) -> list[slice]:
    step = max(1, chunk_elements // width)
    return [slice(i, min(i + step, len(rows))) for i in range(0, len(rows), step)]


def _accurate(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
