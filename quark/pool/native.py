"""The durable pool: a thin, typed face of the Rust extension.

Formats and promises are in ``quark_pool_rs/FORMAT.md``. A handle may be shared by threads; after a fork
the child may read through it but not append.
"""

from __future__ import annotations

import functools
import itertools
import json
import operator
import os
import socket
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Concatenate, Generic, ParamSpec, Protocol, Self, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from quark import _pool_rs
from quark.errors import PoolCorruptedError, PoolError, PoolSnapshotError
from quark.pool.base import (
    PromptColumns,
    PromptRecord,
    RemainderRule,
    Retained,
    Sample,
    SampleBatch,
    SamplingMode,
    Snapshot,
    TieRule,
    age_weights,
)
from quark.pool.batch import BatchBuffers, PackedBatch, PoolBatch
from quark.pool.rescore import Decoder, Rescored, Scorer, rescore
from quark.pool.scope import Scope, Score, refuse_remainder, says_all, values_of
from quark.types import Json

if TYPE_CHECKING:
    import polars as pl

_Number = TypeVar("_Number", bound=np.generic)
_Batch = TypeVar("_Batch", bound=PoolBatch | PackedBatch)
_Place = TypeVar("_Place")
_Sizes = TypeVar("_Sizes")
_Given = ParamSpec("_Given")
_Read = TypeVar("_Read")
_Rule = TypeVar("_Rule", bound=StrEnum)


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


@dataclass(frozen=True, slots=True)
class _Origin:
    """What is read: a snapshot of the pool at a path."""

    path: Path
    generation: int

    def check(self) -> None:
        """Raise PoolSnapshotError where a collection has given the snapshot up."""
        try:
            newest = _pool_rs.Pool.open(self.path, holder=None, snapshot=None)
        except (PoolError, OSError):
            return
        oldest = newest.oldest_generation
        newest.close()
        if self.generation < oldest:
            raise PoolSnapshotError(
                f"snapshot {self.generation} of {self.path} was given up by a collection, which left those from "
                f"{oldest} on: refresh() the pool or open it anew"
            )


class _Reader(Protocol):
    @property
    def _origin(self) -> _Origin: ...


_AnyReader = TypeVar("_AnyReader", bound=_Reader)


def _reads(
    read: Callable[Concatenate[_AnyReader, _Given], _Read],
) -> Callable[Concatenate[_AnyReader, _Given], _Read]:
    """Raise PoolSnapshotError where what is missing is not damaged but was collected."""

    @functools.wraps(read)
    def checked(self: _AnyReader, /, *args: _Given.args, **kwargs: _Given.kwargs) -> _Read:
        try:
            return read(self, *args, **kwargs)
        except PoolCorruptedError:
            self._origin.check()
            raise

    return checked


class NativeSampler:
    """A stateless stream of minibatches; see ``quark.pool.base.Sampler``."""

    def __init__(self, sampler: _pool_rs.Sampler, origin: _Origin) -> None:
        self._sampler = sampler
        self._origin = origin

    @property
    def num_batches(self) -> int | None:
        return self._sampler.num_batches

    @_reads
    def draw(self, step: int) -> tuple[NDArray[np.uint64], NDArray[np.int16]]:
        return self._sampler.draw(_bounded("step", step, 64))

    @_reads
    def batch(self, step: int, *, pad_id: int, out: BatchBuffers | None = None) -> PoolBatch:
        step = _bounded("step", step, 64)
        if out is not None:
            return out.padded(*_into(out, self._sampler.batch_into, step, pad_id))
        (ids, quantiles), gathered, scores = self._sampler.batch(step, pad_id)
        return _pool_batch(ids, quantiles, gathered, scores)

    @_reads
    def packed(self, step: int, *, out: BatchBuffers | None = None) -> PackedBatch:
        step = _bounded("step", step, 64)
        if out is not None:
            return out.packed(*_into(out, self._sampler.batch_into, step, None))
        (ids, quantiles), packed, scores = self._sampler.packed(step)
        return _packed_batch(ids, quantiles, packed, scores)

    def stream(
        self,
        start: int = 0,
        stop: int | None = None,
        *,
        pad_id: int,
        depth: int = 2,
        out: Sequence[BatchBuffers] = (),
    ) -> NativeStream[PoolBatch]:
        return NativeStream(self._start(start, stop, pad_id, depth), _pool_batch, out, self._origin)

    def packed_stream(
        self,
        start: int = 0,
        stop: int | None = None,
        *,
        depth: int = 2,
        out: Sequence[BatchBuffers] = (),
    ) -> NativeStream[PackedBatch]:
        return NativeStream(self._start(start, stop, None, depth), _packed_batch, out, self._origin)

    def _start(
        self, start: int, stop: int | None, pad_id: int | None, depth: int
    ) -> _pool_rs.Stream:
        end = self.num_batches if stop is None else stop
        return self._sampler.stream(
            _bounded("start", start, 64),
            (1 << 64) - 1 if end is None else _bounded("stop", end, 64),
            pad_id,
            _bounded("depth", depth, 16),
        )


