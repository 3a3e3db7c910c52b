"""What a pool says of itself, and of what was done to it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quark.errors import PoolCorruptedError
from quark.pool.base import Snapshot
from quark.types import Json


def stored_json(text: str, what: str) -> Any:  # noqa: ANN401 - any JSON value
    """What a pool keeps as JSON, which may be a stranger's.

    Raises:
        PoolCorruptedError: it is not JSON, or nested too deeply; ``what`` says what it is of.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise PoolCorruptedError(f"{what} is nested too deeply to be read") from None
    except ValueError as error:
        raise PoolCorruptedError(f"{what} is not JSON: {error}") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolSettings:
    """What a pool was created with."""

    uuid: str
    vocab_size: int
    """Token ids are below this."""
    store_text: bool
    tie_seed: int
    metadata: Mapping[str, Json]
    """The user's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreColumnInfo:
    """What a score column holds."""

    name: str
    version: int
    """1 for the first scores of the name; re-scoring counts up."""
    source: Mapping[str, Json]
    """What made the scores, where they came after their samples; else empty."""
    num_scored: int
    num_unscored: int
    """Samples whose score is NaN; not those that were removed."""
    num_runs: int
    """Sorted runs that the ranking is made of."""
    mean: float
    """NaN when nothing is scored, like ``std``, ``min`` and ``max``."""
    std: float
    """Of the scores as a whole population."""
    min: float
    max: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftInfo:
    """A score column in the making."""

    name: str
    source: Mapping[str, Json]
    """What makes the scores."""
    num_covered: int
    """Samples that it covers so far; not those that were removed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolInfo:
    """What a pool holds, as of one snapshot."""

    path: Path
    uuid: str
    vocab_size: int
    store_text: bool
    tie_seed: int
    metadata: Mapping[str, Json]
    """What the pool was created with."""
    snapshot: Snapshot
    num_removed: int
    """Samples that ``retain`` removed: ids below this."""
    num_prompts: int
    num_segments: int
    """Segment files: one per append, fewer after a compaction."""
    num_bytes: int
    """Bytes of all live data files."""
    score_columns: tuple[ScoreColumnInfo, ...]
    drafts: tuple[DraftInfo, ...]

    @property
    def num_retained(self) -> int:
        """Samples that are there."""
        return self.snapshot.num_samples - self.num_removed


@dataclass(frozen=True, slots=True, kw_only=True)
class Collected:
    """What was given up, or would be."""

    oldest_generation: int
    """The oldest snapshot that can still be opened."""
    num_files: int
    """Files that went."""
    num_bytes: int
    """Their bytes; the disk gets those back that no fork and no open reader holds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Compacted:
    """What a compaction did."""

    num_commits: int
    """0 where nothing was worth it."""
    num_segments_before: int
    num_segments: int
    """Files that the samples lie in now."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolProblem:
    """Something that is wrong on disk."""

    file: str
    """Relative to the pool; empty when it is not one file's problem."""
    offset: int
    """Byte offset of the damage, or of the unit that holds it."""
    what: str


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """What an offline check found; it read every byte."""

    generation: int | None
    """Newest commit, None if the pool cannot be opened."""
    num_samples: int
    num_files: int
    num_bytes: int
    problems: tuple[PoolProblem, ...]

    @property
    def is_sound(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems
