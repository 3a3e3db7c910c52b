"""VADER: sentiment by lexicon and rules (Hutto and Gilbert 2014)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from vader import SentimentIntensityAnalyzer


class VaderReward:
    """The compound score in [-1, 1]; exactly 0 for a text without sentiment words, so there are many ties.

    >>> VaderReward()(prompts=["", ""], completions=["I love it", "I hate it"])
    [0.6369, -0.5719]
    """

    name: Final = "vader"

    def __init__(self) -> None:
        self._analyzer = SentimentIntensityAnalyzer()

    def __call__(self, *, prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
        """Compound scores of the completions; the prompts have no influence."""
        del prompts
        return [float(self._analyzer.polarity_scores(text)["compound"]) for text in completions]
