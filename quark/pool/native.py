"""The durable pool: a thin, typed interface to the Rust extension.

``quark_pool_rs/FORMAT.md`` specifies the format and its guarantees. Threads can share a handle. After a fork the
child process can read through it but not append.
"""

from __future__ import annotations

import json
import operator
import os
import socket
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from quark import _pool_rs
from quark.pool.base import (
    RemainderRule,
    Retained,
    Sample,
    SampleBatch,
    Snapshot,
    TieRule,
)
from quark.pool.batch import BatchBuffers, PackedBatch, PoolBatch
from quark.pool.checks import as_rule, as_vector, bounded
from quark.pool.columns import REWARD_COLUMN
from quark.pool.defaults import COMPACTED_FILE, RESCORING_CHUNK
from quark.pool.info import (
    Collected,
    Compacted,
    PoolInfo,
    PoolProblem,
    PoolSettings,
    VerifyReport,
    pool_info,
    stored_json,
)
from quark.pool.native_batch import BatchArrays
from quark.pool.origin import Origin, reads
from quark.pool.rescore import Decoder, Rescored, RowScorer, Scorer, rescore
from quark.pool.sample_columns import NUMBER_COLUMNS
from quark.pool.sampling import (
    NativeQuantization,
    packed_batch,
    packed_into,
    padded_batch,
    padded_into,
    snapshot_of,
    unranked,
    unscored,
)
from quark.pool.scope import Scope, Score, refuse_remainder, says_all, values_of
from quark.types import Json

if TYPE_CHECKING:
    import polars as pl


