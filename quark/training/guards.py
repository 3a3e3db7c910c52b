"""What keeps a bad step from spoiling a run: numbers that are not finite, and memory that does not suffice.

A step whose loss or gradient is not finite is skipped before the optimizer sees it, and no checkpoint is
made of weights that are not finite. A step that runs out of memory is run again, the same samples in
smaller parts: the parts' losses add up to the batch's, so the step is the same but for rounding.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

from quark.errors import TrainingError
from quark.training.position import Position

_Result = TypeVar("_Result")

_OUT_OF_MEMORY = (
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)
"""What torch says where it has no exception of its own for it: on the CPU, on MPS, and in cuBLAS."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that the device or the host has no memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and any(sign in text for sign in _OUT_OF_MEMORY)


def run_within_memory(
    attempt: Callable[[int], _Result],
    size: int,
    *,
    on_smaller: Callable[[int, str], None],
    agree: Callable[[str | None], str | None] = lambda reason: reason,
) -> tuple[_Result, int]:
    """The result of ``attempt(size)``, or of half the size, a quarter ... where memory runs out.

    Args:
        attempt: given the number of sequences to run at once; begins from nothing at every call.
        size: sequences to try first, at least 1.
        on_smaller: told the size that is tried next and what the last attempt said.
        agree: given what ran out of memory here, or None; returns what did in any process of the run.

    Returns:
        The result and the size that sufficed.

    Raises:
        TrainingError: not even one sequence fits.
    """
    while True:
        try:
            result = [attempt(size)]
            reason = None
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            result, reason = [], str(error).strip().partition("\n")[0]
        # Outside the handler: the traceback of the failed attempt would keep its tensors alive.
        reason = agree(reason)
        if reason is None:
            return result[0], size
        result.clear()
        _release_memory()
        if size == 1:
            raise TrainingError(
                f"there is not enough memory to train on a single sequence ({reason}). The last checkpoint "
                "is good; free memory and run the same command, or start a run with a smaller "
                "sampling.max_new_tokens, prompts.max_tokens or model"
            )
        size //= 2
        on_smaller(size, reason)


@contextmanager
def memory_needed_for(work: str, *, setting: str) -> Iterator[None]:
    """Say what ran out of memory and which setting asks for less, where nothing can be redone in parts.

    Raises:
        TrainingError: memory ran out inside.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).strip().partition("\n")[0]
        raise TrainingError(
            f"there is not enough memory for {work} ({reason}). Pool and checkpoints are good; free memory "
            f"and run the same command, or start a run with a smaller {setting}"
        ) from error


def _release_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


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
            f"(the last: loss {loss}, gradient norm {grad_norm}). The last checkpoint is good: the same "
            "command goes on from it, with more patience by optimizer.max_skipped_steps; another "
            "optimizer.learning_rate needs another run"
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
