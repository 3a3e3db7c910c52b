"""Calling a reward function and checking every value it returns.

A reward is somebody's code or somebody's server: nothing it returns reaches the pool unchecked. What
*cannot be a score* (wrong length, texts, booleans, nested lists) is a mistake and raises, whatever the
settings; what is *no score* (None, NaN, infinity) becomes NaN and is counted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from quark.errors import RewardError
from quark.rewards.base import RewardFunction

OnError = Literal["fail", "nan"]

_MAX_MESSAGES = 5
_SHOWN = 80
_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreOutcome:
    """Scores of a batch and what went wrong in it."""

    scores: NDArray[np.float32]
    """[N], higher is better, NaN = not scored."""
    num_failed: int
    """Completions without a score, for whatever reason: the NaN in ``scores``."""
    num_nonfinite: int
    """Those among them for which NaN, an infinity or a number beyond float32 came back."""
    messages: Sequence[str]
    """The first few different reasons, for people."""


def score(
    reward: RewardFunction,
    prompts: Sequence[str],
    completions: Sequence[str],
    *,
    on_error: OnError = "fail",
    batch_size: int = 1024,
) -> ScoreOutcome:
    """Score completions in batches of at most ``batch_size``.

    The reward is given lists of its own, so it cannot change the caller's.

    Raises:
        RewardError: The reward returned something that cannot be scores; names the function, the index
            and the value. Or it raised, and ``on_error`` is ``"fail"``; with ``"nan"`` the completions of
            that batch count as failed instead.
        ValueError: There are not as many prompts as completions, or ``batch_size`` is not positive.
    """
    if len(prompts) != len(completions):
        raise ValueError(f"{len(prompts)} prompts for {len(completions)} completions")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    scores = np.full(len(completions), np.nan, dtype=np.float32)
    num_nonfinite = 0
    messages: list[str] = []

    def note(message: str) -> None:
        if message not in messages and len(messages) < _MAX_MESSAGES:
            messages.append(message)

    for start in range(0, len(completions), batch_size):
        part = list(completions[start : start + batch_size])
        try:
            returned = reward(
                prompts=list(prompts[start : start + batch_size]), completions=part[:]
            )
        except Exception as err:
            message = (
                f"reward {reward.name!r} raised on completions {start} to {start + len(part) - 1}: "
                f"{type(err).__name__}: {err}"
            )
            if on_error == "fail":
                raise RewardError(message) from err
            note(message)
            continue
        for offset, value in enumerate(_as_list(reward.name, returned, len(part))):
            index = start + offset
            number = _as_number(reward.name, index, value)
            if number is None:
                note(f"reward {reward.name!r} returned None, for example for completion {index}")
            elif math.isfinite(number):
                scores[index] = number
            else:
                num_nonfinite += 1
                note(
                    f"reward {reward.name!r} returned {number}, for example for completion {index}"
                )
    return ScoreOutcome(
        scores=scores,
        num_failed=int(np.isnan(scores).sum()),
        num_nonfinite=num_nonfinite,
        messages=tuple(messages),
    )


def _as_list(name: str, returned: object, expected: int) -> list[object]:
    """What came back, as a list of the right length; arrays and tensors of one dimension are fine."""
    if isinstance(returned, str | bytes | bytearray | dict):
        raise RewardError(
            f"reward {name!r} returned {type(returned).__name__} {_shown(returned)}, not one score per completion"
        )
    dimensions = getattr(returned, "ndim", None)
    if dimensions is not None:
        if dimensions != 1:
            shape = tuple(getattr(returned, "shape", ()))
            raise RewardError(
                f"reward {name!r} returned an array of shape {shape}, not ({expected},)"
            )
        values = list(returned.tolist())  # type: ignore[attr-defined]
    elif isinstance(returned, Sequence):
        values = list(returned)
    else:
        hint = "" if returned is not None else " (is a return missing?)"
        raise RewardError(
            f"reward {name!r} returned {_shown(returned)}, not a sequence with one score per completion{hint}"
        )
    if len(values) != expected:
        raise RewardError(
            f"reward {name!r} returned {len(values)} scores for {expected} completions"
        )
    return values


def _as_number(name: str, index: int, value: object) -> float | None:
    """A score as a float; infinite where float32 cannot hold it; None where there is none."""
    if value is None:
        return None
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        value = value.item()  # a NumPy scalar or a tensor of one number
    if isinstance(value, bool) or not isinstance(value, Real):
        raise RewardError(
            f"reward {name!r} returned {type(value).__name__} {_shown(value)} for completion {index}, "
            "not a number or None"
        )
    try:
        number = float(value)
    except OverflowError:
        return math.inf
    # A float64 that float32 cannot hold would be stored as an infinity.
    return math.copysign(math.inf, number) if abs(number) > _LARGEST else number


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."
