"""Figures of a set of texts or scores as pure functions, and which way each figure of an evaluation is better."""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from quark.text_statistics import distinct_n, diversity


class Direction(StrEnum):
    """Which values of a metric are better."""

    HIGHER = "higher"
    LOWER = "lower"
    NEITHER = "neither"


DIRECTIONS = {
    "reward_mean": Direction.HIGHER,
    "reward_std": Direction.NEITHER,
    "failed_scores": Direction.LOWER,
    "completion_length_mean": Direction.NEITHER,
    "reward_minimum_mean": Direction.HIGHER,
    "reward_below_half_probability": Direction.LOWER,
    "distinct_1": Direction.HIGHER,
    "distinct_2": Direction.HIGHER,
    "distinct_3": Direction.HIGHER,
    "distinct_2_per_prompt": Direction.HIGHER,
    "distinct_3_per_prompt": Direction.HIGHER,
    "diversity": Direction.HIGHER,
    "kl_reference_to_policy": Direction.LOWER,
    "kl_policy_to_reference": Direction.LOWER,
    "kl_sampled_to_reference": Direction.LOWER,
    "kl_sampled_per_completion": Direction.LOWER,
    "perplexity_reference": Direction.LOWER,
}
"""Of every metric of an evaluation, by its name in docs/metrics.md."""


def is_better(name: str, before: float, after: float) -> bool | None:
    """Whether ``after`` is a better value of the metric ``name`` than ``before``.

    None if they are equal, if one is not finite, or if no value of the metric is better than another.
    """
    direction = DIRECTIONS[name]
    if direction is Direction.NEITHER or before == after:
        return None
    if not (math.isfinite(before) and math.isfinite(after)):
        return None
    return (after > before) is (direction is Direction.HIGHER)


def text_metrics(texts: Sequence[str], *, group_size: int = 1) -> dict[str, float]:
    """Diversity figures of N completions.

    Args:
        texts: the completions of a prompt together.
        group_size: completions per prompt.

    Returns:
        ``distinct_1`` .. ``distinct_3`` (distinct n-grams over n-grams of all texts), ``diversity``
        (mean over texts of prod_{n=2..4} (1 - rep-n)), and where there are several completions per
        prompt ``distinct_2_per_prompt`` and ``distinct_3_per_prompt``: means over prompts, divided by the
        number of words, as the published code reports them.
    """
    figures = {f"distinct_{n}": distinct_n(texts, n) for n in (1, 2, 3)}
    if group_size > 1:
        groups = [texts[i : i + group_size] for i in range(0, len(texts), group_size)]
        for n in (2, 3):
            figures[f"distinct_{n}_per_prompt"] = _mean(
                [distinct_n(group, n, denominator="words") for group in groups]
            )
    figures["diversity"] = _mean([diversity(text) for text in texts])
    return figures


def expected_maximum(scores: NDArray[np.float32], group_size: int) -> float:
    """Mean over prompts of the maximum over a prompt's scores [N]; NaN scores do not count."""
    maxima = [np.nanmax(row) for row in _rows(scores, group_size)]
    return float(np.mean(maxima, dtype=np.float64)) if maxima else math.nan


def any_above(scores: NDArray[np.float32], group_size: int, *, threshold: float) -> float:
    """Share of prompts with at least one score [N] strictly above ``threshold``."""
    hits = [bool(np.nanmax(row) > threshold) for row in _rows(scores, group_size)]
    return float(np.mean(hits)) if hits else math.nan


def _rows(scores: NDArray[np.float32], group_size: int) -> list[NDArray[np.float32]]:
    rows = np.asarray(scores, dtype=np.float32).reshape(-1, group_size)
    return [row for row in rows if np.isfinite(row).any()]


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan
