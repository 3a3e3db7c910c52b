"""Before anything is learned: the reward tokens' vectors move together to where a token costs least.

A new first token disturbs a pre-trained model before it means anything. Where prompts have no token of their own to begin
with, the first position is the one that all others attend to. The remedy needs no labels: a shift, the same for all
tokens, that minimizes the KL to the original model on texts that this model wrote. The weights stay as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from quark.models.batch import TrainingBatch
from quark.models.logprobs import LossWeights, weighted_loss
from quark.models.policy import Policy
from quark.reference.base import ReferencePolicy


def settle_reward_tokens(
    policy: Policy,
    reference: ReferencePolicy,
    batches: Sequence[TrainingBatch],
    *,
    rate: float,
    micro_batches: Callable[[TrainingBatch], Iterable[TrainingBatch]],
    autocast: Callable[[], AbstractContextManager[object]],
) -> list[float]:
    """Shift the reward tokens' input vectors in place, one step of Adam for each batch.

    Args:
        policy: its reward tokens' vectors change, nothing else.
        reference: p0.
        batches: samples of p0, each under some token.
        rate: of the first step, in root mean squares of the vocabulary's vectors; it falls to 0 as a cosine does.
        micro_batches: divides a batch for one pass each.
        autocast: the context for forward passes.

    Returns:
        KL(p0 || pi) of each batch before its step, in nats a token.
    """
    matrix, rows = policy.reward_matrix
    start = matrix.detach()[rows].float().clone()
    scale = policy.model.get_input_embeddings().weight.detach().float().square().mean().sqrt()
    shift = torch.zeros_like(start[0], requires_grad=True)
    optimizer = torch.optim.Adam([shift], lr=rate * float(scale), betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 * (1.0 + math.cos(math.pi * step / len(batches)))
    )
    costs = []
    for batch in batches:
        gradient = torch.zeros_like(start)
        cost = 0.0
        weights = LossWeights(
            lm=0.0,
            kl_reference_to_policy=1.0 / batch.num_tokens,
            kl_policy_to_reference=0.0,
            entropy=0.0,
        )
        for part in micro_batches(batch):
            with autocast():
                loss, _ = weighted_loss(
                    policy.completion_rows(part),
                    reference.completion_rows(part),
                    part.targets,
                    weights,
                    base_vocab_size=policy.reward_tokens.base_vocab_size,
                )
            (found,) = torch.autograd.grad(loss, [matrix])
            gradient += found[rows].float()
            cost += float(loss.detach())
        costs.append(cost)
        if not math.isfinite(cost):
            continue
        shift.grad = gradient.sum(0)
        optimizer.step()
        schedule.step()
        _write(matrix, rows, start + shift.detach())
    return costs


@torch.no_grad()
def _write(matrix: Tensor, rows: slice, values: Tensor) -> None:
    matrix[rows] = values.to(matrix)
