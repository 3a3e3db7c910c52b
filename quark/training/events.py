"""Events that a run sends to its observers.

The trainer does not print. It reports to a ``TrainingListener``, which the CLI (tables, progress) and the tests
implement. All values are plain numbers and texts. Texts are model output and must be treated as hostile.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

Phase = Literal["loading", "exploring", "scoring", "learning", "evaluating", "saving"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Progress within a phase."""

    phase: Phase
    round: int
    done: int
    total: int
    """``done`` of ``total`` units: completions when exploring, optimizer steps when learning."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Latest figures, named as in ``metrics.jsonl`` (``reward_mean``, ``kl_policy_to_reference``, ``tokens_per_s``)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleView:
    """A stored sample to display."""

    id: int
    prompt: str
    completion: str
    reward: float
    quantile: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundSummary:
    """One round, finished and committed."""

    round: int
    num_rounds: int
    metrics: Mapping[str, float]
    """All figures of the round, named as in ``metrics.jsonl``."""
    best_samples: Sequence[SampleView]
    """A few of the round's new samples from the best quantile."""
    worst_samples: Sequence[SampleView]
    """A few of the round's new samples from the lowest quantile."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BeforeAfter:
    """Completions of one prompt by the original model and by the trained one under the best token."""

    prompt: str
    before: str
    before_reward: float
    after: str
    after_reward: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingResult:
    """The result of a finished or cleanly interrupted run; ``quark train --json`` prints it."""

    run_dir: Path
    pool: Path
    model: Path
    report: Path | None
    rounds: int
    samples: int
    reward_before: float
    reward_after: float
    kl_policy_to_reference: float
    kl_reference_to_policy: float
    control_curve: Sequence[float]
    """Mean reward when conditioned on token 0 .. K-1."""
    seconds: float
    interrupted: bool
    metrics: Mapping[str, float]
    """Further final figures (``distinct_2_after``, ``vader_before`` ...)."""
    before_after: Sequence[BeforeAfter] = ()


class TrainingListener(Protocol):
    """Receives the events of a run."""

    def on_message(self, text: str, *, level: Literal["info", "warning"] = "info") -> None:
        """A message of one line (resumed from step n, n rewards failed, falling back to ...)."""
        ...

    def on_progress(self, progress: Progress) -> None:
        """A phase has begun or advanced."""
        ...

    def on_round(self, summary: RoundSummary) -> None:
        """A round has finished and is committed."""
        ...


class Silence:
    """Ignores all events. Processes other than the main process use this listener."""

    def on_message(self, text: str, *, level: Literal["info", "warning"] = "info") -> None:
        """Ignore the message."""
        pass

    def on_progress(self, progress: Progress) -> None:
        """Ignore the progress."""
        pass

    def on_round(self, summary: RoundSummary) -> None:
        """Ignore the summary."""
        pass
