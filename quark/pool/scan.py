"""A pool as a ``polars.LazyFrame``: one row per sample of a pinned snapshot.

Columns have the names of ``quark.pool.base.Sample``, then ``key``, then the score columns under their own
names (``score:<name>`` where one is called like another column). Scores and log-probabilities are null
where there is none: a NaN would pass every ``>`` of polars and poison every mean.

A query reads what it needs and no more. Ids, keys, rounds, chunks and scores are known before a segment is
read, and policy steps from one sample of each append, so the parts of the predicate that speak of these alone
decide which segments are; of those, only the columns that the query names.

Damage is reported here too, never served. Numbers, texts and tokens are read by polars from the segment
files, after the extension was asked for at least one row in every 4096-byte block that holds them, so that
it has checked the block; prompts, settings and scores come from the extension itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import polars as pl
from numpy.typing import NDArray
from polars.io.plugins import register_io_source

from quark.pool.base import Sample
from quark.pool.segments import Segment, segments_of

if TYPE_CHECKING:
    from quark.pool.native import NativePool

SCORE_PREFIX = "score:"
"""What a score column's name begins with where the plain name is taken."""

COLUMNS: dict[str, pl.DataType] = {
    "id": pl.UInt64(),
    "prompt_id": pl.UInt32(),
    "prompt_text": pl.String(),
    "prompt_tokens": pl.List(pl.UInt32()),
    "prompt_metadata": pl.String(),
    "completion_tokens": pl.List(pl.UInt32()),
    "completion_text": pl.String(),
    "finish_reason": pl.UInt8(),
    "round": pl.UInt32(),
    "chunk": pl.UInt32(),
    "policy_step": pl.UInt32(),
    "reward_token": pl.Int16(),
    "settings": pl.String(),
    "seed": pl.UInt64(),
    "logprob_policy": pl.Float32(),
    "logprob_reference": pl.Float32(),
    "key": pl.String(),
}
"""The columns that every pool has, in the types that hold their values."""
SCANNED = COLUMNS | dict.fromkeys(
    ("id", "prompt_id", "finish_reason", "round", "chunk", "policy_step"), pl.Int64()
)
"""The same as a scan shows them: what a query subtracts can be below 0. Float32 columns follow, one per score column."""

_IN_MANIFEST = ("key", "round", "chunk")
_IN_SEGMENT = {
    "prompt_id": "prompt",
    "completion_tokens": "completion",
    "completion_text": "completion_text",
    "finish_reason": "finish",
    "policy_step": "policy_step",
    "reward_token": "reward_token",
    "seed": "seed",
    "logprob_policy": "logprob_policy",
    "logprob_reference": "logprob_reference",
}
"""Column -> its name in the segment files."""
_LOOKED_UP = {
    "prompt_text": "prompt",
    "prompt_tokens": "prompt",
    "prompt_metadata": "prompt",
    "settings": "settings",
}
"""Column -> the segment files' column with the number of the thing, which is stored once."""

_BLOCK_BYTES = 4096
_ROWS_AT_ONCE = 32_768


def scan(pool: NativePool) -> pl.LazyFrame:
    """The samples of ``pool.snapshot``, whatever is appended or closed later.

    Returns:
        One row per sample in id order: ``SCANNED``, then one Float32 column per score column. Collecting it
        takes memory for what it reads and 4 bytes per sample for each score column it names.

    Raises:
        PoolCorruptedError: The manifest is damaged. Damaged samples raise it when they are read.
    """
    # A handle of its own: the one that was given may be refreshed or closed.
    pinned = pool.reopen()
    source = _Source(pinned, segments_of(pinned))
    return register_io_source(source.read, schema=source.schema, validate_schema=True, is_pure=True)


def score_column(name: str) -> str:
    """The name of a score column in a scan."""
    return SCORE_PREFIX + name if name in COLUMNS else name


@dataclass(frozen=True, slots=True)
class _Piece:
    """Rows of one segment."""

    segment: Segment
    rows: range

    @property
    def ids(self) -> range:
        return range(self.segment.first + self.rows.start, self.segment.first + self.rows.stop)


