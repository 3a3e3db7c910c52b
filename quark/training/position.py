"""The position of a run: the counters in a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A completion of the original model for a held-out prompt."""

    prompt: str
    completion: str
    reward: float | None
    """None if it was not scored."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Baseline:
    """Figures of the original model on the held-out prompts."""

    metrics: Mapping[str, float]
    """Figures by name, as in docs/metrics.md."""
    judges: Mapping[str, float] = field(default_factory=dict)
    """Mean score by judge."""
    answers: tuple[Answer, ...] = ()
    """Completions of the first prompts, to compare with at the end."""


@dataclass(slots=True, kw_only=True)
class Position:
    """The position of a run. Every checkpoint contains all of it."""

    round: int = 0
    step_in_round: int = 0
    step: int = 0
    """Number of optimizer steps since the beginning, including skipped ones."""
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    micro_batch_size: int | None = None
    """Samples per pass after memory ran out; None while the configured number fits."""
    totals: dict[str, float] = field(default_factory=dict)
    """Sums of the figures of this round's steps that were not skipped."""
    totalled_steps: int = 0
    seconds: float = 0.0
    """Time spent in earlier processes."""
    fresh: dict[str, float] = field(default_factory=dict)
    """Measurements on this round's new samples before learning from them; empty without any."""
    previous_bounds: list[float] | None = None
    """[K] lowest reward in each quantile of the previous round, used to measure the new samples."""
    held_out_best: float | None = None
    """The lowest contrast of this round on the held-out part of the pool; None before it was measured."""
    held_out_rises: int = 0
    """Number of consecutive measurements above it."""
    steps_braked: int = 0
    """Number of steps at the end of this round that are skipped for that reason."""
    are_tokens_settled: bool = False
    """Whether the settling steps before the first round are done."""
    baseline: Baseline | None = None
    """None before it was measured."""

    @property
    def skipped_in_round(self) -> int:
        """Number of this round's optimizer steps that were skipped."""
        return self.step_in_round - self.totalled_steps

    def begin_round(self, number: int) -> None:
        """Move to round ``number`` and reset the values of a round."""
        self.round, self.step_in_round = number, 0
        self.totals, self.totalled_steps = {}, 0
        self.fresh = {}
        self.held_out_best, self.held_out_rises, self.steps_braked = None, 0, 0

    def add(self, figures: Mapping[str, float]) -> None:
        """Add the figures of a step."""
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
