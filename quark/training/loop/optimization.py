"""AdamW, its schedule, and its state as plain tensors."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from quark.config.schema import OptimizerSection
from quark.models.lora import RewardTokenEmbedding
from quark.training.processes.shards import copy_full

_FUSED = ("cpu", "cuda", "mps", "xpu")
"""Kinds of devices that have a fused AdamW."""


def make_optimizer(model: nn.Module, config: OptimizerSection) -> torch.optim.AdamW:
    """AdamW over the model's trainable parameters; the weight decay is for those that ``decays`` names."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    has_fused = all(p.device.type in _FUSED for p in parameters)
    is_fused = config.implementation == "fused" or (config.implementation == "auto" and has_fused)
    decayed = decays(model)
    groups = [
        {"params": [p for p in parameters if p in decayed], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p not in decayed], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]] or groups[:1],
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.eps,
        fused=is_fused,
        foreach=not is_fused,
    )


def decays(model: nn.Module) -> set[nn.Parameter]:
    """The trainable matrices that are no embeddings: biases, norms and embeddings are never decayed.

    A head that is tied to the embedding is the embedding. Adapters are matrices.
    """
    embedded = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.Embedding | RewardTokenEmbedding)
        for parameter in module.parameters()
    }
    return {
        parameter
        for parameter in model.parameters()
        if parameter.requires_grad and parameter.ndim >= 2 and id(parameter) not in embedded
    }


def learning_rate(config: OptimizerSection, step: int, num_steps: int) -> float:
    """Learning rate of optimizer step ``step`` (from 0) of ``num_steps``.

    Linear from 0 over ``warmup_steps``, then constant, or down to 0 at ``num_steps``.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(num_steps - config.warmup_steps, 1)
    match config.schedule:
        case "constant":
            factor = 1.0
        case "linear":
            factor = 1.0 - progress
        case "cosine":
            factor = 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.learning_rate * max(factor, 0.0)


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The moments and step counts themselves, named ``<parameter>/<moment>``."""
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    return {
        f"{names[parameter]}/{key}": value
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, model: nn.Module, tensors: dict[str, Tensor]
) -> None:
    """Put the state back whose tensors, whole, are named as by ``optimizer_tensors``."""
    parameters = dict(model.named_parameters())
    for name, value in tensors.items():
        parameter_name, _, key = name.rpartition("/")
        parameter = parameters[parameter_name]
        if value.shape == parameter.shape:
            moment = torch.zeros_like(parameter, dtype=value.dtype)
            copy_full(moment, value)
        else:
            moment = value.to(parameter.device).clone()
        optimizer.state[parameter][key] = moment