class _Source:
    """What polars calls to read a pool."""

    def __init__(self, pool: NativePool, segments: Sequence[Segment]) -> None:
        self._pool = pool
        self._segments = segments
        self._starts = np.array([segment.first for segment in segments], np.int64)
        self._manifest = pl.DataFrame(
            {name: [getattr(segment, name) for segment in segments] for name in _IN_MANIFEST},
            schema={name: SCANNED[name] for name in _IN_MANIFEST},
        )
        self._score_names = {score_column(name): name for name in pool.score_columns}
        self.schema = SCANNED | dict.fromkeys(self._score_names, pl.Float32())

    def read(
        self,
        with_columns: list[str] | None,
        predicate: pl.Expr | None,
        n_rows: int | None,
        batch_size: int | None,
    ) -> Iterator[pl.DataFrame]:
        """Frames of at most ``batch_size`` rows: of the first ``n_rows`` samples those that ``predicate`` keeps."""
        wanted = list(self.schema) if with_columns is None else with_columns
        tested = set() if predicate is None else set(predicate.meta.root_names())
        needed = [name for name in self.schema if name in tested or name in wanted]
        of_appends = self._of_appends(with_policy_step="policy_step" in tested)
        known = {"id", *of_appends.columns, *self._score_names}
        if not self._pool.settings.store_text:
            known.add("completion_text")
        conditions = [] if predicate is None else _conjuncts(predicate)
        early = [
            condition for condition in conditions if known.issuperset(condition.meta.root_names())
        ]
        scores = {
            name: self._pool.scores(score)
            for name, score in self._score_names.items()
            if name in needed
        }
        files = _SegmentFiles(self._pool, [name for name in needed if name not in known])

        first, end = self._pool.num_removed, len(self._pool)
        end = end if n_rows is None else min(first + n_rows, end)
        step = min(batch_size or _ROWS_AT_ONCE, _ROWS_AT_ONCE)
        for start in range(first, end, step):
            ids = range(start, min(start + step, end))
            facts = self._known(ids, [name for name in needed if name in known], of_appends, scores)
            kept = _kept(facts, early, len(ids))
            pieces = [
                piece
                for piece in (_narrowed(piece, kept, start) for piece in self._pieces(ids))
                if piece is not None
            ]
            if not pieces:
                continue
            read = pl.concat([files.read(piece) for piece in pieces])
            rows = np.concatenate([np.arange(p.ids.start, p.ids.stop) for p in pieces]) - start
            frame = pl.concat([facts[rows], read], how="horizontal")
            yield (frame if predicate is None else frame.filter(predicate)).select(wanted)

    def _pieces(self, ids: range) -> Iterator[_Piece]:
        at = int(np.searchsorted(self._starts, ids.start, side="right")) - 1
        while at < len(self._segments) and self._segments[at].first < ids.stop:
            segment = self._segments[at]
            start, stop = ids.start - segment.first, ids.stop - segment.first
            yield _Piece(segment, range(max(start, 0), min(stop, segment.count)))
            at += 1

    def _of_appends(self, *, with_policy_step: bool) -> pl.DataFrame:
        """One row per segment: what all its samples share, because they came in one append."""
        if not with_policy_step:
            return self._manifest
        first_samples = self._pool.samples(self._starts.tolist())
        steps = [sample.policy_step for sample in first_samples]
        return self._manifest.with_columns(
            pl.Series("policy_step", steps, dtype=SCANNED["policy_step"])
        )

    def _known(
        self,
        ids: range,
        names: Sequence[str],
        of_appends: pl.DataFrame,
        scores: dict[str, NDArray[np.float32]],
    ) -> pl.DataFrame:
        """What is known of samples without reading their segments."""
        numbers = np.arange(ids.start, ids.stop)
        of_segment = np.searchsorted(self._starts, numbers, side="right") - 1
        # The row numbers keep the height of a frame that has no other column.
        columns = [pl.Series("", numbers)]
        for name in names:
            if name == "id":
                columns.append(pl.Series(name, numbers))
            elif name in of_appends.columns:
                columns.append(of_appends[name][of_segment])
            elif name in scores:
                columns.append(pl.Series(name, scores[name][ids.start : ids.stop]).fill_nan(None))
            else:  # the texts of a pool that stores none
                columns.append(pl.Series(name, [None] * len(ids), dtype=SCANNED[name]))
        return pl.DataFrame(columns)


