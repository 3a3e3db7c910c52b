"""The positions of a model's tokens, and the position of the reward token before the prompt."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from quark.models.causal import attention_for

_NUM_TRIED = 4
"""Positions that are tested."""
_LEAST_EFFECT = 0.02
"""Threshold in standard deviations of the logits: rounding changes them less, a position more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AbsolutePositions:
    """How a model with absolute positions represents them."""

    table: nn.Embedding | None
    """The learned vectors, one for each position. None if positions are computed, or the table
    cannot be extended."""
    offset: int
    """The row of position 0."""


def absolute_positions(model: PreTrainedModel) -> AbsolutePositions | None:
    """How ``model`` tells positions apart.

    None if only distances count, or if it takes no position ids. Determined by a test, not by name:
    a single token attends to itself alone, so its logits at different positions differ only where
    positions are absolute. The gradient shows which table's rows these positions read.
    """
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return None
    limit = getattr(model.config, "max_position_embeddings", None)
    num_tried = _NUM_TRIED if limit is None else min(_NUM_TRIED, limit)
    positions = torch.arange(num_tried, device=model.device).unsqueeze(1)
    was_training = model.training
    model.eval()
    try:
        with torch.enable_grad(), attention_for(model.device, 1):
            logits = model(
                input_ids=torch.zeros_like(positions),
                attention_mask=torch.ones_like(positions),
                position_ids=positions,
                use_cache=False,
            ).logits.float()
    finally:
        model.train(was_training)
    effect = (logits - logits[:1]).detach().abs().max()
    if effect <= _LEAST_EFFECT * logits.detach().std():
        return None
    words = model.get_input_embeddings()
    tables = [
        module
        for module in model.modules()
        if isinstance(module, nn.Embedding) and module is not words and module.weight.requires_grad
    ]
    if tables:
        weights = [table.weight for table in tables]
        gradients = torch.autograd.grad(logits.square().sum(), weights, allow_unused=True)
        for table, gradient in zip(tables, gradients, strict=True):
            rows = [] if gradient is None else _rows_read(gradient)
            if rows and rows == list(range(rows[0], rows[0] + num_tried)):
                # A model that is loaded again makes its table from the configuration alone.
                is_growable = table.num_embeddings - rows[0] == limit
                return AbsolutePositions(table=table if is_growable else None, offset=rows[0])
    return AbsolutePositions(table=None, offset=0)


def give_reward_token_its_own_position(model: PreTrainedModel) -> bool:
    """Let the reward token take position 0 and the prompt begin at position 1; False if that is not needed.

    A table of learned positions gets one more row, a copy of its first. The prompt then begins with
    the vector that position 0 had, so prompt and completion stand where the original model has
    them, and the token does not shorten the context. Positions that are computed stay as they are:
    there the original model has to begin at position 1 as well (``original_leading_positions``).
    Plain ``generate`` on the saved model does the same.
    """
    found = absolute_positions(model)
    if found is None:
        return False
    if found.table is not None:
        _grow(model, found.table, found.offset)
    return True


def original_leading_positions(model: PreTrainedModel) -> int:
    """The position at which the original ``model`` begins beside a policy that has a place for the reward token."""
    found = absolute_positions(model)
    return int(found is not None and found.table is None)


def _rows_read(gradient: Tensor) -> list[int]:
    rows: list[int] = gradient.abs().sum(-1).nonzero().flatten().tolist()
    return rows


def _grow(model: PreTrainedModel, table: nn.Embedding, first: int) -> None:
    """Add a copy of row ``first`` before it, and keep what is as long as the table in step."""
    old = model.config.max_position_embeddings
    weight = table.weight.detach()
    grown = torch.cat([weight[: first + 1], weight[first:]]).contiguous()
    table.weight = nn.Parameter(grown, requires_grad=table.weight.requires_grad)
    table.num_embeddings += 1
    model.config.max_position_embeddings = old + 1
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            # GPT-Neo and OpenAI GPT keep their causal masks, which depend on the distance alone.
            if buffer.shape[-2:] == (old, old) and torch.equal(buffer, buffer.tril()):
                mask = buffer.new_zeros(*buffer.shape[:-2], old + 1, old + 1)
                mask[..., :-1, :-1] = buffer
                mask[..., 1:, 1:] = buffer
                mask[..., -1, 0] = buffer[..., -1, 0]
                module.register_buffer(name, mask, persistent=False)
