"""Memory that does not suffice: the same work in smaller parts, or an error that says what to change.

A step that runs out of memory is run again, the same samples in smaller parts: the parts' losses add up to
the batch's, so the step is the same but for rounding.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

from quark.errors import TrainingError

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
