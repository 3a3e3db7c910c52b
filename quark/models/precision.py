"""Half-precision copies of projection weights, for forward passes under autocast.

Autocast converts a projection's weight each time it is used. Only weights that are being differentiated
are kept converted between two uses, so a frozen reference, or a policy that samples, converts all its
weights again for every forward pass: a third of the time on a CPU. Converting them once gives the same
numbers, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D


def convert_projections(model: nn.Module, dtype: torch.dtype) -> None:
    """Store the weights of ``model``'s linear layers in ``dtype``, permanently; tied ones stay tied.

    A frozen model then runs only under an autocast of that dtype, where its results do not change, and
    its projections take half the memory.
    """
    for module, weight in _converted(model, dtype).items():
        module.weight = weight


@contextmanager
def projections_for_autocast(model: nn.Module) -> Iterator[None]:
    """Within: linear layers hold weights in the autocast's dtype; without autocast, nothing changes.

    For forward passes without gradient. The weights themselves are not touched.
    """
    device = next(model.parameters()).device.type
    if not torch.is_autocast_enabled(device):
        yield
        return
    converted = _converted(model, torch.get_autocast_dtype(device))
    originals = [(module, module.weight) for module in converted]
    try:
        for module, weight in converted.items():
            module.weight = weight
        yield
    finally:
        for module, original in originals:
            module.weight = original


def is_projection(module: nn.Module) -> bool:
    """Whether autocast converts this module's weight: a linear layer, GPT-2's included."""
    return type(module) in (nn.Linear, Conv1D)


def _converted(model: nn.Module, dtype: torch.dtype) -> dict[nn.Module, nn.Parameter]:
    """New weights of the linear layers; a weight that several share is converted once."""
    shared: dict[int, nn.Parameter] = {}
    converted: dict[nn.Module, nn.Parameter] = {}
    for module in model.modules():
        if not is_projection(module):
            continue
        weight = module.get_parameter("weight")
        if weight.is_floating_point():
            key = id(weight)
            if key not in shared:
                shared[key] = nn.Parameter(weight.detach().to(dtype), requires_grad=False)
            converted[module] = shared[key]
    return converted
