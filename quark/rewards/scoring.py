"""Calling a reward function and checking every value it returns.

A reward is foreign code or a foreign server, so every value is checked before it reaches the pool.
A value that *cannot be a score* (wrong length, texts, booleans, nested lists) is a mistake and
raises, whatever the settings. A *missing score* (None, NaN, infinity) becomes NaN and is counted. a
call that *raises* may be made again, and then either raises here or leaves its batch without
scores, counted.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from quark.errors import RewardError
from quark.rewards.base import RewardFunction
from quark.rewards.fields import Fields, call_with, fields_asked
from quark.rewards.raised_at import raised_at
from quark.types import Json

OnError = Literal["fail", "nan"]

BACKOFF_S = 0.5
"""Wait before a batch is retried, in seconds; doubles with each attempt."""
MAX_BACKOFF_S = 30.0

_MAX_MESSAGES = 5
_SHOWN = 80
_LARGEST = float(np.finfo(np.float32).max)
_SAME = 1e-13
"""Relative difference of two scores that differ by rounding only."""
_MERGED_SHARE_SAID = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreOutcome:
    """Scores of a batch and what went wrong in it."""

    scores: NDArray[np.float32]
    """[N], higher is better, NaN = not scored."""
    num_failed: int
    """Completions without a score, for any reason: the NaN in ``scores``."""
    num_nonfinite: int
    """Those of them for which the reward returned NaN, an infinity or a number beyond float32."""
    num_retried: int
    """Calls that were repeated because the previous one raised."""
    messages: Sequence[str]
    """The first few different reasons, for people."""
    num_merged: int = 0
    """Completions whose score differs from another's, but no longer as float32."""
    merged: tuple[float, float] | None = None
    """Two such scores, as the reward returned them."""

    @property
    def merged_message(self) -> str | None:
        """What to say of ``num_merged``; None where it is a small share."""
        return merged_message(self.num_merged, len(self.scores) - self.num_failed, self.merged)


def merged_message(
    num_merged: int, num_scored: int, pair: tuple[float, float] | None
) -> str | None:
    """A warning that many scores tie because they are stored as float32; ``pair`` is an example."""
    if pair is None or num_merged < _MERGED_SHARE_SAID * num_scored:
        return None
    return (
        f"{num_merged / num_scored:.0%} of the scores tie with others that differ from them, such as {pair[0]!r} and {pair[1]!r}: they "
        "are stored as float32, which has about 7 digits. Subtract what they have in common in the reward"
    )


def score(
    reward: RewardFunction,
    prompts: Sequence[str],
    completions: Sequence[str],
    *,
    on_error: OnError = "fail",
    batch_size: int = 1024,
    retries: int = 0,
    backoff_s: float = BACKOFF_S,
    rows: Sequence[Mapping[str, Json]] | None = None,
) -> ScoreOutcome:
    """Score completions in batches of at most ``batch_size``.

    The reward is given lists of its own, so it cannot change the caller's.

    Args:
        reward: what scores.
        prompts: one for each completion.
        completions: what is scored.
        on_error: what to do if all attempts at a batch raise.
        batch_size: completions given to the reward at once.
        retries: how often a batch that raised is retried. A ``RewardError`` is final: it
            says that trying again is of no use, or was done.
        backoff_s: wait before the first retry, in seconds.
        rows: the other fields of each prompt's row, for a reward that asks for some of them; None if there are none.

    Raises:
        RewardError: A row has no value for a field that the reward requires. The reward returned something that cannot be scores; names the function, the index
            and the value. Or it raised, and ``on_error`` is ``"fail"``; with ``"nan"`` the completions of
            that batch count as failed instead.
        ValueError: There are not as many prompts or rows as completions, or ``batch_size`` is not positive.
    """
    if len(prompts) != len(completions):
        raise ValueError(f"{len(prompts)} prompts for {len(completions)} completions")
    if rows is not None and len(rows) != len(completions):
        raise ValueError(f"{len(rows)} rows for {len(completions)} completions")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    fields = _fields(reward, [{}] * len(completions) if rows is None else rows)
    scores = np.full(len(completions), np.nan, dtype=np.float32)
    exact = np.full(len(completions), np.nan)
    num_nonfinite = num_retried = 0
    messages: list[str] = []

    def note(message: str) -> None:
        if message not in messages and len(messages) < _MAX_MESSAGES:
            messages.append(message)

    def retried(message: str) -> None:
        nonlocal num_retried
        num_retried += 1
        note(f"{message}; tried again")

    for start in range(0, len(completions), batch_size):
        part = list(completions[start : start + batch_size])
        try:
            returned = _call(
                reward,
                prompts[start : start + batch_size],
                part,
                {name: values[start : start + batch_size] for name, values in fields.items()},
                start=start,
                retries=retries,
                backoff_s=backoff_s,
                on_retry=retried,
            )
        except RewardError as err:
            if on_error == "fail":
                raise
            note(str(err))
            continue
        for offset, value in enumerate(_as_list(reward.name, returned, len(part))):
            index = start + offset
            number = _as_number(reward.name, index, value)
            if number is None:
                note(f"reward {reward.name!r} returned None, for example for completion {index}")
            elif math.isfinite(number):
                scores[index] = exact[index] = number
            else:
                num_nonfinite += 1
                note(
                    f"reward {reward.name!r} returned {number}, for example for completion {index}"
                )
    num_merged, merged = _merged(exact, scores)
    return ScoreOutcome(
        scores=scores,
        num_failed=int(np.isnan(scores).sum()),
        num_nonfinite=num_nonfinite,
        num_retried=num_retried,
        messages=tuple(messages),
        num_merged=num_merged,
        merged=merged,
    )


