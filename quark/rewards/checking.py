"""Tests a reward on a few samples before a run depends on it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from quark.rewards.base import RewardFunction
from quark.rewards.scoring import score
from quark.types import Json

SAMPLES: tuple[tuple[str, str], ...] = (
    ("the battery", " lasts all day and charges fast."),
    ("the battery", " is poor and the screen broke after a week."),
    ("the menu", " is easy to use, great pictures, good value!"),
    ("the menu", " is confusing, slow and badly translated."),
    ("my daughter", " got one for her birthday."),
    ("sound", ""),
    ("it", " it it it it it it it it it"),
    ("the seller", " is a lying idiot and I hate him."),
)
"""Prompt and completion: praise, complaint, neither, empty, repeated, insulting."""

_REPEATED_SHARE_WORTH_A_WORD = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleScore:
    """One sample's score; NaN if it was not scored."""

    prompt: str
    completion: str
    score: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardReport:
    """The results of a reward on the samples. Shares are of all samples, from 0 to 1."""

    name: str
    num_samples: int
    num_failed: int
    """Samples without a score, for any reason."""
    num_nonfinite: int
    """Those of them for which the reward returned NaN or an infinity."""
    repeated_share: float
    """Share of the scored samples that have another sample's score although their texts differ."""
    is_constant: bool
    """All scored samples have one score, or none is scored."""
    is_repeatable: bool
    """A second call gave the same scores."""
    minimum: float
    mean: float
    maximum: float
    """Over the scored samples; NaN if there are none."""
    samples_per_s: float
    """Of the second call, so loading is not counted."""
    scores: Sequence[SampleScore]
    warnings: Sequence[str]
    """Problems for a run, in sentences; empty if there are none."""


def check_reward(
    reward: RewardFunction,
    samples: Sequence[tuple[str, str]] | None = None,
    *,
    rows: Sequence[Mapping[str, Json]] | None = None,
    batch_size: int = 1024,
) -> RewardReport:
    """Call ``reward`` twice on (prompt, completion) pairs, by default ``SAMPLES``, and judge the results.

    ``rows`` are the other fields of each pair, for a reward that asks for some of them.

    Raises:
        RewardError: A row lacks a field that the reward requires. The results cannot be scores (wrong length or types), or the reward raised.
        ValueError: There are no samples.
    """
    pairs = SAMPLES if samples is None else samples
    if not pairs:
        raise ValueError("no samples to check the reward with")
    prompts = [prompt for prompt, _ in pairs]
    completions = [completion for _, completion in pairs]
    first = score(reward, prompts, completions, batch_size=batch_size, rows=rows)
    started = time.perf_counter()
    second = score(reward, prompts, completions, batch_size=batch_size, rows=rows)
    seconds = time.perf_counter() - started

    scored = ~np.isnan(first.scores)
    values = first.scores[scored]
    # One completion may have several scores, by its prompt; the same score again is no tie.
    distinct = set(zip(np.array(completions, dtype=object)[scored], values.tolist(), strict=True))
    counts = Counter(value for _, value in distinct)
    tied = sum(number for number in counts.values() if number > 1)
    repeated_share = tied / counts.total() if counts else 0.0
    is_constant = len(counts) <= 1 and len(pairs) > 1
    is_repeatable = bool(np.array_equal(first.scores, second.scores, equal_nan=True))

    warnings = list(first.messages)
    if first.merged_message is not None:
        warnings.append(first.merged_message)
    if first.num_failed:
        warnings.append(f"{first.num_failed} of {len(pairs)} samples were not scored")
    if is_constant:
        warnings.append("every score is the same: there is nothing to learn from")
    elif repeated_share >= _REPEATED_SHARE_WORTH_A_WORD:
        warnings.append(
            f"{repeated_share:.0%} of the scores tie: quantiles will cut through equal rewards"
        )
    if not is_repeatable:
        warnings.append("a second call gave other scores: re-scoring will not reproduce them")
    return RewardReport(
        name=reward.name,
        num_samples=len(pairs),
        num_failed=first.num_failed,
        num_nonfinite=first.num_nonfinite,
        repeated_share=repeated_share,
        is_constant=is_constant,
        is_repeatable=is_repeatable,
        minimum=float(values.min()) if values.size else float("nan"),
        mean=float(values.mean()) if values.size else float("nan"),
        maximum=float(values.max()) if values.size else float("nan"),
        samples_per_s=len(pairs) / max(seconds, 1e-9),
        scores=tuple(
            SampleScore(prompt=prompt, completion=completion, score=float(value))
            for (prompt, completion), value in zip(pairs, first.scores, strict=True)
        ),
        warnings=tuple(warnings),
    )
