"""What a check says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

OnTrial: TypeAlias = Callable[[int, int], None]
"""Called with (trials done, trials in all)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """The outcome of one check."""

    name: str
    num_trials: int
    detail: str
    """What was done and seen, in one line."""
    problems: tuple[str, ...]
    """What must not be; empty where the check passed."""

    @property
    def is_passed(self) -> bool:
        """Whether the check found no problem."""
        return not self.problems