class _SegmentFiles:
    """Columns of segments, checked; the one that was read last stays open."""

    def __init__(self, pool: NativePool, needed: Sequence[str]) -> None:
        self._pool = pool
        self._needed = needed
        stored = (_IN_SEGMENT.get(name) or _LOOKED_UP[name] for name in needed)
        self._stored = list(dict.fromkeys(stored))
        self._open: tuple[Path, pl.DataFrame] | None = None

    def read(self, piece: _Piece) -> pl.DataFrame:
        """The needed columns of some rows. Raises PoolCorruptedError."""
        if not self._needed:
            return pl.DataFrame()
        # The places of the variable-sized values must be right before anything follows them.
        self._check(piece, range(0, len(piece.rows), _BLOCK_BYTES // 8))
        try:
            begin = piece.segment.offset
            rows = self._file(piece.segment.file)[
                begin + piece.rows.start : begin + piece.rows.stop
            ]
        except pl.exceptions.PolarsError:
            # Damage elsewhere in the file can keep polars from reading it: let the extension name it.
            for segment in segments_of(self._pool):
                if segment.file == piece.segment.file:
                    self._pool.samples(range(segment.first, segment.first + segment.count))
            raise
        for column in rows.get_columns():
            if (sizes := _byte_sizes(column)) is not None:
                self._check(piece, _one_per_block(sizes))
        looked_up = {
            number: self._samples(rows[number], piece.ids)
            for number in {_LOOKED_UP[name] for name in self._needed if name in _LOOKED_UP}
        }
        return pl.DataFrame([self._column(name, rows, looked_up) for name in self._needed])

    def _file(self, path: Path) -> pl.DataFrame:
        if self._open is None or self._open[0] != path:
            with path.open("rb") as file:  # a path would be taken for a pattern
                self._open = path, pl.read_ipc(file, columns=self._stored)
        return self._open[1]

    def _check(self, piece: _Piece, rows: Sequence[int]) -> None:
        """Have the blocks checked that some rows, and the last one, lie in."""
        ids = piece.ids
        self._pool.samples([*(ids[row] for row in rows), ids[-1]])

    def _samples(self, numbers: pl.Series, ids: range) -> tuple[list[Sample], NDArray[np.intp]]:
        """One sample for each distinct number, and which of them stands for which row."""
        _, rows, of_row = np.unique(numbers.to_numpy(), return_index=True, return_inverse=True)
        return self._pool.samples([ids[row] for row in rows]), of_row

    def _column(
        self,
        name: str,
        rows: pl.DataFrame,
        looked_up: dict[str, tuple[list[Sample], NDArray[np.intp]]],
    ) -> pl.Series:
        dtype = SCANNED[name]
        if name in _LOOKED_UP:
            samples, of_row = looked_up[_LOOKED_UP[name]]
            values = [getattr(sample, name) for sample in samples]
            if name == "prompt_tokens":
                values = [tokens.tolist() for tokens in values]
            return pl.Series(name, values, dtype=dtype)[of_row]
        column = rows[_IN_SEGMENT[name]].alias(name).cast(dtype)
        return column.fill_nan(None) if dtype == pl.Float32 else column


def _conjuncts(predicate: pl.Expr) -> list[pl.Expr]:
    """The conditions that must all hold."""
    inputs = predicate.meta.pop()
    if len(inputs) == 2:
        right, left = inputs
        if predicate.meta.eq(left & right):
            return _conjuncts(left) + _conjuncts(right)
    return [predicate]


def _kept(facts: pl.DataFrame, conditions: Sequence[pl.Expr], size: int) -> NDArray[np.bool_]:
    """Which rows fulfil all the conditions."""
    if not conditions:
        return np.ones(size, np.bool_)
    # Beside the facts, since a condition without a column, as polars makes of 1 = 1, has a height of one.
    fulfilled = facts.with_columns(pl.all_horizontal(conditions).fill_null(False).alias(""))
    return fulfilled.get_column("").to_numpy()


def _narrowed(piece: _Piece, kept: NDArray[np.bool_], start: int) -> _Piece | None:
    """The span of a piece's kept rows, None without any; ``kept`` begins at the id ``start``."""
    rows = np.flatnonzero(kept[piece.ids.start - start : piece.ids.stop - start])
    if rows.size == 0:
        return None
    first = piece.rows.start
    return _Piece(piece.segment, range(first + int(rows[0]), first + int(rows[-1]) + 1))


def _byte_sizes(column: pl.Series) -> NDArray[np.int64] | None:
    """Bytes of each value of a column of texts or tokens, None for one of fixed width."""
    if column.dtype == pl.String:
        return column.str.len_bytes().to_numpy().astype(np.int64)
    if column.dtype == pl.List(pl.UInt16) or column.dtype == pl.List(pl.UInt32):
        width = 2 if column.dtype == pl.List(pl.UInt16) else 4
        return column.list.len().to_numpy().astype(np.int64) * width
    return None


def _one_per_block(sizes: NDArray[np.int64]) -> list[int]:
    """Rows such that each block of values that lie one after another is touched.

    The values of the rows that reach over a multiple of the block size hold one byte of each whole block;
    the first and the last value that are not empty lie in what is left of a block on either side.
    """
    ends = np.cumsum(sizes)
    begins = ends - sizes
    crossing = np.flatnonzero(begins // _BLOCK_BYTES != ends // _BLOCK_BYTES)
    filled = np.flatnonzero(sizes)
    return [*crossing.tolist(), *filled[:1].tolist(), *filled[-1:].tolist()]