def _merged(
    exact: NDArray[np.float64], scores: NDArray[np.float32]
) -> tuple[int, tuple[float, float] | None]:
    """How many scores float32 no longer tells from others, and two of them."""
    values = np.unique(exact[~np.isnan(exact)])
    below, above = values[:-1], values[1:]
    is_lost = below.astype(np.float32) == above.astype(np.float32)
    is_lost &= above - below > _SAME * np.maximum(np.abs(below), np.abs(above))
    if not is_lost.any():
        return 0, None
    first = int(is_lost.argmax())
    pair = (float(below[first]), float(above[first]))
    return int(np.isin(scores, below[is_lost].astype(np.float32)).sum()), pair


def _call(
    reward: RewardFunction,
    prompts: Sequence[str],
    completions: Sequence[str],
    fields: Fields,
    *,
    start: int,
    retries: int,
    backoff_s: float,
    on_retry: Callable[[str], None],
) -> object:
    """The reward's result for one batch, unchecked; a ``RewardError`` if all attempts raise."""
    attempt = 0
    while True:
        try:
            return call_with(reward, list(prompts), list(completions), copy.deepcopy(fields))
        except (Exception, SystemExit) as err:  # a reward that calls exit() must not end the run
            message = (
                f"reward {reward.name!r} raised on completions {start} to {start + len(completions) - 1}: "
                f"{type(err).__name__}: {err}{raised_at(err, _file_of(reward))}"
            )
            if attempt == retries or isinstance(err, RewardError):
                tries = f" (attempt {attempt + 1})" if attempt else ""
                raise RewardError(message + tries) from err
        on_retry(message)
        time.sleep(min(backoff_s * 2.0**attempt, MAX_BACKOFF_S))
        attempt += 1


def _fields(
    reward: RewardFunction, rows: Sequence[Mapping[str, Json]]
) -> Mapping[str, Sequence[Json]]:
    asked = fields_asked(reward)
    for index, row in enumerate(rows):
        if (name := asked.lacking(row)) is not None:
            raise RewardError(
                f"the reward {reward.name!r} asks for the field {name!r}, and the row of prompt {index} has no value for it"
            )
    return asked.columns(rows)


def _file_of(reward: RewardFunction) -> str | None:
    """The file with the user's code, if the reward is user code."""
    file = getattr(reward, "provenance", {}).get("path")
    return file if isinstance(file, str) else None


def _as_list(name: str, returned: object, expected: int) -> list[object]:
    """The returned scores, as a list of the right length; arrays and tensors of one dimension are fine."""
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
    elif hasattr(returned, "to_list"):  # a column of polars
        values = list(returned.to_list())
    elif isinstance(returned, Sequence):
        values = list(returned)
    else:
        hint = "" if returned is not None else " (is a return missing?)"
        raise RewardError(
            f"reward {name!r} returned {_shown(returned)}, not a sequence with one score per completion{hint}"
        )
    if len(values) != expected:
        raise RewardError(
            f"reward {name!r} returned {_counted(len(values), 'score')} for {_counted(expected, 'completion')}"
        )
    return values


def _as_number(name: str, index: int, value: object) -> float | None:
    """A score as a float; infinite if float32 cannot hold it; None if there is none."""
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


def _counted(value: int, noun: str) -> str:
    return f"{value} {noun}" + ("" if value == 1 else "s")


def _shown(value: object) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."
