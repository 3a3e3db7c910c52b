"""The samples that every peer stores, one round at a time.

Prompts of 4..28 tokens (mean 16), completions of 8..32 (mean 20), ids below 50,257, rewards in [0, 1): with
round, policy step, prompt id and the two lengths 90 bytes a sample, as performance targets are stated for.
Above `FULL_SIZE` samples prompts and completions have one token each: what is measured there is the work on
rewards, and tokens would not fit beside the peers' copies.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

ROUND = 25_000
VOCABULARY = 50_257
NUM_PROMPTS = 10_000
NUM_QUANTILES = 5
PROMPT_WIDTH, COMPLETION_WIDTH = 28, 32
FULL_SIZE = 20_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """One round as flat arrays: what generation hands over."""

    number: int
    prompt_index: NDArray[np.uint32]
    """[N] which prompt."""
    prompt_tokens: NDArray[np.uint16]
    """The prompts of the samples, one after another."""
    prompt_lengths: NDArray[np.int64]
    """[N]"""
    tokens: NDArray[np.uint16]
    """The completions, one after another."""
    lengths: NDArray[np.int64]
    """[N]"""
    rewards: NDArray[np.float32]
    """[N]"""

    def __len__(self) -> int:
        return len(self.rewards)

    def matrix(self) -> NDArray[np.uint16]:
        """[N, 28 + 32] prompts left-padded, then completions right-padded."""
        rows = np.zeros((len(self), PROMPT_WIDTH + COMPLETION_WIDTH), np.uint16)
        rows[:, :PROMPT_WIDTH][left_mask(self.prompt_lengths)] = self.prompt_tokens
        rows[:, PROMPT_WIDTH:][right_mask(self.lengths)] = self.tokens
        return rows


class Workload:
    """A source of rounds; round *n* is the same whoever asks."""

    def __init__(self, size: int) -> None:
        self.is_full = size <= FULL_SIZE
        rng = np.random.default_rng(0)
        low, high = (4, PROMPT_WIDTH) if self.is_full else (1, 1)
        self._prompt_lengths = rng.integers(low, high + 1, NUM_PROMPTS)
        self._prompts = rng.integers(0, VOCABULARY, (NUM_PROMPTS, PROMPT_WIDTH), dtype=np.uint16)

    @property
    def prompts(self) -> list[NDArray[np.uint16]]:
        """The distinct prompts."""
        lengths = self._prompt_lengths.tolist()
        return [row[:length] for row, length in zip(self._prompts, lengths, strict=True)]

    def rows(self, number: int, size: int = ROUND) -> Rows:
        """Round ``number``."""
        rng = np.random.default_rng(number + 1)
        low, high = (8, COMPLETION_WIDTH) if self.is_full else (1, 1)
        lengths = rng.integers(low, high + 1, size)
        prompt_index = rng.integers(0, NUM_PROMPTS, size, dtype=np.uint32)
        prompt_lengths = self._prompt_lengths[prompt_index]
        inside = np.arange(PROMPT_WIDTH) < prompt_lengths[:, None]
        return Rows(
            number=number,
            prompt_index=prompt_index,
            prompt_tokens=self._prompts[prompt_index][inside],
            prompt_lengths=prompt_lengths,
            tokens=rng.integers(0, VOCABULARY, lengths.sum(), dtype=np.uint16),
            lengths=lengths,
            rewards=rng.random(size, dtype=np.float32),
        )


def left_mask(lengths: NDArray[np.generic]) -> NDArray[np.bool_]:
    """[B, 28] where a left-padded prompt has tokens."""
    return np.arange(PROMPT_WIDTH) >= PROMPT_WIDTH - np.asarray(lengths, np.int64)[:, None]


def right_mask(lengths: NDArray[np.generic]) -> NDArray[np.bool_]:
    """[B, 32] where a right-padded completion has tokens."""
    return np.arange(COMPLETION_WIDTH) < np.asarray(lengths)[:, None]


def padded(flat: NDArray[np.generic], mask: NDArray[np.bool_]) -> NDArray[np.int64]:
    """A matrix in the shape of ``mask`` with the flat tokens where it is true."""
    rows = np.zeros(mask.shape, np.int64)
    rows[mask] = flat
    return rows
