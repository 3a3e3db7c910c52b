"""Where a run is: the counters that a checkpoint carries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What the original model wrote to a held-out prompt."""

    prompt: str
    completion: str
    reward: float | None
    """None where it was not scored."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Baseline:
    """Figures of the original model on the held-out prompts."""

    metrics: Mapping[str, float]
    """By name, as in docs/metrics.md."""
    judges: Mapping[str, float] = field(default_factory=dict)
    """Mean score by judge."""
    answers: tuple[Answer, ...] = ()
    """Of the first prompts, for the end to compare with."""


@dataclass(slots=True, kw_only=True)
class Position:
    """Where a run is; all of it is in every checkpoint."""

    round: int = 0
    step_in_round: int = 0
    step: int = 0
    """Optimizer steps since the beginning, skipped ones included."""
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    micro_batch_size: int | None = None
    """Samples per pass where memory did not suffice for what is configured; None while it does."""
    totals: dict[str, float] = field(default_factory=dict)
    """Sums of the figures of this round's steps that were not skipped."""
    totalled_steps: int = 0
    seconds: float = 0.0
    """Time spent before this process."""
    fresh: dict[str, float] = field(default_factory=dict)
    """What was measured on this round's new samples before learning from them; empty where nothing was."""
    previous_bounds: list[float] | None = None
    """[K] lowest reward in each quantile of the round before, where the new samples are measured by them."""
    held_out_best: float | None = None
    """The lowest contrast of this round on the held-out part of the pool; None before it was measured."""
    held_out_rises: int = 0
    """Measurements in a row that were above it."""
    steps_braked: int = 0
    """Steps at the end of this round that are left out for that."""
    are_tokens_settled: bool = False
    """Whether the settling steps before the first round's own were made."""
    baseline: Baseline | None = None
    """None before it was measured."""

    @property
    def skipped_in_round(self) -> int:
        """Number of this round's optimizer steps that were skipped."""
        return self.step_in_round - self.totalled_steps

    def begin_round(self, number: int) -> None:
        """Move to round ``number`` and clear what belongs to a single round."""
        self.round, self.step_in_round = number, 0
        self.totals, self.totalled_steps = {}, 0
        self.fresh = {}
        self.held_out_best, self.held_out_rises, self.steps_braked = None, 0, 0

    def add(self, figures: Mapping[str, float]) -> None:
        """Count a step's figures in."""
        self.totalled_steps += 1
        for name, value in figures.items():
            self.totals[name] = self.totals.get(name, 0.0) + value

    def count_idle_steps(self, number: int) -> None:
        """Count a whole round's ``number`` of steps, none of which had anything to do."""
        self.step += number - self.step_in_round
        self.step_in_round = self.totalled_steps = number

    def means(self) -> dict[str, object]:
        """Mean figures of this round's steps, named ``<figure>_mean``."""
        return {f"{name}_mean": value / self.totalled_steps for name, value in self.totals.items()}
