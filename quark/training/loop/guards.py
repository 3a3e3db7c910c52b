"""What keeps a bad step from spoiling a run: numbers that are not finite.

A step whose loss or gradient is not finite is skipped before the optimizer sees it, and no checkpoint is
made of weights that are not finite.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from quark.errors import TrainingError
from quark.training.position import Position


def count_skipped_step(
    position: Position, *, loss: float, grad_norm: float, max_skipped_steps: int
) -> str:
    """Count a step whose loss or gradient is not finite; returns what to tell about it.

    Raises:
        TrainingError: it is one too many in a row.
    """
    position.skipped_steps += 1
    position.skipped_in_a_row += 1
    if position.skipped_in_a_row > max_skipped_steps:
        raise TrainingError(
            f"{position.skipped_in_a_row} steps in a row had a loss or gradient that is not finite "
            f"(the last: loss {loss}, gradient norm {grad_norm}). To resume from the last checkpoint and "
            "tolerate more such steps, raise optimizer.max_skipped_steps. A different "
            "optimizer.learning_rate requires a new run"
        )
    return f"step {position.step} is skipped: loss {loss}, gradient norm {grad_norm}"


def is_finite_step(loss: float, grad_norm: float) -> bool:
    """Whether a step may reach the optimizer."""
    return math.isfinite(loss) and math.isfinite(grad_norm)


def require_finite(tensors: Mapping[str, Tensor], *, step: int) -> None:
    """Refuse to keep weights or moments that are not finite.

    Raises:
        TrainingError: names the first such tensor.
    """
    for name, value in tensors.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise TrainingError(
                f"{name} is not finite after step {step}: no checkpoint is made of it. The last "
                "checkpoint is good; start another run with a lower optimizer.learning_rate"
            )