class NativeStream(Generic[_Batch]):
    """Batches that a thread of the extension prepares; see ``quark.pool.base.BatchStream``."""

    def __init__(
        self,
        stream: _pool_rs.Stream,
        dress: Callable[[NDArray[np.uint64], NDArray[np.int16], Any, NDArray[np.float32]], _Batch],
        out: Sequence[BatchBuffers],
        origin: _Origin,
    ) -> None:
        self._stream = stream
        self._origin = origin
        self._dress = dress
        self._ring = itertools.cycle(out) if out else None

    def __iter__(self) -> Self:
        return self

    @_reads
    def __next__(self) -> _Batch:
        prepared = self._stream.next()
        if prepared is None:
            raise StopIteration
        (ids, quantiles), tokens, scores = prepared
        batch = self._dress(ids, quantiles, tokens, scores)
        return batch if self._ring is None else next(self._ring).copied(batch)

    def close(self) -> None:
        self._stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class NativeQuantization:
    """The ranking of one snapshot, cut into quantiles; see ``quark.pool.base.Quantization``."""

    def __init__(
        self, quantization: _pool_rs.Quantization, num_quantiles: int, origin: _Origin
    ) -> None:
        self._quantization = quantization
        self._origin = origin
        self._num_quantiles = num_quantiles

    @property
    def num_quantiles(self) -> int:
        return self._num_quantiles

    @property
    def snapshot(self) -> Snapshot:
        return _snapshot(self._quantization.snapshot)

    @property
    @_reads
    def counts(self) -> NDArray[np.int64]:
        return self._quantization.counts

    @property
    @_reads
    def lower_bounds(self) -> NDArray[np.float32]:
        return self._quantization.lower_bounds

    @property
    @_reads
    def num_unranked(self) -> int:
        return self._quantization.num_unranked

    @_reads
    def labels(self) -> NDArray[np.int16]:
        return self._quantization.labels()

    @_reads
    def labels_of(self, ids: NDArray[np.uint64]) -> NDArray[np.int16]:
        return self._quantization.labels_of(_array("ids", ids, np.uint64))

    @_reads
    def sampler(
        self,
        *,
        batch_size: int,
        seed: int,
        mode: SamplingMode = SamplingMode.STRATIFIED,
        quantiles: Sequence[int] | None = None,
        rank: int = 0,
        world_size: int = 1,
        age_half_life: float | None = None,
        max_uses: int | None = None,
        bucket_window: int = 1,
    ) -> NativeSampler:
        settings = _SamplerSettings(
            batch_size=_bounded("batch_size", batch_size, 32),
            seed=_bounded("seed", seed, 64),
            mode=_rule("mode", mode, SamplingMode),
            quantiles=None if quantiles is None else list(quantiles),
            rank=_bounded("rank", rank, 32),
            world_size=_bounded("world_size", world_size, 32),
            weights=None if age_half_life is None else age_weights(age_half_life),
            max_uses=None if max_uses is None else _bounded("max_uses", max_uses, 32),
            bucket_window=_bounded("bucket_window", bucket_window, 32),
        )
        return NativeSampler(self._quantization.sampler(settings), self._origin)


