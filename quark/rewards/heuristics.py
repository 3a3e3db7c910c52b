"""Rewards that are a formula over the text: diversity, length, regular expression."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Final, Literal, Self

from pydantic import Field, field_validator, model_validator

from quark.errors import RewardError
from quark.settings import Settings
from quark.text_statistics import diversity, words
from quark.types import Json


class LengthConfig(Settings):
    """The desired length of completions."""

    unit: Literal["words", "characters"] = "words"
    """Unit of length; words are separated by whitespace."""
    target: int | None = Field(default=None, ge=0)
    """The single best length, instead of the limits."""
    minimum: int = Field(default=0, ge=0)
    """Shortest length with full reward."""
    maximum: int | None = Field(default=None, ge=0)
    """Longest length with full reward; unset means any."""

    @model_validator(mode="after")
    def _limits_fit(self) -> Self:
        if self.target is not None and (self.minimum or self.maximum is not None):
            raise ValueError("give either target or minimum and maximum")
        if self.maximum is not None and self.maximum < self.minimum:
            raise ValueError(f"maximum {self.maximum} is below minimum {self.minimum}")
        return self


class RegexConfig(Settings):
    """A pattern to find in completions."""

    pattern: str = ""
    """Python regular expression, searched for anywhere in the completion."""
    mode: Literal["match", "count"] = "match"
    """``match``: 1 if found, else 0. ``count``: how often, without overlaps."""
    ignore_case: bool = False
    """Ignore upper and lower case."""
    unwanted: bool = False
    """Finding the pattern is bad: the reward is one minus the match, or minus the count."""

    @field_validator("pattern")
    @classmethod
    def _pattern_compiles(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except re.error as err:
            raise ValueError(f"not a regular expression: {err}") from err
        return pattern


class DiversityReward:
    """Product of (1 - rep-n) for n = 2, 3, 4: 1 if nothing is repeated (the paper's repetition task)."""

    name: Final = "diversity"

    def __call__(self, *, prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
        """Score the completions, in [0, 1]; the prompts have no influence."""
        del prompts
        return [diversity(text) for text in completions]


class LengthReward:
    """1 inside the limits, and 1 / (1 + d / limit) at distance d outside of the nearer limit.

    >>> LengthReward(LengthConfig(target=4))(prompts=["", ""], completions=["easy to use", "a b c d"])
    [0.8, 1.0]
    """

    name: Final = "length"

    def __init__(self, config: LengthConfig) -> None:
        self._config = config
        self._unit = config.unit
        self._minimum = config.minimum if config.target is None else config.target
        self._maximum = config.maximum if config.target is None else config.target

    @property
    def provenance(self) -> Mapping[str, Json]:
        """The desired lengths."""
        return self._config.model_dump(mode="json", exclude_none=True)

    def __call__(self, *, prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
        """Score the lengths of the completions; the prompts have no influence."""
        del prompts
        return [self._score(text) for text in completions]

    def _score(self, text: str) -> float:
        length = len(words(text)) if self._unit == "words" else len(text)
        if length < self._minimum:
            limit = self._minimum
        elif self._maximum is not None and length > self._maximum:
            limit = self._maximum
        else:
            return 1.0
        return 1.0 / (1.0 + abs(length - limit) / max(1, limit))


class RegexReward:
    """Whether or how often a pattern matches.

    >>> RegexReward(RegexConfig(pattern="!", mode="count"))(prompts=[""], completions=["wow!!"])
    [2.0]
    """

    name: Final = "regex"

    def __init__(self, config: RegexConfig) -> None:
        """Compile the pattern; RewardError without one."""
        if not config.pattern:
            raise RewardError("reward regex needs reward.regex.pattern")
        self._config = config
        self._pattern = re.compile(config.pattern, re.IGNORECASE if config.ignore_case else 0)

    @property
    def provenance(self) -> Mapping[str, Json]:
        """The pattern, and how matches count."""
        return self._config.model_dump(mode="json")

    def __call__(self, *, prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
        """Match the pattern against the completions; the prompts have no influence."""
        del prompts
        return [self._score(text) for text in completions]

    def _score(self, text: str) -> float:
        if self._config.mode == "match":
            return float((self._pattern.search(text) is not None) != self._config.unwanted)
        count = float(sum(1 for _ in self._pattern.finditer(text)))
        return -count if self._config.unwanted else count
