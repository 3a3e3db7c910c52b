"""How many rounds a run has, and what happens after which of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from quark.config.schema import RunConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounds:
    """How many rounds there are, and what happens after which of them."""

    number: int
    evaluate_every: int
    checkpoint_every: int
    stops_at_alert: bool
    """Write a checkpoint and end the run at the first alert of a round."""
    samples_shown: int
    """Of the best and of the lowest quantile, after each round."""
    has_control_curve: bool
    """Whether the end measures the policy under every token."""

    @classmethod
    def of(cls, config: RunConfig) -> Self:
        """Read the schedule from the run's configuration."""
        return cls(
            number=config.run.num_rounds,
            evaluate_every=config.evaluation.every_rounds,
            checkpoint_every=config.checkpoint.every_rounds,
            stops_at_alert=config.alerts.stop,
            samples_shown=config.tracking.samples_per_round,
            has_control_curve=config.evaluation.control_curve,
        )
