"""The interface of a reward: texts in, scores out. ``quark.rewards.fields`` adds what the prompts' rows know.

Higher is better. None or NaN means "not scored": it is stored as NaN, counted and shown, never dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable


@runtime_checkable
class RewardFunction(Protocol):
    """Scores completions batch-wise.

    >>> class Short:
    ...     name = "short"
    ...     def __call__(self, *, prompts, completions):
    ...         return [-float(len(text)) for text in completions]
    >>> Short()(prompts=["Hi"], completions=["there"])
    [-5.0]
    """

    @property
    def name(self) -> str:
        """A short name for logs, metrics and the pool's provenance."""
        ...

    def __call__(
        self, *, prompts: Sequence[str], completions: Sequence[str]
    ) -> Sequence[float | None]:
        """One score per completion, in order; None or NaN if it cannot be scored."""
        ...