class NativePool:
    """A pool on disk; satisfies ``quark.pool.base.SamplePool``.

    Exactly one process may hold a pool open for writing; any number may read. ``close`` (or leaving the
    ``with`` block) gives the writer's lock back.
    """

    def __init__(self, path: Path, pool: _pool_rs.Pool) -> None:
        """``path`` is absolute: files are opened as they are needed, also after the process went elsewhere."""
        self._path = path
        self._pool = pool
        self._lock = threading.Lock()
        self._kept_values: tuple[object, NDArray[np.float32]] | None = None

    @classmethod
    def create(
        cls,
        path: str | Path,
        *,
        vocab_size: int,
        store_text: bool = True,
        tie_seed: int = 0,
        metadata: Mapping[str, Json] | None = None,
    ) -> Self:
        """Make an empty pool and open it for writing; on return it survives a power cut.

        Args:
            path: Must not exist, or be empty; its parent must exist.
            vocab_size: Token ids are below this; decides how wide they are stored.
            store_text: Whether every completion carries its text.
            tie_seed: Seed of the hash that cuts blocks of equal scores.
            metadata: Kept with the pool and never looked at.

        Raises:
            FileExistsError: Something is at ``path``.
            PoolLockedError: Another process is making a pool there.
        """
        path = Path(path).absolute()
        pool = _pool_rs.Pool.create(
            path,
            uuid=uuid.uuid4().hex,
            vocab_size=_bounded("vocab_size", vocab_size, 32),
            store_text=store_text,
            tie_seed=_bounded("tie_seed", tie_seed, 64),
            metadata=json.dumps(dict(metadata or {}), allow_nan=False),
            holder=_holder(),
        )
        return cls(path, pool)

    @classmethod
    def open(cls, path: str | Path, *, writable: bool = False, snapshot: int | None = None) -> Self:
        """Open a pool.

        Args:
            path: The pool's directory.
            writable: Take the writer's lock, and tidy up after an interrupted append.
            snapshot: Show this generation instead of the newest.

        Raises:
            FileNotFoundError: There is no pool.
            PoolCorruptedError: Acknowledged samples are damaged or gone.
            PoolVersionError: A newer format.
            PoolLockedError: Another process writes.
            ValueError: The pool has no such snapshot, or it was to be writable.
        """
        generation = None if snapshot is None else _bounded("snapshot", snapshot, 64)
        holder = _holder() if writable else None
        absolute = Path(path).absolute()
        try:
            pool = _pool_rs.Pool.open(absolute, holder=holder, snapshot=generation)
        except FileNotFoundError as error:
            raise _no_pool(Path(path), error) from error
        return cls(absolute, pool)

    @_reads
    def fork(self, path: str | Path) -> Self:
        """Make another pool that holds what this handle shows, and open it for writing.

        The two share their data files by hard links (copies, where the file system refuses those) and are
        independent from then on. The new pool has its own uuid; its generations go on from this snapshot,
        which is the oldest one that it can show. On return it survives a power cut; before, nothing is at
        ``path``.

        Args:
            path: Must not exist; its parent must.

        Raises:
            FileExistsError: Something is at ``path``.
            PoolCorruptedError: A file of the snapshot is missing.
            PoolSnapshotError: A collection has given the snapshot up.
            OSError: The disk refused; nothing is at ``path``.
        """
        self._pool.fork(Path(path).absolute(), uuid.uuid4().hex)
        return type(self).open(path, writable=True)

    def appends(self) -> list[tuple[str, int, str, int, int, int, int]]:
        """Per append, by first id: file below ``path``, first id in it, key, first id, samples, round, chunk."""
        return self._pool.appends()

    def compact(self, *, max_samples: int = 1 << 20) -> Compacted:
        """Make few large files of many small ones.

        Ids, samples, scores and every draw stay what they are; queries and ``open`` have less to open. Each
        step is a commit of its own, so an interruption loses at most one. The small files stay for the
        snapshots that show them, until ``gc``.

        Args:
            max_samples: In one file, at most; 1,048,576 take some 200 MB of memory once.

        Raises:
            ValueError: ``max_samples`` < 1.
            PoolCorruptedError: A file that is to be rewritten is damaged; it stays.
            PoolPoisonedError: An earlier sync failed; reopen.
            OSError: The disk refused; the next compaction goes on.
        """
        max_samples = _bounded("max_samples", max_samples, 31)
        if max_samples < 1:
            raise ValueError("max_samples is 0; a file has at least one sample")
        num_segments = self._pool.info()["num_segments"]
        num_commits = 0
        while self._pool.compact_once(max_samples):
            num_commits += 1
        return Compacted(
            num_commits=num_commits,
            num_segments_before=num_segments,
            num_segments=self._pool.info()["num_segments"],
        )

    def retain(
        self,
        *,
        max_samples: int | None = None,
        max_rounds: int | None = None,
        before_round: int | None = None,
        dry_run: bool = False,
    ) -> Retained:
        first, num_appends, num_samples = self._pool.retain(
            None if max_samples is None else _bounded("max_samples", max_samples, 64),
            None if max_rounds is None else _bounded("max_rounds", max_rounds, 64),
            None if before_round is None else _bounded("before_round", before_round, 32),
            dry_run,
        )
        return Retained(num_appends=num_appends, num_samples=num_samples, num_removed=first)

    def gc(self, *, keep_snapshots: int, dry_run: bool = False) -> Collected:
        """Give old snapshots up, and remove the files that only they need.

        What goes are logs, runs and small files that were merged, scores that were replaced, drafts that were
        discarded, and the samples that ``retain`` removed; no other sample. Giving up is itself a commit and counts among the kept snapshots; where
        there are no more than that already, nothing is committed. Readers go on reading what they have
        opened, and see the rest after ``refresh``.

        Args:
            keep_snapshots: The newest so many stay; at least 1.
            dry_run: Change nothing, and say what would go.

        Raises:
            ValueError: ``keep_snapshots`` < 1.
            PoolCorruptedError: A log does not say what is needed; nothing was removed.
            PoolPoisonedError: An earlier sync failed; reopen.
            OSError: The disk refused; the next collection goes on.
        """
        oldest, num_files, num_bytes = self._pool.gc(
            _bounded("keep_snapshots", keep_snapshots, 63), dry_run
        )
        return Collected(oldest_generation=oldest, num_files=num_files, num_bytes=num_bytes)

    @staticmethod
    def verify(path: str | Path) -> VerifyReport:
        """Read every byte of a pool, without changing it, and list everything that is wrong.

        Raises:
            FileNotFoundError: There is no pool.
        """
        try:
            generation, num_samples, num_files, num_bytes, problems = _pool_rs.verify(path)
        except FileNotFoundError as error:
            raise _no_pool(Path(path), error) from error
        return VerifyReport(
            generation=generation,
            num_samples=num_samples,
            num_files=num_files,
            num_bytes=num_bytes,
            problems=tuple(
                PoolProblem(file=file, offset=offset, what=what) for file, offset, what in problems
            ),
        )

    def reopen(self) -> Self:
        """Another handle on the same snapshot, which only reads.

        Raises:
            PoolSnapshotError: A collection has given the snapshot up.
        """
        try:
            return type(self).open(self._path, snapshot=self.snapshot.generation)
        except ValueError:
            self._origin.check()
            raise

    @property
    def path(self) -> Path:
        return self._path

    @property
    def _origin(self) -> _Origin:
        return _Origin(self._path, self._pool.snapshot[0])

    @property
    def settings(self) -> PoolSettings:
        """What the pool was created with."""
        uuid_, vocab_size, store_text, tie_seed, metadata = self._pool.settings
        return PoolSettings(
            uuid=uuid_,
            vocab_size=vocab_size,
            store_text=store_text,
            tie_seed=tie_seed,
            metadata=json.loads(metadata),
        )

    @property
    def is_writable(self) -> bool:
        """Whether the pool was opened for writing."""
        return self._pool.is_writable

    @property
    def snapshot(self) -> Snapshot:
        return _snapshot(self._pool.snapshot)

    @property
    def oldest_generation(self) -> int:
        """The oldest snapshot that can be opened: 0, unless the pool is a fork or gave some up."""
        return self._pool.oldest_generation

    @property
    def score_columns(self) -> tuple[str, ...]:
        return tuple(self._pool.view().score_columns)

    @property
    def num_removed(self) -> int:
        return self._pool.view().num_removed

    def __len__(self) -> int:
        return self._pool.snapshot[2]

    def append(self, batch: SampleBatch) -> range:
        prompts = _columns(batch.prompts)
        texts = batch.completion_texts
        arrays = _BatchArrays(
            key=batch.key,
            prompt_tokens=_array("token_ids", prompts.token_ids, np.uint32),
            prompt_offsets=_array("offsets", prompts.offsets, np.int64),
            prompt_texts=None if prompts.texts is None else list(prompts.texts),
            prompt_metadata=None if prompts.metadata is None else list(prompts.metadata),
            prompt_index=_array("prompt_index", batch.prompt_index, np.uint32),
            completion_tokens=_array("completion_tokens", batch.completion_tokens, np.uint32),
            completion_offsets=_array("completion_offsets", batch.completion_offsets, np.int64),
            completion_texts=None if texts is None else list(texts),
            finish_reasons=_array("finish_reasons", batch.finish_reasons, np.uint8),
            round=_bounded("round", batch.round, 32),
            chunk=_bounded("chunk", batch.chunk, 32),
            policy_step=_bounded("policy_step", batch.policy_step, 32),
            reward_tokens=_array("reward_tokens", batch.reward_tokens, np.int16),
            settings=batch.settings,
            seeds=_array("seeds", batch.seeds, np.uint64),
            logprob_policy=_array("logprob_policy", batch.logprob_policy, np.float32),
            logprob_reference=_array("logprob_reference", batch.logprob_reference, np.float32),
            scores=[
                (name, _array(f"scores[{name!r}]", values, np.float32))
                for name, values in batch.scores.items()
            ],
        )
        try:
            first, end = self._pool.append(arrays)
        except TypeError as error:
            if isinstance(error.__cause__, UnicodeEncodeError):
                raise ValueError(f"a text is not valid Unicode: {error.__cause__}") from error
            raise
        return range(first, end)

    def find(self, key: str) -> range | None:
        ids = self._pool.find(key)
        return None if ids is None else range(*ids)

    def refresh(self) -> Snapshot:
        self._pool.refresh()
        return self.snapshot

    def draft_end(self, name: str) -> int | None:
        return self._pool.draft_end(name)

    def draft_source(self, name: str) -> str | None:
        drafts = self._pool.view().drafts
        return next((source for draft, source, _ in drafts if draft == name), None)

    def draft_scores(
        self, name: str, first: int, scores: NDArray[np.float32], *, source: str = "{}"
    ) -> None:
        self._pool.draft_scores(
            name, source, _bounded("first", first, 64), _array("scores", scores, np.float32)
        )

    def publish_scores(self, name: str) -> None:
        self._pool.publish_scores(name)

    def discard_scores(self, name: str) -> None:
        self._pool.discard_scores(name)

    def rescore(
        self,
        name: str,
        scorer: Scorer,
        *,
        source: Mapping[str, Json] | None = None,
        chunk_size: int = 8192,
        decode: Decoder | None = None,
        restart: bool = False,
        on_chunk: Callable[[int, int], object] | None = None,
    ) -> Rescored:
        """Score every sample anew in resumable chunks; see ``quark.pool.rescore.rescore``."""
        return rescore(
            self,
            name,
            scorer,
            source=source,
            chunk_size=chunk_size,
            decode=decode,
            restart=restart,
            on_chunk=on_chunk,
        )

    @_reads
    def quantize(
        self,
        num_quantiles: int,
        *,
        score: Score = "reward",
        scope: Scope | None = None,
        ties: TieRule = TieRule.HASH,
        remainder: RemainderRule = RemainderRule.SPREAD,
    ) -> NativeQuantization:
        count = _bounded("num_quantiles", num_quantiles, 32)
        scope = scope or Scope()
        ties, remainder = _rule("ties", ties, TieRule), _rule("remainder", remainder, RemainderRule)
        view = self._pool.view()
        if isinstance(score, str) and scope.is_everything:
            quantization = view.quantize(count, score, ties, remainder)
        else:
            refuse_remainder(scope, remainder)
            quantization = view.quantize_values(
                count, self._values(view, score, scope), scope.per_prompt, ties, remainder
            )
        return NativeQuantization(
            quantization, count, _Origin(self._path, quantization.snapshot[0])
        )

    def _values(self, view: _pool_rs.View, score: Score, scope: Scope) -> NDArray[np.float32]:
        """What to rank by; kept for the next cut of the same snapshot."""
        if not says_all(score):
            return values_of(view, score, scope)
        key = (view.snapshot, repr(score), scope)
        with self._lock:
            kept = self._kept_values
        if kept is None or kept[0] != key:
            kept = (key, values_of(view, score, scope))
            with self._lock:
                self._kept_values = kept
        return kept[1]

    @_reads
    def column(self, name: str) -> NDArray[Any]:
        return self._pool.view().column(name)

    @_reads
    def scores(self, name: str) -> NDArray[np.float32]:
        return self._pool.view().scores(name)

    @_reads
    def samples(self, ids: Sequence[int]) -> list[Sample]:
        size = len(self)
        ids = [operator.index(id) for id in ids]
        for id in ids:
            if not 0 <= id < size:
                raise IndexError(f"sample {id} is not in the pool, which holds {size} samples")
        return [Sample(**fields) for fields in self._pool.samples(ids)]

    @_reads
    def gather(
        self, ids: NDArray[np.uint64], *, pad_id: int, out: BatchBuffers | None = None
    ) -> PoolBatch:
        ids = _array("ids", ids, np.uint64)
        if out is not None:
            return out.padded(len(ids), *_into(out, self._pool.gather_into, ids, pad_id))
        return _pool_batch(
            ids.copy(), _unranked(ids), self._pool.gather(ids, pad_id), _unscored(ids)
        )

    @_reads
    def gather_packed(
        self, ids: NDArray[np.uint64], *, out: BatchBuffers | None = None
    ) -> PackedBatch:
        ids = _array("ids", ids, np.uint64)
        if out is not None:
            return out.packed(len(ids), *_into(out, self._pool.gather_into, ids, None))
        return _packed_batch(ids.copy(), _unranked(ids), self._pool.pack(ids), _unscored(ids))

    def scan(self) -> pl.LazyFrame:
        """The samples of this snapshot as a polars query, one row each; see ``quark.pool.scan``.

        Raises:
            PoolCorruptedError: The manifest is damaged. Damaged samples raise it when they are read.
            PoolSnapshotError: A collection has given the snapshot up.
        """
        from quark.pool.scan import scan  # polars is slow to import and only this needs it

        return scan(self)

    @_reads
    def info(self) -> PoolInfo:
        """Counts and statistics; one pass over the scores."""
        facts = self._pool.info()
        uuid_, vocab_size, store_text, tie_seed, metadata = self._pool.settings
        return PoolInfo(
            path=self._path,
            uuid=uuid_,
            vocab_size=vocab_size,
            store_text=store_text,
            tie_seed=tie_seed,
            metadata=json.loads(metadata),
            snapshot=_snapshot(facts["snapshot"]),
            num_removed=facts["num_removed"],
            num_prompts=facts["num_prompts"],
            num_segments=facts["num_segments"],
            num_bytes=facts["num_bytes"],
            score_columns=tuple(
                ScoreColumnInfo(
                    name=name,
                    version=version,
                    source=json.loads(source or "{}"),
                    num_scored=scored,
                    num_unscored=unscored,
                    num_runs=runs,
                    mean=mean,
                    std=std,
                    min=low,
                    max=high,
                )
                for (name, version, source), (scored, unscored, runs), (
                    mean,
                    std,
                    low,
                    high,
                ) in facts["score_columns"]
            ),
            drafts=tuple(
                DraftInfo(
                    name=name,
                    source=json.loads(source),
                    num_covered=end - facts["num_removed"],
                )
                for name, source, end in facts["drafts"]
            ),
        )

    def close(self) -> None:
        self._pool.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __reduce__(self) -> str:
        raise TypeError("a pool cannot be pickled: open it by its path where it is needed")


