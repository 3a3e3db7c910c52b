"""The values that cross rooms.

Quantile 0 holds the lowest rewards, quantile K-1 the best; nothing in quark counts the other way.
Rewards are "higher is better"; NaN means "not scored".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"


class FinishReason(IntEnum):
    """Why a completion ended. Stored as one byte in the pool, so the numbers never change."""

    UNKNOWN = 0
    STOP = 1
    """An end-of-sequence token was sampled; it is the last token of the completion."""
    LENGTH = 2
    """``max_new_tokens`` were sampled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One prompt of a source, tokenized once.

    >>> Prompt(index=3, text="The movie", token_ids=(464, 3807)).index
    3
    """

    index: int
    """Position in its source (0-based), so the name of the row in error messages and derived seeds."""
    text: str
    token_ids: tuple[int, ...]
    """Base-vocabulary ids; never a reward token."""
    metadata: Mapping[str, Json] = field(default_factory=dict)
    """The other fields of its row. Rewards can ask for them, and the pool stores them."""
    place: str = field(default="", compare=False)
    """File and line that it comes from, for error messages."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One sampled completion, exactly as sampled.

    ``token_ids`` includes the end-of-sequence token when it was sampled (token-in, token-out).
    """

    prompt: Prompt
    token_ids: NDArray[np.uint32]
    """[T] sampled ids."""
    text: str
    """Decoded without special tokens; for rewards and people, never re-tokenized."""
    finish_reason: FinishReason
    reward_quantile: int | None
    """Quantile whose reward token conditioned the sampling; None when no token was given."""
    seed: int
    """Derived seed (u64) of the batch or row this completion was sampled with."""
    logprob_policy: float = float("nan")
    """Sum of the sampling policy's log-probabilities over the completion, in nats; NaN = not computed."""
    logprob_reference: float = float("nan")
    """The same under the reference policy."""
    logprob_sampled: float = float("nan")
    """The same under the distribution that the tokens were drawn from, guided, tempered and truncated; NaN = not known."""
