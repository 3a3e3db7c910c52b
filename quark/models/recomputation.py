"""Gradient checkpointing: backward computes a layer again instead of keeping what it computed.

The library's own switch works only in training mode, where dropout is on. quark's version does not
change the mode.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from quark.errors import ModelError
from quark.models.causal import attention_for


def recompute_layers(model: PreTrainedModel) -> None:
    """Let backward recompute ``model``'s layers, in place; losses and gradients stay the same bits.

    Raises:
        ModelError: the architecture does not mark its layers.
    """
    layers = [
        module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)
    ]
    if not layers:
        raise ModelError(
            f"model.gradient_checkpointing: {type(model).__name__} does not mark its layers for it"
        )
    for layer in layers:
        # An instance's forward stands before its class's.
        layer.forward = _recomputed(layer.forward)


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(hidden: torch.Tensor, *arguments: Any, **named: Any) -> Any:  # noqa: ANN401 - what layers take and give
        # Recomputed after the forward pass has ended, so the kernel is to be chosen in here again.
        with attention_for(hidden.device, hidden.shape[1]):
            return forward(hidden, *arguments, **named)

    def checkpointed(hidden: torch.Tensor, *arguments: Any, **named: Any) -> Any:  # noqa: ANN401 - as above
        if not torch.is_grad_enabled():
            return forward(hidden, *arguments, **named)
        return checkpoint(run, hidden, *arguments, use_reentrant=False, **named)

    return checkpointed