def publish_directory(staged: Path, final: Path) -> None:
    """Sync every file in ``staged`` and the directory, rename it to ``final``, sync the parent.

    On return ``final`` survives a power cut with all that was in ``staged``; before the rename nothing is
    visible under that name. Both must lie on one file system.

    Raises:
        FileExistsError: ``final`` exists.
        ValueError: ``staged`` holds something that is neither a file nor a directory.
    """
    _pool_rs.publish_directory(staged, final)


@dataclass(frozen=True, slots=True, kw_only=True)
class _BatchArrays:
    """A ``SampleBatch`` as the extension reads it: by attribute, contiguous, of exact types."""

    key: str
    prompt_tokens: NDArray[np.uint32]
    prompt_offsets: NDArray[np.int64]
    prompt_texts: list[str] | None
    prompt_metadata: list[str] | None
    prompt_index: NDArray[np.uint32]
    completion_tokens: NDArray[np.uint32]
    completion_offsets: NDArray[np.int64]
    completion_texts: list[str] | None
    finish_reasons: NDArray[np.uint8]
    round: int
    chunk: int
    policy_step: int
    reward_tokens: NDArray[np.int16]
    settings: str
    seeds: NDArray[np.uint64]
    logprob_policy: NDArray[np.float32]
    logprob_reference: NDArray[np.float32]
    scores: list[tuple[str, NDArray[np.float32]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class _SamplerSettings:
    """What the extension's sampler reads, by attribute."""

    batch_size: int
    seed: int
    mode: str
    quantiles: list[int] | None
    rank: int
    world_size: int
    weights: list[int] | None
    max_uses: int | None
    bucket_window: int


def _snapshot(fields: tuple[int, str, int]) -> Snapshot:
    generation, digest, num_samples = fields
    return Snapshot(generation=generation, hash=digest, num_samples=num_samples)


def _pool_batch(
    ids: NDArray[np.uint64],
    quantiles: NDArray[np.int16],
    gathered: _pool_rs.Gathered,
    scores: NDArray[np.float32],
) -> PoolBatch:
    prompts, prompt_lengths, completions, completion_lengths = gathered
    return PoolBatch(
        ids=ids,
        quantiles=quantiles,
        prompt_tokens=prompts,
        prompt_lengths=prompt_lengths,
        completion_tokens=completions,
        completion_lengths=completion_lengths,
        scores=scores,
    )


def _packed_batch(
    ids: NDArray[np.uint64],
    quantiles: NDArray[np.int16],
    packed: _pool_rs.Packed,
    scores: NDArray[np.float32],
) -> PackedBatch:
    prompts, prompt_offsets, completions, completion_offsets = packed
    return PackedBatch(
        ids=ids,
        quantiles=quantiles,
        prompt_tokens=prompts,
        prompt_offsets=prompt_offsets,
        completion_tokens=completions,
        completion_offsets=completion_offsets,
        scores=scores,
    )


def _unranked(ids: NDArray[np.uint64]) -> NDArray[np.int16]:
    return np.full(len(ids), -1, np.int16)


def _unscored(ids: NDArray[np.uint64]) -> NDArray[np.float32]:
    return np.full(len(ids), np.nan, np.float32)


def _into(
    out: BatchBuffers,
    write: Callable[[_Place, int | None, BatchBuffers], _Sizes],
    place: _Place,
    pad_id: int | None,
) -> _Sizes:
    """What ``write`` says of the batch that it wrote into ``out``."""
    try:
        return write(place, pad_id, out)
    except TypeError as error:
        raise ValueError(
            f"out does not hold writable contiguous vectors of the types of BatchBuffers: {error}"
        ) from error


def _array(name: str, values: ArrayLike, dtype: type[_Number]) -> NDArray[_Number]:
    """``values`` as a contiguous vector of ``dtype``; ValueError where that would change a value."""
    given = np.asarray(values)
    if given.ndim != 1:
        raise ValueError(f"{name} has {given.ndim} dimensions; it must be a vector")
    if given.dtype == dtype:
        return np.ascontiguousarray(given)
    is_float = np.issubdtype(dtype, np.floating)
    if given.size and given.dtype.kind not in ("iuf" if is_float else "iu"):
        raise ValueError(f"{name} has the type {given.dtype}; it must be {np.dtype(dtype)}")
    with np.errstate(all="ignore"):
        converted = np.ascontiguousarray(given.astype(dtype))
    # Rounding to float32 is what a float column is for; an integer must stay what it is, and a number finite.
    is_kept = (
        np.array_equal(np.isinf(converted), np.isinf(given))
        if is_float
        else np.array_equal(converted, given)
    )
    if not is_kept:
        raise ValueError(f"{name} holds values that do not fit into {np.dtype(dtype)}")
    return converted


def _columns(prompts: Sequence[PromptRecord]) -> PromptColumns:
    """Prompts one after another."""
    if isinstance(prompts, PromptColumns):
        return prompts
    nothing = np.empty(0, np.uint32)
    vectors = [prompt.token_ids for prompt in prompts]
    try:
        # A batch has thousands of prompts, nearly always vectors of the right type: ask once for all.
        tokens = np.concatenate([nothing, *vectors], casting="no", dtype=np.uint32)
    except (TypeError, ValueError):
        vectors = [_array("token_ids", vector, np.uint32) for vector in vectors]
        tokens = np.concatenate([nothing, *vectors])
    offsets = np.zeros(len(prompts) + 1, np.int64)
    np.cumsum(np.fromiter(map(len, vectors), np.int64, len(vectors)), out=offsets[1:])
    return PromptColumns(
        token_ids=tokens,
        offsets=offsets,
        texts=[prompt.text for prompt in prompts],
        metadata=[prompt.metadata for prompt in prompts],
    )


def _rule(name: str, value: str, rules: type[_Rule]) -> _Rule:
    """``value`` as one of ``rules``; ValueError naming them."""
    try:
        return rules(value)
    except ValueError:
        raise ValueError(f"{name} is {value!r}; there are {', '.join(rules)}") from None


def _bounded(name: str, value: int, bits: int) -> int:
    if not 0 <= value < 1 << bits:
        raise ValueError(f"{name} is {value}; it must be at least 0 and below 2**{bits}")
    return value


def _no_pool(path: Path, error: FileNotFoundError) -> FileNotFoundError:
    """``error``, saying what is at ``path`` in place of a pool."""
    if error.errno is not None:  # a file inside of a pool, which it names
        return error
    if path.is_dir():
        return FileNotFoundError(f"{path} is a directory, but not a pool")
    if path.exists():
        return FileNotFoundError(f"{path} is a file; a pool is a directory")
    return FileNotFoundError(f"there is no pool at {path}")


def _holder() -> str:
    since = datetime.now(UTC).isoformat(timespec="seconds")
    return f"locked by pid {os.getpid()} on host {socket.gethostname()} since {since}"
