"""Information about a pool and results of its maintenance."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quark import _pool_rs
from quark.errors import PoolCorruptedError
from quark.pool.base import Snapshot
from quark.types import Json


def stored_json(text: str, what: str) -> Any:  # noqa: ANN401 - any JSON value
    """Parse JSON from a pool, which a stranger may have written.

    Raises:
        PoolCorruptedError: ``text`` is not JSON or is nested too deeply. The message names it as ``what``.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise PoolCorruptedError(f"{what} is nested too deeply to be read") from None
    except ValueError as error:
        raise PoolCorruptedError(f"{what} is not JSON: {error}") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolSettings:
    """The settings that a pool was created with."""

    uuid: str
    vocab_size: int
    """Token ids are below this."""
    store_text: bool
    tie_seed: int
    metadata: Mapping[str, Json]
    """Metadata of the user; the pool does not interpret it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreColumnInfo:
    """Statistics of a score column."""

    name: str
    version: int
    """1 for the first scores under this name; each re-scoring adds 1."""
    source: Mapping[str, Json]
    """Describes the scorer of a column that was added after its samples; else empty."""
    num_scored: int
    num_unscored: int
    """Number of samples whose score is NaN, without removed samples."""
    num_runs: int
    """Number of sorted runs that the ranking merges."""
    mean: float
    """NaN if no sample is scored. The same holds for ``std``, ``min`` and ``max``."""
    std: float
    """Population standard deviation."""
    min: float
    max: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftInfo:
    """A score column that is not finished."""

    name: str
    source: Mapping[str, Json]
    """Describes the scorer."""
    num_covered: int
    """Number of samples that have a score so far, without removed samples."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolInfo:
    """Counts and statistics of one snapshot."""

    path: Path
    uuid: str
    vocab_size: int
    store_text: bool
    tie_seed: int
    metadata: Mapping[str, Json]
    """Metadata that the pool was created with."""
    snapshot: Snapshot
    num_removed: int
    """Number of samples that ``retain`` removed. Their ids are below this."""
    num_prompts: int
    num_segments: int
    """Number of segment files: one for each append, fewer after merges."""
    num_bytes: int
    """Size of all live data files in bytes."""
    score_columns: tuple[ScoreColumnInfo, ...]
    drafts: tuple[DraftInfo, ...]

    @property
    def num_retained(self) -> int:
        """Number of samples that are not removed."""
        return self.snapshot.num_samples - self.num_removed


@dataclass(frozen=True, slots=True, kw_only=True)
class Collected:
    """Result of a collection, or of its dry run."""

    oldest_generation: int
    """The oldest snapshot that can still be opened."""
    num_files: int
    """Number of files removed."""
    num_bytes: int
    """Size of these files in bytes. A fork or an open reader can keep the space in use."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Compacted:
    """Result of a compaction."""

    num_commits: int
    """0 if there was nothing to merge."""
    num_segments_before: int
    num_segments: int
    """Number of files afterwards."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolProblem:
    """A fault found on disk."""

    file: str
    """Path relative to the pool; empty if the problem is not in one file."""
    offset: int
    """Byte offset of the damage, or of the block that contains it."""
    what: str


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """Result of a check that read every byte."""

    generation: int | None
    """Newest commit; None if the pool cannot be opened."""
    num_samples: int
    num_files: int
    num_bytes: int
    problems: tuple[PoolProblem, ...]

    @property
    def is_sound(self) -> bool:
        """Whether no problem was found."""
        return not self.problems


def pool_info(path: Path, settings: PoolSettings, info: _pool_rs.Info) -> PoolInfo:
    """The answer of the extension as ``PoolInfo``. Raises PoolCorruptedError for a source that is not JSON."""
    return PoolInfo(
        path=path,
        uuid=settings.uuid,
        vocab_size=settings.vocab_size,
        store_text=settings.store_text,
        tie_seed=settings.tie_seed,
        metadata=settings.metadata,
        snapshot=Snapshot(
            generation=info.snapshot.generation,
            hash=info.snapshot.hash,
            num_samples=info.snapshot.num_samples,
        ),
        num_removed=info.num_removed,
        num_prompts=info.num_prompts,
        num_segments=info.num_segments,
        num_bytes=info.num_bytes,
        score_columns=tuple(
            ScoreColumnInfo(
                name=column.name,
                version=column.version,
                source=stored_json(column.source or "{}", f"the source of {column.name}"),
                num_scored=column.num_scored,
                num_unscored=column.num_unscored,
                num_runs=column.num_runs,
                mean=column.mean,
                std=column.std,
                min=column.min,
                max=column.max,
            )
            for column in info.score_columns
        ),
        drafts=tuple(
            DraftInfo(
                name=draft.name,
                source=stored_json(draft.source, f"the source of {draft.name}"),
                num_covered=draft.end - info.num_removed,
            )
            for draft in info.drafts
        ),
    )
