"""The configuration of evaluations. Imports no torch, so reading a configuration stays fast."""

from __future__ import annotations

from pydantic import Field

from quark.rewards.config import RewardName
from quark.settings import Settings


class EvaluationConfig(Settings):
    """Measurements on held-out prompts."""

    every_rounds: int = Field(1, ge=1)
    """Evaluate the best quantile after this many rounds (always after the last)."""
    completions_per_prompt: int = Field(1, ge=1)
    """Completions of each prompt; expected-maximum and probability metrics need several."""
    judges: tuple[RewardName, ...] = ()
    """Further rewards that are measured and never trained on, by name, e.g. ``["vader"]``."""
    control_curve: bool = True
    """At the end, evaluate under every reward token."""
    control_gap: bool = True
    """Also measure the lowest token at every evaluation: shows how far the model can be steered,
    and feeds the alerts on the control curve. Doubles the cost of an evaluation."""
    show_prompts: int = Field(4, ge=0)
    """Number of prompts whose answers before and after are shown at the end."""
    top_p: float | None = Field(None, gt=0.0, le=1.0)
    """Nucleus mass while evaluating; unset takes ``sampling.top_p`` (the literature reports 0.9)."""
    temperature: float | None = Field(None, ge=0.0)
    """Temperature while evaluating, 0 for greedy completions; unset takes ``sampling.temperature``."""