class NativePool:
    """A pool on disk; implements ``quark.pool.base.SamplePool``.

    One process at a time can open a pool for writing. Any number can read. ``close``, or the end of the ``with``
    block, releases the writer's lock.
    """

    def __init__(self, path: Path, pool: _pool_rs.Pool) -> None:
        """``path`` is absolute: files are opened lazily, perhaps after the process has changed its directory."""
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
        """Create an empty pool and open it for writing. When this returns, the pool survives a power cut.

        Args:
            path: A path that does not exist, or an empty directory. The parent must exist.
            vocab_size: Token ids are below this. It decides how many bytes a stored token takes.
            store_text: Whether to store the text of each completion.
            tie_seed: Seed of the hash that orders equal scores.
            metadata: Stored with the pool and never interpreted.

        Raises:
            FileExistsError: ``path`` exists.
            PoolLockedError: Another process is creating a pool there.
        """
        path = Path(path).absolute()
        try:
            text = json.dumps(dict(metadata or {}), allow_nan=False)
        except RecursionError:
            raise ValueError("metadata is nested too deeply") from None
        pool = _pool_rs.Pool.create(
            path,
            uuid=uuid.uuid4().hex,
            vocab_size=bounded("vocab_size", vocab_size, 32),
            store_text=store_text,
            tie_seed=bounded("tie_seed", tie_seed, 64),
            metadata=text,
            holder=_holder(),
        )
        return cls(path, pool)

    @classmethod
    def open(cls, path: str | Path, *, writable: bool = False, snapshot: int | None = None) -> Self:
        """Open a pool.

        Args:
            path: The pool's directory.
            writable: Take the writer's lock, and clean up after an interrupted append.
            snapshot: The generation to show instead of the newest.

        Raises:
            FileNotFoundError: There is no pool at ``path``.
            PoolCorruptedError: Committed samples are damaged or missing.
            PoolVersionError: The pool has a newer format.
            PoolLockedError: Another process has the pool open for writing.
            ValueError: The pool has no such snapshot, or ``snapshot`` and ``writable`` were combined.
        """
        generation = None if snapshot is None else bounded("snapshot", snapshot, 64)
        holder = _holder() if writable else None
        absolute = Path(path).absolute()
        try:
            pool = _pool_rs.Pool.open(absolute, holder=holder, snapshot=generation)
        except FileNotFoundError as error:
            raise _no_pool(Path(path), error) from error
        return cls(absolute, pool)

    @reads
    def fork(self, path: str | Path) -> Self:
        """Create another pool with the samples of this handle's snapshot, and open it for writing.

        The two pools share data files through hard links, or copies if the file system has no hard links. They are
        independent otherwise. The new pool has its own uuid. Its generations continue from this snapshot, the oldest
        one that it can show. When this returns, the new pool survives a power cut. Until then ``path`` does not exist.

        Args:
            path: A path that does not exist. The parent must exist.

        Raises:
            FileExistsError: ``path`` exists.
            PoolCorruptedError: A file of the snapshot is missing, or is not a regular file.
            PoolSnapshotError: A collection has expired the snapshot.
            OSError: A disk operation failed. ``path`` does not exist.
        """
        self._pool.fork(Path(path).absolute(), uuid.uuid4().hex)
        return type(self).open(path, writable=True)

    def appends(self) -> list[_pool_rs.Append]:
        """The appends of ``snapshot``, by first id."""
        return self._pool.appends()

    def compact(self, *, max_samples: int = COMPACTED_FILE) -> Compacted:
        """Merge small files into large ones.

        Ids, samples, scores and draws do not change. Queries and ``open`` have fewer files to open. Each step is a
        commit, so an interruption loses at most one step. The small files remain for older snapshots until ``gc``
        removes them.

        Args:
            max_samples: Maximum number of samples in a file. A merge of 1,048,576 needs about 200 MB of memory.

        Raises:
            ValueError: ``max_samples`` < 1.
            PoolCorruptedError: A file to merge is damaged. It is left in place.
            PoolPoisonedError: An earlier sync failed. Reopen the pool.
            OSError: A disk operation failed. The next compaction continues.
        """
        max_samples = bounded("max_samples", max_samples, 31)
        if max_samples < 1:
            raise ValueError("max_samples is 0; a file has at least one sample")
        num_segments = self._pool.info().num_segments
        num_commits = 0
        while self._pool.compact_once(max_samples):
            num_commits += 1
        return Compacted(
            num_commits=num_commits,
            num_segments_before=num_segments,
            num_segments=self._pool.info().num_segments,
        )

    def retain(
        self,
        *,
        max_samples: int | None = None,
        max_rounds: int | None = None,
        before_round: int | None = None,
        dry_run: bool = False,
    ) -> Retained:
        """Remove the oldest appends that exceed a limit, in one commit. With ``dry_run``, only count them."""
        retained = self._pool.retain(
            None if max_samples is None else bounded("max_samples", max_samples, 64),
            None if max_rounds is None else bounded("max_rounds", max_rounds, 64),
            None if before_round is None else bounded("before_round", before_round, 32),
            dry_run,
        )
        return Retained(
            num_appends=retained.num_appends,
            num_samples=retained.num_samples,
            num_removed=retained.first,
        )

    def gc(self, *, keep_snapshots: int, dry_run: bool = False) -> Collected:
        """Expire old snapshots, and remove the files that only they need.

        This removes merged logs, runs and small files, replaced scores, discarded drafts, and the samples that
        ``retain`` removed. No other sample is removed. Expiring snapshots is a commit of its own and counts among
        the kept snapshots. If the pool has no more than ``keep_snapshots``, nothing is committed. Readers keep the
        files that they have open, and see the change after ``refresh``.

        Args:
            keep_snapshots: Number of newest snapshots to keep, at least 1.
            dry_run: Report what would be removed without removing it.

        Raises:
            ValueError: ``keep_snapshots`` < 1.
            PoolCorruptedError: A damaged log does not show which files are needed. Nothing was removed.
            PoolPoisonedError: An earlier sync failed. Reopen the pool.
            OSError: A disk operation failed. The next collection continues.
        """
        collected = self._pool.gc(bounded("keep_snapshots", keep_snapshots, 63), dry_run)
        return Collected(
            oldest_generation=collected.oldest_generation,
            num_files=collected.num_files,
            num_bytes=collected.num_bytes,
        )

    @staticmethod
    def verify(path: str | Path) -> VerifyReport:
        """Read every byte of a pool without changing it, and list all damage.

        Raises:
            FileNotFoundError: There is no pool at ``path``.
            OSError: The disk could not be read.
        """
        try:
            report = _pool_rs.verify(path)
        except FileNotFoundError as error:
            raise _no_pool(Path(path), error) from error
        return VerifyReport(
            generation=report.generation,
            num_samples=report.num_samples,
            num_files=report.num_files,
            num_bytes=report.num_bytes,
            problems=tuple(
                PoolProblem(file=problem.file, offset=problem.offset, what=problem.what)
                for problem in report.problems
            ),
        )

    def reopen(self) -> Self:
        """Open the same snapshot again, for reading.

        Raises:
            PoolSnapshotError: A collection has expired the snapshot.
        """
        try:
            return type(self).open(self._path, snapshot=self.snapshot.generation)
        except ValueError:
            self._origin.check()
            raise

    @property
    def path(self) -> Path:
        """The pool's directory, absolute."""
        return self._path

    @property
    def _origin(self) -> Origin:
        return Origin(self._path, self._pool.snapshot.generation)

    @property
    def settings(self) -> PoolSettings:
        """The settings that the pool was created with."""
        settings = self._pool.settings
        return PoolSettings(
            uuid=settings.uuid,
            vocab_size=settings.vocab_size,
            store_text=settings.store_text,
            tie_seed=settings.tie_seed,
            metadata=stored_json(settings.metadata, "the pool's metadata"),
        )

    @property
    def is_writable(self) -> bool:
        """Whether the pool was opened for writing."""
        return self._pool.is_writable

    @property
    def snapshot(self) -> Snapshot:
        """The commit that this handle shows."""
        return snapshot_of(self._pool.snapshot)

    @property
    def oldest_generation(self) -> int:
        """The oldest snapshot that can be opened: 0 unless the pool is a fork or some have expired."""
        return self._pool.oldest_generation

    @property
    def score_columns(self) -> tuple[str, ...]:
        """Names of the score columns in the snapshot that this handle shows."""
        return tuple(self._pool.view().score_columns)

    @property
    def num_removed(self) -> int:
        """Number of samples that are removed in the snapshot; ids below it raise IndexError."""
        return self._pool.view().num_removed

    @property
    def absent_columns(self) -> frozenset[str]:
        """Columns that the pool's version of the format lacks. They have no values."""
        return frozenset(
            column.name for column in NUMBER_COLUMNS if column.since > self._pool.format
        )

    @property
    def has_sampled_logprobs(self) -> bool:
        """Whether the pool's format has the column ``logprob_sampled``."""
        return "logprob_sampled" not in self.absent_columns

    def __len__(self) -> int:
        return self._pool.snapshot.num_samples

    def append(self, batch: SampleBatch) -> range:
        """Commit ``batch`` durably and return its ids; a known key writes nothing and returns its first ids."""
        arrays = BatchArrays.of(batch)
        try:
            return self._pool.append(arrays)
        except TypeError as error:
            if isinstance(error.__cause__, UnicodeEncodeError):
                raise ValueError(f"a text is not valid Unicode: {error.__cause__}") from error
            raise

    def find(self, key: str) -> range | None:
        """Ids that were appended under ``key``, removed ones included; None for an unknown key."""
        return self._pool.find(key)

    def refresh(self) -> Snapshot:
        """Move to the newest commit on disk and return it."""
        self._pool.refresh()
        return self.snapshot

    def draft_end(self, name: str) -> int | None:
        """The id at which a draft continues; None without a draft."""
        return self._pool.draft_end(name)

    def draft_source(self, name: str) -> str | None:
        """The JSON object that a draft was begun with; None without a draft."""
        drafts = self._pool.view().drafts
        return next((draft.source for draft in drafts if draft.name == name), None)

    def draft_scores(
        self, name: str, first: int, scores: NDArray[np.float32], *, source: str = "{}"
    ) -> None:
        """Commit scores [M] for the samples from ``first`` on, which is where the draft ends."""
        self._pool.draft_scores(
            name, source, bounded("first", first, 64), as_vector("scores", scores, np.float32)
        )

    def publish_scores(self, name: str) -> None:
        """Turn a complete draft into the score column of its name, in one commit."""
        self._pool.publish_scores(name)

    def discard_scores(self, name: str) -> None:
        """Delete a draft, in one commit. Raises ValueError if there is none."""
        self._pool.discard_scores(name)

    def rescore(
        self,
        name: str,
        scorer: Scorer | RowScorer,
        *,
        with_metadata: bool = False,
        source: Mapping[str, Json] | None = None,
        chunk_size: int = RESCORING_CHUNK,
        decode: Decoder | None = None,
        restart: bool = False,
        on_chunk: Callable[[int, int], object] | None = None,
    ) -> Rescored:
        """Score every sample again in resumable chunks; see ``quark.pool.rescore.rescore``."""
        return rescore(
            self,
            name,
            scorer,
            with_metadata=with_metadata,
            source=source,
            chunk_size=chunk_size,
            decode=decode,
            restart=restart,
            on_chunk=on_chunk,
        )

    @reads
    def quantize(
        self,
        num_quantiles: int,
        *,
        score: Score = REWARD_COLUMN,
        scope: Scope | None = None,
        ties: TieRule = TieRule.HASH,
        remainder: RemainderRule = RemainderRule.SPREAD,
    ) -> NativeQuantization:
        """Rank the snapshot and cut the ranking into ``num_quantiles``. Raises KeyError and ValueError."""
        count = bounded("num_quantiles", num_quantiles, 32)
        scope = scope or Scope()
        ties, remainder = (
            as_rule("ties", ties, TieRule),
            as_rule("remainder", remainder, RemainderRule),
        )
        view = self._pool.view()
        if isinstance(score, str) and scope.is_everything:
            quantization = view.quantize(count, score, ties, remainder)
        else:
            refuse_remainder(scope, remainder)
            quantization = view.quantize_values(
                count, self._values(view, score, scope), scope.per_prompt, ties, remainder
            )
        return NativeQuantization(
            quantization, count, Origin(self._path, quantization.snapshot.generation)
        )

    def _values(self, view: _pool_rs.View, score: Score, scope: Scope) -> NDArray[np.float32]:
        """The values to rank by. They are cached for the next quantization of the same snapshot."""
        if not says_all(score):
            return values_of(view, score, scope)
        key = (snapshot_of(view.snapshot), repr(score), scope)
        with self._lock:
            kept = self._kept_values
        if kept is None or kept[0] != key:
            kept = (key, values_of(view, score, scope))
            with self._lock:
                self._kept_values = kept
        return kept[1]

    @reads
    def column(self, name: str) -> NDArray[Any]:
        """[N] a provenance column in id order, with blanks for removed samples. Raises KeyError."""
        return self._pool.view().column(name)

    @reads
    def scores(self, name: str) -> NDArray[np.float32]:
        """[N] a score column in id order, NaN where a sample has no score. Raises KeyError."""
        return self._pool.view().scores(name)

    @reads
    def samples(self, ids: Sequence[int]) -> list[Sample]:
        """The samples with these ids, in the order given. Raises IndexError for an unknown or removed id."""
        size = len(self)
        ids = [operator.index(id) for id in ids]
        for id in ids:
            if not 0 <= id < size:
                raise IndexError(f"sample {id} is not in the pool, which holds {size} samples")
        return [Sample(**fields) for fields in self._pool.samples(ids)]

    @reads
    def arrow_rows(self, spans: Sequence[range], columns: Sequence[str]) -> bytes:
        """An Arrow file with columns of the segments, copied after their bytes were checked.

        Args:
            spans: Ids. The file has one row for each, in this order.
            columns: Names of columns in the segment files (``quark_pool_rs/FORMAT.md``), without scores.

        Raises:
            IndexError: The snapshot does not have an id.
            ValueError: The segments do not have a column.
            PoolCorruptedError: The samples are damaged.
        """
        return self._pool.rows(list(spans), list(columns))

    @reads
    def gather(
        self, ids: NDArray[np.uint64], *, pad_id: int, out: BatchBuffers | None = None
    ) -> PoolBatch:
        """The samples with these ids as a padded batch, without quantiles and scores. Raises IndexError."""
        ids = as_vector("ids", ids, np.uint64)
        if out is not None:
            return padded_into(out, self._pool.gather_into, ids, pad_id)
        return padded_batch(
            ids.copy(), unranked(ids), self._pool.gather(ids, pad_id), unscored(ids)
        )

    @reads
    def gather_packed(
        self, ids: NDArray[np.uint64], *, out: BatchBuffers | None = None
    ) -> PackedBatch:
        """The samples with these ids as flat arrays with offsets. Raises IndexError."""
        ids = as_vector("ids", ids, np.uint64)
        if out is not None:
            return packed_into(out, self._pool.gather_into, ids)
        return packed_batch(ids.copy(), unranked(ids), self._pool.pack(ids), unscored(ids))

    def scan(self) -> pl.LazyFrame:
        """The samples of this snapshot as a polars query, one row each; see ``quark.pool.scan``.

        Raises:
            PoolCorruptedError: The manifest is damaged. Damaged samples raise it when they are read.
            PoolSnapshotError: A collection has expired the snapshot.
        """
        from quark.pool.scan import scan  # polars is slow to import

        return scan(self)

    @reads
    def info(self) -> PoolInfo:
        """Counts and statistics, from one pass over the scores."""
        return pool_info(self._path, self.settings, self._pool.info())

    def close(self) -> None:
        """Release the writer's lock, if this handle has it. The handle can still read but no longer append."""
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


def _no_pool(path: Path, error: FileNotFoundError) -> FileNotFoundError:
    """An error that says what is at ``path`` instead of a pool."""
    if error.errno is not None:  # the error names a file inside a pool
        return error
    if path.is_dir():
        return FileNotFoundError(f"{path} is a directory, but not a pool")
    if path.exists():
        return FileNotFoundError(f"{path} is a file; a pool is a directory")
    return FileNotFoundError(f"there is no pool at {path}")


def _holder() -> str:
    since = datetime.now(UTC).isoformat(timespec="seconds")
    return f"locked by pid {os.getpid()} on host {socket.gethostname()} since {since}"
